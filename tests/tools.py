"""Programs that use a network through tools of PyTorch and others: the rows of docs/tools.md, by their names there.

Each is called with a function that makes a network, and returns what the tool finds, which must be what it finds of the
ordinary network.
"""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.func
from comparison import buffers, gradients, training_step, weighted_sum
from torch import Tensor, distributed, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from torch.nn.modules import module as on_all_modules
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from efficient_densenet import make_efficient, restore
from efficient_densenet.errors import UserError

Make = Callable[[], Any]
PROGRAMS: dict[str, Callable[[Make], Any]] = {}
IMAGES = torch.randn(2, 3, 34, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
FEATURES = torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def row(name: str) -> Callable[[Callable], Callable]:
    def remember(program: Callable) -> Callable:
        assert name not in PROGRAMS
        PROGRAMS[name] = program
        return program

    return remember


def step(network: nn.Module, x: Tensor = IMAGES) -> dict[str, Tensor]:
    return training_step(network, x)


def parameters(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in network.named_parameters()}


def loss_of(network: nn.Module) -> Callable[..., Tensor]:
    return lambda values, x=IMAGES: weighted_sum(torch.func.functional_call(network, values, (x,)))


def few_inputs(network: nn.Module) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The network as a function of three numbers, for derivatives that take as many passes as there are inputs."""
    return lambda scale: network(IMAGES[:1] * scale), torch.ones(3, 1, 1, dtype=torch.float64)


# Derivatives


@row("`torch.func.jvp`, `jacfwd`")
def jvp(make):
    network = make().eval()
    return torch.func.jvp(network, (IMAGES,), (IMAGES.cos(),)), torch.func.jacfwd(few_inputs(network)[0])(
        few_inputs(network)[1]
    )


@row("`torch.func.linearize`")
def linearize(make):
    block = make().eval().requires_grad_(False).features.denseblock1
    output, function = torch.func.linearize(block, FEATURES)
    return output, function(FEATURES.cos())


@row("`torch.autograd.forward_ad`")
def forward_mode(make):
    network = make()
    frozen = make().eval().requires_grad_(False)
    found = []
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(IMAGES, IMAGES.cos())
        found += forward_ad.unpack_dual(network(dual))
        with torch.no_grad():
            found += forward_ad.unpack_dual(frozen(dual))
        weights = {name: forward_ad.make_dual(p, torch.ones_like(p)) for name, p in parameters(frozen).items()}
        found += forward_ad.unpack_dual(torch.func.functional_call(frozen, weights, (IMAGES,)))
    return found, buffers(network)


@row("`torch.func.grad`, `vjp`, `jacrev`, `hessian`")
def reverse(make):
    network = make().eval()
    output, function = torch.func.vjp(network, IMAGES)
    of_few, few = few_inputs(network)
    return (
        torch.func.grad(loss_of(network))(parameters(network)),
        *(output, function(torch.ones_like(output))),
        torch.func.jacrev(of_few)(few),
        torch.func.hessian(lambda scale: weighted_sum(of_few(scale)))(few),
    )


@row("`torch.func.vmap` over networks (`stack_module_state`)")
def ensemble(make):
    networks = [make(), make()]
    with torch.no_grad():
        networks[1].features.conv0.weight.mul_(1.1)
    values = torch.func.stack_module_state(networks)

    def one(weights, averages):
        return torch.func.functional_call(networks[0], (weights, averages), (IMAGES,))

    return torch.func.vmap(one)(*values), values[1]


@row("gradients of each sample (`vmap` of `grad`)")
def per_sample(make):
    network = make().eval()
    gradient = torch.func.grad(lambda values, x: loss_of(network)(values, x[None]))
    return torch.func.vmap(gradient, (None, 0))(parameters(network), IMAGES)


@row("Opacus' `GradSampleModule` (with the norms that it demands)")
def opacus(make):
    opacus = pytest.importorskip("opacus")
    network = opacus.validators.ModuleValidator.fix(make().features).double()
    not_in_place(network)
    wrapped = opacus.GradSampleModule(network)
    weighted_sum(wrapped(IMAGES)).backward()
    return {name: p.grad_sample for name, p in network.named_parameters()}


@row("`torch.func.functional_call`")
def functional_call(make):
    network = make()
    values = {name: (p * 1.1).requires_grad_() for name, p in parameters(network).items()}
    return torch.autograd.grad(loss_of(network)(values), list(values.values())), buffers(network)


@row("`is_grads_batched`, `jacobian(vectorize=True)`")
def batched(make):
    found = []
    for network in (make(), make().eval()):
        x = IMAGES.clone().requires_grad_()
        output = network(x)
        each = torch.eye(output.numel(), dtype=output.dtype).view(-1, *output.shape)
        wanted = [x, network.features.conv0.weight, network.features.transition1.norm.bias]
        found += torch.autograd.grad(output, wanted, each, is_grads_batched=True)
        found.append(torch.autograd.functional.jacobian(network, IMAGES, vectorize=True))
    return found


@row("gradients of gradients (`create_graph=True`; `torch.autograd.functional.jvp`, `hvp`)")
def twice(make):
    network = make().eval()

    def product():
        return torch.autograd.functional.hvp(lambda x: weighted_sum(network(x)), IMAGES, IMAGES.cos())

    try:
        return product()
    except RuntimeError as error:
        assert "make_efficient(model, way='recompute')" in str(error)
        make_efficient(network, way="recompute")
        return product()


# Counting


@row("`torch.utils.flop_counter.FlopCounterMode`")
def flop_counter(make):
    from torch.utils.flop_counter import FlopCounterMode

    network = make()
    with FlopCounterMode(display=False) as counter:
        weighted_sum(network(IMAGES)).backward()
    counts = counter.get_flop_counts()
    return sorted((name.replace("Efficient", ""), sum(of.values())) for name, of in counts.items())


@row("`torch.profiler` (`with_flops=True`)")
def profiler(make):
    """It counts nothing of the backward pass of convolutions. Plain PyTorch's sums may be small products too."""
    from torch.utils.flop_counter import FlopCounterMode

    network = make().eval()
    with torch.no_grad(), torch.profiler.profile(with_flops=True) as profile:
        network(IMAGES)
    counted = sum(event.flops for event in profile.key_averages() if event.key in _PRODUCTS)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        restore(network)(IMAGES)
    assert counter.get_total_flops() <= counted <= 1.01 * counter.get_total_flops()


_PRODUCTS = ("aten::conv2d", "aten::mm", "aten::addmm")


@row("fvcore")
def fvcore(make):
    fvcore = pytest.importorskip("fvcore.nn")
    counted = fvcore.FlopCountAnalysis(make(), IMAGES).unsupported_ops_warnings(False)
    return counted.total(), dict(counted.by_module())


@row("thop")
def thop(make):
    thop = pytest.importorskip("thop")
    return thop.profile(make(), (IMAGES,), verbose=False)


@row("torchinfo")
def torchinfo(make):
    torchinfo = pytest.importorskip("torchinfo")
    found = torchinfo.summary(make(), input_data=IMAGES, verbose=0, depth=9)
    return found.total_mult_adds, found.total_params, len(found.summary_list)


@row("`torch.utils.module_tracker.ModuleTracker`")
def module_tracker(make):
    from torch.utils.module_tracker import ModuleTracker

    network, tracker, seen = make(), ModuleTracker(), []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: seen.append(_names(tracker.parents)))
    with tracker:
        network(IMAGES)
    return seen


