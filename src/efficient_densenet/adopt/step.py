"""The memory of a training step, without running it: the same operations on tensors that have no values.

The network's own `forward` and PyTorch's autograd run on fake tensors, so that what is counted is what would happen,
whatever the network is and whichever way its parts run; only the kernels of dense blocks are replaced, by
`ops.shapes`. Counted are all bytes of tensors that are alive, at every operation.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from efficient_densenet import ops
from efficient_densenet.errors import UserError
from efficient_densenet.execution.buffers import is_channels_last

_aten = torch.ops.aten


@dataclass(frozen=True)
class StepMemory:
    """Bytes of tensors that a training step of one batch size adds to model, gradients and images.

    Attributes:
        batch_size: images.
        kept: alive between forward and backward.
        peak: the most that is alive at one time, with the workspaces of PyTorch's convolutions.
        where: when that is.
        trace: alive after each operation that makes tensors, in their order; empty for a batch that was not counted.
        forward: how many of these operations are those of forward.
    """

    batch_size: int
    kept: int
    peak: int
    where: str
    trace: tuple[int, ...] = field(repr=False)
    forward: int


def step_memory(
    model: nn.Module, image: Sequence[int], batch_size: int, autocast: torch.dtype | None = None
) -> StepMemory:
    """The memory of one training step: forward, a sum of squares as loss, and backward.

    Args:
        model: is not changed; it runs in training mode, in the types of its parameters.
        image: the shape ``(C, *spatial)`` of one image.
        autocast: the type of `torch.autocast`, if the step runs in it.

    Raises:
        UserError: the model cannot run on such images, or looks at the values of its tensors.
    """
    return count_step(without_values(copy.deepcopy(model)), image, batch_size, autocast)


def without_values(model: nn.Module) -> nn.Module:
    """Give a model, in place, tensors without values and hooks without effect, for `count_step`; returns the model."""
    made: dict[Tensor, Tensor] = {}  # one that is tied stays tied
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors that are neither parameters nor buffers have values
        for module in model.modules():
            parameters, buffers = (
                of(recurse=False, remove_duplicate=False) for of in (module.named_parameters, module.named_buffers)
            )
            for name, tensor in [*parameters, *buffers]:
                if tensor not in made:
                    made[tensor] = _without_values(tensor)
                setattr(module, name, made[tensor])
    _without_effect_of_hooks(model)
    return model


def _without_values(tensor: Tensor) -> Tensor:
    device = "cpu" if tensor.is_meta else tensor.device  # one without memory is counted as it would run on a CPU
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if not isinstance(tensor, nn.Parameter):
        return empty
    parameter = nn.Parameter(empty, tensor.requires_grad)
    parameter.grad = torch.empty_like(parameter)
    return parameter


def count_step(
    model: nn.Module, image: Sequence[int], batch_size: int, autocast: torch.dtype | None = None
) -> StepMemory:
    """`step_memory` of a model that is `without_values`, which is in training mode afterwards."""
    like: Any = next(model.parameters())
    with like.fake_mode, ops.nothing_computed(), warnings.catch_warnings(action="ignore"):
        model.train()
        x = torch.empty((batch_size, *image), dtype=like.dtype, device=like.fake_device)
        gradients = [parameter.grad for parameter in model.parameters()]
        live = _Live([x, *model.parameters(), *model.buffers(), *gradients])
        with live, _gradients_told(model, live):
            try:
                with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
                    output = model(x)
                    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
                    if not tensors:
                        raise ValueError("nothing that it returns needs a gradient; are all its parameters frozen?")
                    loss = sum(t.float().square().sum() for t in tensors)
                kept, forward = live.now, len(live.trace)
                live.phase = "backward"
                loss.backward()  # type: ignore[union-attr]
            except Exception as error:
                shape = "×".join(map(str, image))
                reason = str(error).partition("\n")[0]
                raise UserError(f"a step on images of {shape} cannot be planned: {reason}") from error
    return StepMemory(batch_size, kept, live.peak, live.where, tuple(live.trace), forward)


def _without_effect_of_hooks(model: nn.Module) -> None:
    """Hooks belong to the user's own calls. They stay, for they decide how a part runs, but do nothing."""
    for module in model.modules():
        for hooks in (
            module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        ):  # fmt: skip
            for key in hooks:
                hooks[key] = lambda *_, **__: None


