"""What a batch norm is to the engine: a scale and a shift per channel, and a gradient through the statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet import ops
from efficient_densenet.execution.synchronise import all_sums
from efficient_densenet.ops.reference import Statistics, statistics_dtype


@dataclass(frozen=True)
class Norm:
    """What one batch norm does at this call.

    `mean` and `variance` are None where the batch's own statistics are used, else the constants to use instead.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor | None
    variance: Tensor | None
    eps: float

    @property
    def uses_batch(self) -> bool:
        return self.mean is None

    def affine(self, batch: Statistics) -> Affine:
        """Scale and shift for a batch of these statistics."""
        mean, variance = batch if self.mean is None or self.variance is None else (self.mean, self.variance)
        dtype = batch[0].dtype
        mean, inverse = _in(dtype, mean), torch.rsqrt(_in(dtype, variance) + self.eps)
        scale = _in(dtype, self.weight) * inverse
        return Affine(mean, inverse, scale, torch.addcmul(_in(dtype, self.bias), mean, scale, value=-1))

    def parameter_gradients(self, affine: Affine, g: Tensor, g_centred: Tensor) -> tuple[Tensor, Tensor]:
        """Of weight and bias, from ``Σ g`` and ``Σ g·(x − μ)``."""
        return _in(self.weight.dtype, affine.inverse * g_centred), _in(self.bias.dtype, g)


class Affine(NamedTuple):
    """``norm(x) = scale·x + shift`` per channel, and what it was made of."""

    mean: Tensor
    inverse: Tensor  # 1/√(σ² + eps)
    scale: Tensor
    shift: Tensor


class ThroughStatistics:
    """``A + B·(x − μ)`` per channel: the gradient that reaches x through its batch statistics, over all readers."""

    def __init__(self, mean: Tensor, count: Tensor, group: str) -> None:
        self.mean, self.count, self.group = mean, count, group
        self.sums = mean.new_zeros((2, len(mean)))  # A·M and B·M of this process
        self.empty = True

    def add(self, affine: Affine, g: Tensor, g_centred: Tensor) -> None:
        """Take in a reader of the first channels, with its sums ``Σ g`` and ``Σ g·(x − μ)``."""
        self.empty = False
        constant, slope = self.sums.narrow(1, 0, g.shape[0])
        constant.addcmul_(affine.scale, g)
        slope.addcmul_(affine.scale * affine.inverse.square(), g_centred)

    def subtract(self, grad: Tensor, x: Tensor, channels: slice, out: Tensor) -> None:
        """``out = grad − A − B·(x − μ)`` for these channels, once all their readers are in."""
        if self.empty:  # no reader uses the batch's statistics
            out.copy_(grad)
            return
        constant, slope = all_sums(self.sums[:, channels], self.group) / self.count
        ops.backend(x).finish(grad, x, self.mean[channels], constant, slope, out)


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    """As `Tensor.to`, which takes its time even where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def rows(x: Tensor) -> int:
    """The values of each channel, in this process."""
    return x.numel() // x.shape[-1]


def blank(x: Tensor) -> Statistics:
    """Room for the statistics of each channel of ``x: (N, *spatial, C)``."""
    mean = x.new_zeros(x.shape[-1], dtype=statistics_dtype(x.dtype))
    return mean, torch.zeros_like(mean)