def _names(names):
    return sorted(name.replace("Efficient", "") for name in names)


# Hooks


@row("hooks on all modules (`register_module_forward_hook` and the other three)")
def global_hooks(make):
    kinds = ("forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook")
    found = []
    for kind in kinds:
        network, seen = make(), Counter()
        not_in_place(network)
        register = getattr(on_all_modules, f"register_module_{kind}")
        handle = register(lambda module, *_, seen=seen: seen.update([type(module).__name__.replace("Efficient", "")]))
        try:
            weighted_sum(network.features(IMAGES.clone().requires_grad_())).backward()
        finally:
            handle.remove()
        found.append(dict(seen))
    return found


def not_in_place(network):
    """PyTorch refuses hooks on gradients of what is changed in place."""
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False


@row("hooks on modules inside a block")
def hooks_inside(make):
    network = make()
    network.features.denseblock1.denselayer2.conv1.register_forward_hook(lambda _m, _i, output: output * 2)
    network.features.denseblock2.denselayer1.conv2.register_full_backward_hook(lambda _m, grads, _o: (grads[0] * 2,))
    return step(network)


@row("hooks on blocks, tensors and parameters")
def hooks_outside(make):
    network, seen = make(), {}
    network.features.denseblock1.register_forward_hook(lambda _m, _i, output: output * 2)
    network.features.denseblock2.register_full_backward_hook(lambda _m, grads, _o: (grads[0] * 2,))
    for name, p in network.named_parameters():
        p.register_hook(lambda gradient, name=name: seen.update({name: gradient.clone()}))
    return step(network), {name: seen[name] for name in sorted(seen)}


