"""The private names of PyTorch that are used are those of docs/private_names.md, and do what is wanted of them."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _device, _python_dispatch

import efficient_densenet

SOURCE = Path(efficient_densenet.__file__).parent
PAGE = (Path(__file__).parents[1] / "docs" / "private_names.md").read_text()
# Not of other libraries: Python's own, the endings of our operators' names, and a type in quotes.
OURS = {"_replace", "_fields", "_forward", "_backward", "_Give"}


def private(name: str) -> bool:
    return name.isidentifier() and len(name) > 1 and name[0] == "_" and name[1] != "_" and name not in OURS


def names_in(tree: ast.Module) -> set[str]:
    """Private names that a file takes from elsewhere: imported, as attributes, or as words in strings."""
    members = {n.name for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for n in c.body if hasattr(n, "name")}
    members |= {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self"
    }
    texts = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("efficient_densenet"):
            found |= {part for alias in node.names for part in f"{node.module}.{alias.name}".split(".")}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            found |= set(node.value.split())
    return {name for name in found - members if private(name)} - {"_C"}


def used() -> dict[str, set[str]]:
    """The files that use each name."""
    found: dict[str, set[str]] = {}
    for file in sorted(SOURCE.rglob("*.py")):
        for name in names_in(ast.parse(file.read_text())):
            found.setdefault(name, set()).add(file.relative_to(SOURCE).with_suffix("").as_posix())
    return found


def listed() -> dict[str, set[str]]:
    """The files that the page says use each name, or another of its line."""
    found: dict[str, set[str]] = {}
    for names, files in re.findall(r"^\| (`_[^|]*) \| ([^|]*) \|", PAGE, re.MULTILINE):
        for name in re.findall("`(.+?)`", names):
            found[name] = set(re.findall("`(.+?)`", files))
    return found


def test_the_page_lists_what_is_used_and_where():
    assert used().keys() == listed().keys()
    for name, files in used().items():
        assert files <= listed()[name], f"{name} is used in {files}"


@pytest.mark.parametrize(
    "line", ["import torch._new", "torch._C._new()", "from torch._new import x", "getattr(torch, '_new')", "x._new = 1"]
)
def test_a_new_name_is_found(line):
    assert names_in(ast.parse(line)) == {"_new"}


def hooked(register: str, attribute: str) -> bool:
    """Whether a module with such a hook has it there."""
    module = nn.ReLU()
    before = len(getattr(module, attribute))
    getattr(module, register)(lambda *_: None)
    return (before, len(getattr(module, attribute))) == (0, 1)


def hooked_globally(register: str, attribute: str) -> bool:
    hooks = getattr(nn.modules.module, attribute)
    handle = getattr(nn.modules.module, register)(lambda *_: None)
    there = len(hooks) == 1
    handle.remove()
    return there and not hooks


def transformed() -> bool:
    seen = []

    def look(x):
        seen.append(torch._C._functorch.peek_interpreter_stack())
        return x.sum()

    torch.func.grad(look)(torch.ones(2))
    return seen[0] is not None and torch._C._functorch.peek_interpreter_stack() is None


def at_level() -> bool:
    before = forward_ad._current_level
    with forward_ad.dual_level():
        return before < 0 <= forward_ad._current_level


def watched_operations() -> bool:
    class Mode(_python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Mode() as mode:
        one = torch._C._len_torch_dispatch_stack(), _python_dispatch._get_current_dispatch_mode_stack()
        with _python_dispatch._disable_current_modes():
            hidden = torch._C._len_torch_dispatch_stack()
    return one == (1, [mode]) and hidden == torch._C._len_torch_dispatch_stack() == 0


def watched_functions() -> bool:
    class Mode(TorchFunctionMode):
        pass

    with Mode() as mode:
        found = torch._C._len_torch_function_stack(), torch.overrides._get_current_function_mode_stack()
    return found == (1, [mode]) and torch._C._len_torch_function_stack() == 0


def default_device_is_a_mode() -> bool:
    with torch.device("cpu"):
        return isinstance(torch.overrides._get_current_function_mode_stack()[-1], _device.DeviceContext)


def exporting() -> bool:
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append(torch.compiler._is_exporting_flag)
            return x + 1

    torch.export.export(Look(), (torch.ones(1),))
    return any(seen) and not torch.compiler._is_exporting_flag


def saved_tensors_hooks() -> bool:
    allowed = torch._C._autograd._saved_tensors_hooks_is_enabled
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        return not allowed()


def fake_tensors() -> bool:
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        return detect_fake_mode() is mode


def profiled() -> bool:
    from torch._C._profiler import _RecordFunctionFast

    with torch.profiler.profile(record_shapes=True, with_flops=True) as profile:
        on = torch.autograd._profiler_enabled()
        with _RecordFunctionFast("aten::mm", [torch.empty(2, 3, device="meta"), torch.empty(3, 4, device="meta")], {}):
            pass
    flops = {event.key: event.flops for event in profile.key_averages()}
    return on and not torch.autograd._profiler_enabled() and flops["aten::mm"] == 2 * 2 * 3 * 4


def foreach() -> bool:
    tensors = [torch.ones(2), torch.ones(3)]
    torch._foreach_add_(tensors, 1)
    torch._foreach_mul_(tensors, 3)
    casts = [tensor.double() for tensor in tensors]
    torch._foreach_copy_(casts, tensors)
    torch._foreach_lerp_(tensors, [torch.zeros(2), torch.zeros(3)], 0.5)
    copied = all(torch.equal(cast, torch.full_like(cast, 6)) for cast in casts)
    return copied and all(bool((tensor == 3).all()) for tensor in tensors)


def attributes_of_modules() -> bool:
    norm, sequence = nn.BatchNorm2d(2, affine=False), nn.Sequential(nn.ReLU())
    return norm._parameters == {"weight": None, "bias": None} and (
        set(norm._buffers) == {"running_mean", "running_var", "num_batches_tracked"}
        and list(sequence._modules) == ["0"]
    )


def cached_parametrizations() -> bool:
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with parametrize.cached():
        linear.weight  # noqa: B018
        kept = len(parametrize._cache)
    return kept == 1 and not parametrize._cache


def compiled_by_itself() -> bool:
    module = nn.ReLU()
    module.compile(backend="eager")
    return module.__dict__["_compiled_call_impl"] is not None


def replicas() -> bool:
    source = inspect.getsource(nn.Module._replicate_for_data_parallel) + inspect.getsource(nn.parallel.replicate)
    return "_is_replica" in source and "_former_parameters" in source


def changed_in_place() -> bool:
    tensor = torch.ones(1)
    before = tensor._version
    tensor.add_(1)
    return tensor._version == before + 1


def end_of_backward() -> bool:
    order = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(lambda: order.append("end")))
    x.register_hook(lambda _: order.append("x"))
    y.backward()
    return order == ["x", "end"]


def below_autocast() -> bool:
    with torch.autocast("cpu", torch.bfloat16), torch._C._DisableAutocast():
        return torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.float32


def what_operations_change() -> bool:
    add, out = torch.ops.aten.add_.Tensor, torch.ops.aten.add.out
    writes = [a.alias_info is not None and a.alias_info.is_write for a in add._schema.arguments]
    return add._schema.is_mutable and writes == [True, False, False] and out._overloadname == "out"


def groups() -> bool:
    from torch.distributed import HashStore, destroy_process_group, distributed_c10d, init_process_group

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        group = distributed_c10d._get_default_group()
        distributed_c10d._get_default_store().set("a", "b")
        return distributed_c10d._resolve_process_group(group.group_name) is group
    finally:
        destroy_process_group()


def shared_memory() -> bool:
    tensor = torch.ones(4)
    return (
        tensor[1:].untyped_storage()._cdata == tensor.untyped_storage()._cdata != torch.ones(4).untyped_storage()._cdata
    )


def rates_that_were_tried() -> bool:
    from lightning.pytorch.callbacks import LearningRateFinder

    return vars(LearningRateFinder(1e-4, 1e-2)).items() >= {"_min_lr": 1e-4, "_max_lr": 1e-2}.items()


def lightning_gets() -> bool:
    from lightning.pytorch.cli import LightningCLI

    return list(inspect.signature(LightningCLI._get).parameters)[:3] == ["self", "config", "key"]


def operations_of(*names: str) -> bool:
    return all(hasattr(torch.ops.aten, name) for name in names)


def batches() -> bool:
    """A batch of gradients can be taken apart in a backward pass, and put together."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            whole = torch._remove_batch_dim(gradient, 1, 0, 0)
            return torch._add_batch_dim(2 * whole, 0, 1)

    x = torch.ones(3, requires_grad=True)
    gradients = torch.arange(6.0).view(2, 3)
    found = torch.autograd.grad(Double.apply(x), x, gradients, is_grads_batched=True)[0]
    return torch.equal(found, 2 * gradients)


