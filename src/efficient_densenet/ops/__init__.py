"""The fused norm–relu–convolution and its statistics: tensors in, tensors out.

`Backend` in `protocol` says which operations there are, and `reference` defines them. The backends that run: `eager` in
plain PyTorch, on any device, `cpu`, compiled for processors, and `triton`, for GPUs. `backend` chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from efficient_densenet.ops import cpu, eager, shapes, triton
from efficient_densenet.ops.cpu import layers as cpu_layers
from efficient_densenet.ops.cpu import stem as cpu_stem
from efficient_densenet.ops.layers import Evaluation, Layers, LayersBackward, Reader
from efficient_densenet.ops.profiled import Profiled
from efficient_densenet.ops.protocol import Backend

_only: Backend | None = None  # while it is set, it runs whatever the activations are
_plans = 0  # that are being made


def backend(x: Tensor) -> Backend:
    """The backend for activations like `x`; labelled, while a profiler is active."""
    chosen = _choose(x)
    return cast(Backend, Profiled(chosen)) if torch.autograd._profiler_enabled() else chosen


def _choose(x: Tensor) -> Backend:
    if _is_planned(x):
        return triton if triton.plans(x) else shapes
    return _computing(x)


def _is_planned(x: Tensor) -> bool:
    return _plans > 0 and isinstance(x, FakeTensor)  # other threads go on computing


def _computing(x: Tensor) -> Backend:
    """The backend for tensors with values like `x`."""
    if _only is not None:
        return _only
    if not x.numel():
        return eager  # there is nothing to be fast at
    if triton.supports(x):
        return triton
    return cpu if cpu.supports(x) else eager


def runs_layers(x: Tensor, readers: Sequence[Reader], memo: dict[Any, Any]) -> bool:
    """Whether layers of these readers, on features like `x`, run in one call: see `run_layers`, and `Layers.memo`."""
    chosen = _choose(x)
    return chosen is triton or (_computing(x) is cpu and cpu_layers.supports(x, readers, memo))


def converts_gradients(x: Tensor) -> bool:
    """Whether `run_layers_backward` writes the gradients of weights in any type, and not only in the weights' own."""
    return _choose(x) is triton


def run_layers(layers: Layers, fold: bool, measure: bool) -> int:
    """Run layers from the first on, up to one that must be left to the operations of `Backend`.

    Args:
        layers: see `Layers`.
        fold: whether the norms have to be folded.
        measure: whether the statistics of what the layers make have to be found.

    Returns:
        How many layers are done.
    """
    chosen: Any = backend(layers.features)
    return chosen.run_layers(layers, fold, measure)


def run_layers_backward(layers: Layers, operands: LayersBackward) -> int:
    """The backward pass of layers, likewise, from the last to the first; returns how many are done.

    When a layer's turn comes, `Backend.finish` has been done to the gradient of the features that it makes.
    """
    chosen: Any = backend(layers.features)
    return chosen.run_layers_backward(layers, operands)


def evaluates(x: Tensor, readers: Sequence[Reader], memo: dict[Any, Any]) -> bool:
    """Whether a block of these readers, on features that begin with `x`, runs in one call: see `evaluate`."""
    return _evaluates_in_one_call(x) and cpu_layers.supports(x, readers, memo)


def evaluate(evaluation: Evaluation) -> bool:
    """Run a whole block in evaluation; False, and nothing of use is done, where a layer has to be left to `Backend`."""
    return cpu_layers.evaluate(evaluation)


def evaluates_stem(x: Tensor, reader: Reader) -> bool:
    """Whether a stem of this convolution and norm, on images `x`, runs in one call: see `evaluate_stem`."""
    return _evaluates_in_one_call(x) and cpu_stem.supports(x, reader)


def _evaluates_in_one_call(x: Tensor) -> bool:
    """Not while a profiler is active, in whose trace each operation has a label."""
    return _computing(x) is cpu and not torch.autograd._profiler_enabled()


def evaluate_stem(
    x: Tensor, reader: Reader, stride: Sequence[int], padding: Sequence[int], size: Sequence[int], out: Tensor
) -> bool:
    """Run a whole stem in evaluation; False, and nothing of use is done, where the convolution is left to PyTorch.

    Args:
        x: ``(N, C, height, width)``.
        reader: the convolution of `x`, and the norm after it, which has constants.
        stride, padding: of the convolution.
        size: height and width of what it makes.
        out: ``(N, *ceil(size / 2), O)``, what a max pool of window 3, stride 2 and padding 1 makes of that.
    """
    return cpu_stem.evaluate(x, reader, stride, padding, size, out)


def slower_than_recomputing(x: Tensor) -> str | None:
    """Why a dense block of activations like `x` is better computed again than run on the shared buffer, if it is.

    On a GPU without kernels, plain PyTorch's operations on the buffer move 26 times a layer's prefix in float32 and 43
    times in half precision, forward and backward; recomputing moves it 24 times, the ordinary network 18 times.
    """
    if x.is_cuda and x.numel() and _only is None and _choose(x) is eager:
        return "without kernels for this GPU and type, the shared buffer moves more memory than recomputing"
    return None


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """While this is open, plain PyTorch runs everywhere: to compare with it, in results and in time."""
    global _only
    before, _only = _only, eager
    try:
        yield
    finally:
        _only = before


@contextmanager
def nothing_computed() -> Iterator[None]:
    """While this is open, operations on tensors without values only allocate: to find out what a step needs."""
    global _plans
    _plans += 1
    try:
        yield
    finally:
        _plans -= 1


def computes_nothing() -> bool:
    """Whether `nothing_computed` is open."""
    return _plans > 0


class Backends(dict[str, str]):
    """What runs on each kind of device, and why; printed, a line for each fact."""

    def __str__(self) -> str:
        return "\n".join(f"{device}: {what}".replace("; ", f"\n{' ' * len(device)}  ") for device, what in self.items())


def backends() -> Backends:
    """What runs on each kind of device, and why: words for people."""
    return Backends(
        {
            "cpu": cpu.describe(),
            "cuda": triton.available(),
            "everything else": "plain PyTorch",
        }
    )