@row("optimisers in backward (`register_post_accumulate_grad_hook`)")
def optimiser_in_backward(make):
    network = make()

    def move(p):
        with torch.no_grad():
            p -= 0.01 * p.grad
        p.grad = None

    for p in network.parameters():
        p.register_post_accumulate_grad_hook(move)
    for _ in range(2):
        weighted_sum(network(IMAGES)).backward()
    return parameters(network)


@row("functions and classes of PyTorch that are replaced for the whole process")
def patched(make):
    found = []
    owners = (functional, "relu"), (nn.Conv2d, "_conv_forward"), (nn.BatchNorm2d.__mro__[1], "forward")
    for owner, name in owners:
        network, original = make(), getattr(owner, name)

        def changed(*arguments, original=original, **named):
            return original(*arguments, **named) * 1.25

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, changed)
            found.append(step(network))
    return found


# Graphs


@row("`torch.fx.symbolic_trace`")
def fx(make):
    return step(torch.fx.symbolic_trace(make()))


@row("`create_feature_extractor`")
def feature_extractor(make):
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(make(), ["features.denseblock1", "features.transition1"])(IMAGES)


@row("`prepare_fx`, `convert_fx`")
def quantize_fx(make):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    x = IMAGES.float()
    prepared = prepare_fx(make().float().eval(), get_default_qconfig_mapping("x86"), (x,))
    return prepared(x), convert_fx(prepared)(x)


@row("`torch.jit.trace`")
def jit_trace(make):
    return torch.jit.trace(make().eval(), IMAGES, check_trace=False)(IMAGES.cos())


@row("`torch.jit.script`")
def jit_script(make):
    network = make().eval()
    try:
        return torch.jit.script(network)(IMAGES)
    except UserError as error:
        assert "script restore(model)" in str(error)
        return torch.jit.script(restore(network))(IMAGES)


@row("`torch.export`")
def export(make):
    found = []
    for network in (make(), make().eval()):
        graph = torch.export.export(network, (IMAGES,), strict=False)
        assert not any("efficient_densenet" in str(node.target) for node in graph.graph.nodes)
        found.append(graph.module()(IMAGES.cos()))
    return found


@row("`make_fx`")
def make_fx(make):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(make().eval())(IMAGES)(IMAGES.cos())


@row("`FakeTensorMode`")
def fake_tensors(make):
    from torch._subclasses.fake_tensor import FakeTensorMode

    network = make()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return tuple(network(mode.from_tensor(IMAGES)).shape)


@row("the meta device, `to_empty`")
def meta(make):
    network, state = make().to("meta"), make().state_dict()
    output = network(IMAGES.to("meta"))
    output.sum().backward()
    shapes = [tuple(output.shape), [tuple(p.grad.shape) for p in network.parameters()]]
    network = network.to_empty(device="cpu")
    network.zero_grad(set_to_none=True)
    network.load_state_dict(state)
    return shapes, step(network)