def copied_on_write() -> bool:
    x = torch.zeros(3)
    lazy = torch._lazy_clone(x)
    x += 1
    return torch.equal(lazy, torch.zeros(3)) and torch.equal(x, torch.ones(3))


def outside_of_a_mode() -> bool:
    class Mode(_python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Mode() as mode:
        inside = _python_dispatch._get_current_dispatch_mode()
        with _python_dispatch._pop_mode_temporarily() as popped:
            outside = _python_dispatch._get_current_dispatch_mode()
    return inside is popped is mode and outside is None


def nested() -> bool:
    from torch.utils._pytree import tree_leaves

    return tree_leaves(({"a": 1, "b": [2]}, 3)) == [1, 2, 3]


def without_values() -> bool:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode, values = FakeTensorMode(allow_non_fake_inputs=True), torch.ones(3)
    with mode:
        made = torch.empty(2, 3) + values
    plain = made.fake_mode is mode and made.fake_device == torch.device("cpu") and made.constant is None
    return isinstance(made, FakeTensor) and made.shape == (2, 3) and plain


CHECKS = {
    "_functorch": transformed,
    "_current_level": at_level,
    "_len_torch_dispatch_stack _get_current_dispatch_mode_stack _python_dispatch _disable_current_modes": (
        watched_operations
    ),
    "_len_torch_function_stack _get_current_function_mode_stack": watched_functions,
    "_device": default_device_is_a_mode,
    "_is_exporting_flag": exporting,
    "_saved_tensors_hooks_is_enabled _autograd": saved_tensors_hooks,
    "_guards": fake_tensors,
    "_profiler_enabled _RecordFunctionFast _profiler": profiled,
    "_foreach_add_ _foreach_copy_ _foreach_lerp_ _foreach_mul_": foreach,
    "_add_batch_dim _remove_batch_dim": batches,
    "_lazy_clone": copied_on_write,
    "_get_current_dispatch_mode _pop_mode_temporarily": outside_of_a_mode,
    "_pytree": nested,
    "_subclasses": without_values,
    "_parameters _buffers _modules": attributes_of_modules,
    "_forward_hooks": lambda: hooked("register_forward_hook", "_forward_hooks"),
    "_forward_pre_hooks": lambda: hooked("register_forward_pre_hook", "_forward_pre_hooks"),
    "_backward_hooks": lambda: hooked("register_full_backward_hook", "_backward_hooks"),
    "_backward_pre_hooks": lambda: hooked("register_full_backward_pre_hook", "_backward_pre_hooks"),
    "_global_forward_hooks _global_forward": lambda: hooked_globally(
        "register_module_forward_hook", "_global_forward_hooks"
    ),
    "_global_forward_pre_hooks": lambda: hooked_globally(
        "register_module_forward_pre_hook", "_global_forward_pre_hooks"
    ),
    "_global_backward_hooks _global_backward": lambda: hooked_globally(
        "register_module_full_backward_hook", "_global_backward_hooks"
    ),
    "_global_backward_pre_hooks": lambda: hooked_globally(
        "register_module_full_backward_pre_hook", "_global_backward_pre_hooks"
    ),
    "_compiled_call_impl": compiled_by_itself,
    "_is_replica _former_parameters": replicas,
    "_conv_forward": lambda: "_conv_forward" in inspect.getsource(nn.Conv2d.forward),
    "_BatchNorm _NormBase": lambda: (
        all(issubclass(norm, nn.modules.batchnorm._BatchNorm) for norm in (nn.BatchNorm1d, nn.SyncBatchNorm))
        and issubclass(nn.InstanceNorm2d, nn.modules.batchnorm._NormBase)
    ),
    "_cache": cached_parametrizations,
    "_dynamo": lambda: callable(torch._C._dynamo.eval_frame.set_eval_frame),
    "_dynamo_marked_constant": lambda: (
        "_dynamo_marked_constant" in inspect.getsource(torch._dynamo.assume_constant_result)
    ),
    "_native_batch_norm_legit": lambda: operations_of("_native_batch_norm_legit"),
    "_unsafe_view": lambda: operations_of("_unsafe_view"),
    "_fused_rms_norm _prelu_kernel _to_copy": lambda: operations_of("_fused_rms_norm", "_prelu_kernel", "_to_copy"),
    "_schema _overloadname": what_operations_change,
    "_cdata": shared_memory,
    "_version": changed_in_place,
    "_execution_engine": end_of_backward,
    "_DisableAutocast": below_autocast,
    "_get_default_group _resolve_process_group _get_default_store": groups,
    "_get": lightning_gets,
    "_max_lr _min_lr": rates_that_were_tried,
    "_orig_mod": lambda: "_orig_mod.weight" in torch.compile(nn.Linear(1, 1)).state_dict(),
    "_checkpoint_wrapped_module": lambda: "_checkpoint_wrapped_module" in checkpoint_wrapper(nn.ReLU())._modules,
    "_fsdp_wrapped_module": lambda: FSDP_WRAPPED_MODULE == "_fsdp_wrapped_module",
}
ELSEWHERE = {"_is_hf_initialized"}  # a mark that is left out of a comparison


def test_every_name_has_a_check():
    checked = {name for names in CHECKS for name in names.split()}
    assert checked | ELSEWHERE == listed().keys()


@pytest.mark.parametrize("names", CHECKS)
def test_it_does_what_is_wanted(names):
    assert CHECKS[names]()
