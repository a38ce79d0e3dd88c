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
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from efficient_densenet import ops
from efficient_densenet.adopt.adopted import adoptions
from efficient_densenet.errors import UserError

_BLOCK = 16
_BATCHES = (32, 64)  # large enough that workspaces, cut to pieces of a few megabytes, no longer grow


@dataclass(frozen=True)
class StepMemory:
    """Bytes of tensors that a training step of one batch size adds to model, gradients and images.

    Attributes:
        batch_size: images.
        kept: alive between forward and backward.
        peak: the most that is alive at one time.
        where: when that is.
    """

    batch_size: int
    kept: int
    peak: int
    where: str


@dataclass(frozen=True)
class Peak:
    """The most bytes that a training step adds, by its batch: ``per_image·N + constant``; and where that is."""

    per_image: float
    constant: float
    where: str


def peak_of_step(model: nn.Module, image: Sequence[int], autocast: torch.dtype | None = None) -> Peak:
    """For batches of any size, from two of them. Arguments and errors are those of `step_memory`."""
    small, large = (step_memory(model, image, n, autocast) for n in _BATCHES)
    slope = (large.peak - small.peak) / (large.batch_size - small.batch_size)
    return Peak(slope, large.peak - slope * large.batch_size, large.where)


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
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        twin = copy.deepcopy(model)
    for adoption in adoptions(twin):
        adoption.promised = False  # a warning would be about the plan
    with fake, ops.nothing_computed(), warnings.catch_warnings(action="ignore"):
        twin.train()
        like = next(twin.parameters())
        x = torch.empty((batch_size, *image), dtype=like.dtype, device=like.device)
        for parameter in twin.parameters():
            parameter.grad = torch.empty_like(parameter)
        gradients = [parameter.grad for parameter in twin.parameters()]
        live = _Live([x, *twin.parameters(), *twin.buffers(), *gradients])
        with live, _gradients_told(twin, live):
            try:
                with torch.autocast(like.device.type, autocast, enabled=autocast is not None):
                    output = twin(x)
                    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
                    loss = sum(t.float().square().sum() for t in tensors)
                kept = live.now
                live.phase = "backward"
                loss.backward()  # type: ignore[union-attr]
            except Exception as error:
                shape = "×".join(map(str, image))
                reason = str(error).partition("\n")[0]
                raise UserError(f"a step on images of {shape} cannot be planned: {reason}") from error
    return StepMemory(batch_size, kept, live.peak, live.where)


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
    """

    def __init__(self, besides: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.phase = self.where = "forward"
        self.now = self.peak = 0
        self.storages: dict[int, Any] = {t.untyped_storage()._cdata: None for t in besides if t is not None}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would import the compiler, which takes seconds, and nothing here is compiled

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        inside = self.now + _workspace(function, args)
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


def _workspace(function: Any, args: Sequence[Any]) -> int:
    """Bytes that PyTorch's own operations need inside.

    On a CPU, oneDNN copies gradient and input of a convolution to blocks of 16 channels for the weight's gradient,
    unless they are channels-last, or an image of three channels.
    """
    if function is not torch.ops.aten.convolution_backward.default or not args[-1][1]:
        return 0
    tensors = [t for t in args[:2] if t.device.type == "cpu" and t.is_contiguous() and t.shape[1] > 3]
    return sum(t.nbytes // t.shape[1] * _BLOCK * ceil(t.shape[1] / _BLOCK) for t in tensors)