# Tensors of other kinds, and modes


class Wrapped(Tensor):
    """Holds a tensor and behaves as twice of it, as weights do that are quantised or shared out."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return return_and_correct_aliasing(function, args, kwargs or {}, cls(function(args[0].inner)))
        return function(*tree_map(_value, args), **tree_map(_value, kwargs or {}))


def _value(x):
    return x.inner * 2 if isinstance(x, Wrapped) else x


class Subclass(Tensor):
    """Of everything that is computed with it, there is another one."""


@row("torchvision's `tv_tensors` as images")
def tv_tensors(make):
    from torchvision.tv_tensors import Image

    network = make()
    output = network(Image(IMAGES))
    weighted_sum(output).backward()
    return type(output).__name__, output.detach(), gradients(network)


@row("tensors of other classes as input")
def other_inputs(make):
    network = make()
    output = network(IMAGES.as_subclass(Subclass))
    return type(output).__name__, output.detach().as_subclass(Tensor)


@row("gradients of other classes")
def other_gradients(make):
    network = make()
    try:
        return _backward_of_wrapped(network)
    except RuntimeError as error:
        assert "make_efficient(model, way='recompute')" in str(error)
        return _backward_of_wrapped(make_efficient(network, way="recompute"))


def _backward_of_wrapped(network):
    output = network(IMAGES)
    network.zero_grad()
    output.backward(Wrapped(torch.ones_like(output)))
    return gradients(network)


@row("tensors of other classes as parameters, buffers or attributes (quantised weights)")
def other_parameters(make):
    found = []
    for dtype in (torch.float64, torch.float32):
        network = make().eval().requires_grad_(False).to(dtype)
        first, second, third = network.features.denseblock2.children()
        norms = (second.norm2, "bias"), (network.features.transition1.norm, "weight")
        for module, name in ((second.conv1, "weight"), *norms):
            setattr(module, name, nn.Parameter(Wrapped(getattr(module, name).detach()), requires_grad=False))
        second.norm1.running_mean = Wrapped(second.norm1.running_mean)
        with torch.no_grad():
            found.append(network(IMAGES.to(dtype)))
            for module in (first.conv2, network.features.conv0):
                weight = module._parameters.pop("weight")
                module.weight = Wrapped(weight.detach())
            found.append(network(IMAGES.to(dtype)))
            parametrize.register_parametrization(third.conv1, "weight", Wrapping(), unsafe=True)
            found.append(network(IMAGES.to(dtype)))
    return found


class Wrapping(nn.Module):
    def forward(self, weight):
        return Wrapped(weight)


@row("`DTensor` as parameters, and as images")
def distributed_tensors(make):
    from torch.distributed.tensor import distribute_module, distribute_tensor

    found = []
    with one_process() as mesh:
        for network in (make(), make().eval()):
            for parts in (network.features.denseblock1.denselayer2, network.features.transition1, network):
                distribute_module(parts, mesh)
                found.append(outcome(network, IMAGES))
        with torch.no_grad():
            return [*found, outcome(lambda: network(distribute_tensor(IMAGES, mesh)).full_tensor())]


@row("FSDP (`fully_shard`)")
def sharded(make):
    from torch.distributed.fsdp import fully_shard

    with one_process() as mesh:
        network = fully_shard(make(), mesh=mesh)
        found = [step(network) for _ in range(2)]
        return [{name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in one.items()} for one in found]


@contextmanager
def one_process():
    """A mesh of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


@row("parameters and buffers without memory, on other devices, of other types")
def unsuitable(make):
    found = []
    for dtype in (torch.float32, torch.float64):
        for name in ("norm0", "denseblock1.denselayer2.norm1", "denseblock1.denselayer2.conv2", "transition1.conv"):
            for change in (freed, lambda module: module.to("meta"), lambda module: module.half(), nn.Module.bfloat16):
                network = make().to(dtype)
                change(network.features.get_submodule(name))
                found += [kind_of_error(network, IMAGES.to(dtype)), kind_of_error(network.eval(), IMAGES.to(dtype))]
    return found