@contextmanager
def _gradients_told(model: nn.Module, live: _Live) -> Iterator[None]:
    """`live` learns where backward is, from the parameters whose gradients it finds."""
    handles = [
        parameter.register_post_accumulate_grad_hook(partial(live.found_gradient, name.rpartition(".")[0]))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive, besides those of some tensors.

    Attributes:
        phase: of the step.
        now, peak: bytes.
        where: the peak is.
        trace: `now` after each operation that makes tensors.
    """

    def __init__(self, besides: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.phase = self.where = "forward"
        self.now = self.peak = 0
        self.trace: list[int] = []
        self.storages: dict[int, Any] = {t.untyped_storage()._cdata: None for t in besides if t is not None}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would import the compiler, which takes seconds, and nothing here is compiled

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Most calls are these two, and PyTorch would take a long way to the same answer.
        if function is torch.ops.prim.device.default:
            return args[0].fake_device
        if _only_writes(function) and getattr(args[0], "constant", None) is None:
            return args[0]
        if function is _aten._lazy_clone.default:  # it shares memory until somebody writes
            function = _aten.alias.default
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.trace.append(self.now)
        inside = self.now + _workspace(function, args, output)
        if inside > self.peak:
            self.peak, self.where = inside, self.phase
        return output

    def _count(self, storage: Any) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self.storages:
            self.storages[address] = weakref.finalize(storage, self._free, address, size)
            self.now += size

    def _free(self, address: int, size: int) -> None:
        del self.storages[address]
        self.now -= size

    def found_gradient(self, module: str, _: Tensor) -> None:
        """Of a parameter in this module: the peak, if it was in backward, was before that."""
        if self.where == "backward":
            self.where = f"backward of {module or 'the model'}"


@cache
def _only_writes(function: Any) -> bool:
    """Whether an operation writes into its first argument and returns that, of the same shape."""
    written = [value.alias_info is not None and value.alias_info.is_write for value in function._schema.arguments]
    in_place = written[:1] == [True] and not any(written[1:]) and len(function._schema.returns) == 1
    return in_place and torch.Tag.inplace_view not in function.tags


def _workspace(function: Any, args: Sequence[Any], output: Any) -> int:
    """Bytes that a convolution of PyTorch's needs inside, besides its results; on a CPU, where oneDNN runs it.

    Unless images are channels-last, oneDNN works on copies whose channels lie in blocks (`reorder_if_differ_in` in
    ideep's `convolution_forward` and `convolution_backward_*`, from PyTorch's allocator): of the input or its gradient,
    of the output or its gradient, and of the weight or its gradient. What it has made there becomes the result when the
    other two are free again. Backward finds the gradient of the input first. What it transposes in half precision is
    left out.
    """
    if function is _aten.convolution.default:
        x, weight = args[:2]
        made = _in_blocks(output)
        return max(_copied(x) + weight.nbytes + made - output.nbytes, made) if _reorders(x, weight) else 0
    if function is _aten.convolution_backward.default:
        grad, x, weight = args[:3]
        if not _reorders(x, weight):
            return 0
        copies = _copied(x) + _in_blocks(grad) + weight.nbytes
        of_x, of_weight = (tensor.nbytes * wanted for tensor, wanted in zip((x, weight), args[-1], strict=False))
        return max(copies, 2 * of_x, of_x + max(copies, 2 * of_weight) * (of_weight > 0)) - of_x - of_weight
    return 0


def _reorders(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN runs a convolution of `x`, and not on channels-last images.

    One thread multiplies 1×1 windows of few images elsewhere: `ConvParams::use_mkldnn` in aten's Convolution.cpp.
    """
    if x.device.type != "cpu" or is_channels_last(x) or not x.is_contiguous():
        return False
    products = x.dtype == torch.float32 and set(weight.shape[2:]) == {1} and len(x) < 16
    return not (products and torch.get_num_threads() == 1)


def _copied(x: Tensor) -> int:
    """Of a convolution's input: that of a network's first, an image of up to three channels, is read as it is."""
    return _in_blocks(x) if x.shape[1] > 3 else 0


def _in_blocks(x: Tensor) -> int:
    """Bytes of a copy whose channels are filled up to whole blocks: a vector of floats each."""
    block = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    return x.nbytes // x.shape[1] * block * ceil(x.shape[1] / block)