def freed(module):
    module.weight.untyped_storage().resize_(0)


def kind_of_error(network, x):
    """Or where its output is: PyTorch makes nothing of a weight that is on the meta device."""
    try:
        return network(x).device
    except (RuntimeError, NotImplementedError) as error:
        return NotImplementedError if isinstance(error, NotImplementedError) else RuntimeError


class Named(nn.Parameter):
    """A parameter with a class of its own, which changes nothing."""


@row("subclasses of `nn.Parameter` that add nothing")
def parameter_subclasses(make):
    network = make()
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, Named(p.detach()))
    return step(network)


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        return output * 1.5 if function is torch.ops.aten.convolution.default else output


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        return output * 1.5 if function is torch.nn.functional.batch_norm else output


@row("a `TorchDispatchMode`")
def dispatch_mode(make):
    network = make()
    with DispatchMode():
        output = network(IMAGES)
    weighted_sum(output).backward()
    return output.detach(), gradients(network)


@row("a `TorchFunctionMode`")
def function_mode(make):
    network = make()
    with FunctionMode():
        output = network(IMAGES)
    weighted_sum(output).backward()
    return output.detach(), gradients(network)


@row("`torch.set_default_device`, `set_default_dtype`, `use_deterministic_algorithms`")
def defaults(make):
    network = make()
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device("meta"):  # where tensors are made of which nobody says where
            output = network(IMAGES)
        weighted_sum(output).backward()
        return output.detach(), gradients(network), buffers(network)
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(False)


@row("`torch.autocast`")
def autocast(make):
    """Types alone: bfloat16 rounds in other places."""
    network, x = make().float(), FEATURES.float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(IMAGES.float()), network.features.denseblock1(x), network.features[4:6](x)
    return [(output.dtype, tuple(output.shape)) for output in outputs]


# What autograd saves


@row("`save_on_cpu` and other hooks on saved tensors")
def saved_tensors(make):
    network = make()
    with torch.autograd.graph.save_on_cpu():
        return step(network)


@row("`disable_saved_tensors_hooks`")
def no_saved_tensors_hooks(make):
    network = make()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        return step(network)


@row("`torch.utils.checkpoint` around parts")
def checkpointed(make):
    """How often averages move is another question: see `test_a_checkpoint_around_a_block_moves_averages_once`."""
    found = []
    for reentrant in (False, True):
        network, x = make(), FEATURES.clone().requires_grad_()
        weighted_sum(checkpoint(network.features.denseblock1, x, use_reentrant=reentrant)).backward()
        found.append((x.grad, gradients(network)))
    return found


@row("a tensor that backward needs is changed in place")
def changed_in_between(make):
    messages = []
    for name in ("norm0.weight", "denseblock1.denselayer2.conv1.weight", "transition1.conv.weight", "norm5.weight"):
        network = make()
        loss = weighted_sum(network(IMAGES))
        with torch.no_grad():
            network.get_parameter(f"features.{name if name[:5] != 'norm5' else _last(network)}").mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as raised:
            loss.backward()
        messages.append(raised.type)
    return messages


def _last(network):
    return f"{[name for name, _ in network.features.named_children()][-1]}.weight"


@row("outputs and gradients of parts are changed in place, or are views")
def outputs_in_place(make):
    network = make()
    block, transition = network.features.denseblock1, network.features.transition1
    x = FEATURES[:1].expand(2, -1, -1, -1).transpose(2, 3)
    made = block(x)
    made[:, ::2].mul_(3)
    weighted_sum(transition(torch.relu_(made)).add_(1)).backward()
    made = block(FEATURES)
    made.backward(torch.ones((), dtype=made.dtype).expand_as(made))
    return made.detach(), gradients(network)


@row("tensors made in inference mode")
def inference_mode(make):
    network = make()
    with torch.inference_mode():
        x, output = FEATURES.clone(), network(IMAGES)
    weighted_sum(network.features.denseblock1(x)).backward()
    return output.clone(), gradients(network), buffers(network)


# Modules


@row("parametrizations (`weight_norm`, `spectral_norm`), also `cached()`")
def parametrized(make):
    network = make()
    parametrizations.weight_norm(network.features.denseblock1.denselayer1.conv2)
    parametrizations.spectral_norm(network.features.transition1.conv)
    with parametrize.cached():
        return step(network)


@row("parts that are replaced, before or after a call")
def replaced(make):
    network = make()
    found = [step(network)]
    network.features.denseblock1.denselayer1.relu1 = nn.SiLU()
    return [*found, step(network)]


@row("copies and pickles of whole networks, `AveragedModel`")
def copies(make):
    network = make()
    found = [step(network)]
    averaged = torch.optim.swa_utils.AveragedModel(network)
    averaged.update_parameters(network)
    return [*found, step(copy.deepcopy(network)), step(pickle.loads(pickle.dumps(network))), step(averaged.module)]


@row("`torch.utils.swap_tensors`, `load_state_dict(assign=True)`, `to()` of any kind")
def swapped(make):
    network = make()
    weight = network.features.transition1.conv.weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 2))
    network.load_state_dict({name: value * 1 for name, value in network.state_dict().items()}, assign=True)
    return step(network.float().double().to(memory_format=torch.channels_last))


@row("threads that share a network")
def threads(make):
    network, found = make().eval(), [None] * 4

    def run(i):
        found[i] = torch.autograd.grad(weighted_sum(network(IMAGES * (i + 1))), network.features.conv0.weight)[0]

    workers = [threading.Thread(target=run, args=(i,)) for i in range(len(found))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return found


# Calls that are unusual, or wrong


@row("an empty batch")
def empty_batch(make):
    found = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        network, none = make().to(dtype), IMAGES[:0].to(dtype)
        found += [step(network, none), step(network.eval(), none)]
        with torch.no_grad():
            found.append(network.features(none))
    return found


@row("one image, one pixel, images too small for a pool or for statistics")
def small(make):
    found = []
    for training in (True, False):
        for shape in ((1, 33, 33), (2, 5, 6), (2, 1, 1), (1, 1, 2), (1, 2, 2), (2, 3, 9), (1, 9, 9)):
            network = make().train(training)
            network.min_input_size = 1
            found += [outcome(step, network, IMAGES[: shape[0], :, : shape[1], : shape[2]]), averages(network)]
            few = FEATURES[: shape[0], :, : shape[1], : shape[2]]
            found.append(outcome(step, network.features[4:6], few))
            found.append(outcome(step, network.features[4:6].float(), few.float()))
    return found


def averages(network):
    """All, also where an error came in between, but not the counts: the ordinary norm counts before it fails."""
    return {name: t for name, t in buffers(network).items() if t.is_floating_point()}


@row("wrong inputs: other types, dimensions, channels, arguments")
def wrong(make):
    network = make()
    block = network.features.denseblock1
    given = (FEATURES.long(), FEATURES[0], FEATURES[..., None], FEATURES[:, :5], FEATURES[:, :0], None, [FEATURES])
    found = [outcome(block, x) for x in given]
    return [*found, outcome(block), outcome(block, FEATURES, FEATURES), outcome(block, other=FEATURES)]


def outcome(function, *arguments, **named):
    """What it returns, or the type of its error and how its message begins."""
    try:
        return function(*arguments, **named)
    except Exception as error:
        return type(error).__name__, str(error)[:60]


def networks(block_config: tuple[int, ...] = (2, 3)) -> dict[str, nn.Module]:
    """One as others have it, one of ours, with nothing trivial in their norms."""
    from others import randomised, torchvision_small
    from twins import IMAGENET

    from efficient_densenet import DenseNet

    ours = DenseNet(**IMAGENET | {"growth_rate": 4, "block_config": block_config})
    return {"torchvision": randomised(torchvision_small(block_config=block_config)), "ours": randomised(ours)}


def quietly(program: Callable[[Make], Any], make: Make) -> Any:
    with warnings.catch_warnings(action="ignore"):
        torch.manual_seed(7)
        return program(make)
