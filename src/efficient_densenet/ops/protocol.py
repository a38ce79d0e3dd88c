"""The operations that a dense block is made of, which every backend has, and what they work on.

Layout: activations are channels-last matrices ``(N, *spatial, C)`` with 1, 2 or 3 spatial dimensions. An activation may
be a slice of the channels of a larger tensor (its rows are then further apart than ``C``); weights are PyTorch's
``(out channels, in channels, *kernel)``, stride 1, padded by half the kernel, so that the resolution stays. What there
is one of per channel, statistics and sums, has shape ``(C,)``, in the type that `statistics_dtype` says.

The rectified prefix ``s = relu(scale·x + shift)`` is the prologue of every operation, and is never stored: backward
computes it again from `x`. The mathematics is derived in docs/algorithm.md.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics and sums of activations of this type are held."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Statistics(NamedTuple):
    """Mean and biased variance of each channel, ``(C,)`` each."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def merged(cls, means: Tensor, variances: Tensor, counts: Tensor) -> Statistics:
        """The statistics of several parts together, from those of the parts (Chan, Golub, LeVeque, 1979).

        Squares of differences alone are summed, so nothing cancels.

        Args:
            means, variances: ``(parts, C)``.
            counts: ``(parts,)``, values per channel of each part.
        """
        share = (counts / counts.sum()).unsqueeze(1)
        mean = (share * means).sum(0)
        return cls(mean, (share * (variances + (means - mean).square())).sum(0))


class Affine(NamedTuple):
    """A batch norm of given statistics, ``norm(x) = scale·x + shift``, and what it was made of: ``(C,)`` each."""

    mean: Tensor
    inverse: Tensor  # 1/√(σ² + eps)
    scale: Tensor
    shift: Tensor


class BackwardOperands(NamedTuple):
    """What the backward pass of a norm–relu–convolution reads and writes.

    Attributes:
        grad_out: ``(N, *spatial // pool, O)``, the gradient of the output.
        x, norm, weight: as in the forward pass: ``(N, *spatial, C)``, ``(C,)`` each, ``(O, C, *kernel)``.
        grad_x: of the shape of `x`; the gradient is added to it, or overwrites it.
        accumulate: whether it is added.
        through: ``(2, C)``; to it ``scale·Σ g`` and ``scale·inverse²·Σ g·(x − mean)`` are added, the gradient that
            flows through the batch statistics, see `Backend.finish`; None where the statistics are constants.
        pool: window and stride of the average pool; 1: none.
        need_weight: whether the gradient of the weight is wanted.
    """

    grad_out: Tensor
    x: Tensor
    norm: Affine
    weight: Tensor
    grad_x: Tensor
    accumulate: bool
    through: Tensor | None
    pool: int = 1
    need_weight: bool = True

    def clear_outside_windows(self) -> None:
        """Set `grad_x` to zero, unless it is added to, where there are pixels beyond the last whole window of the pool.

        No gradient reaches them: kernels that go through the windows do not touch them.
        """
        if not self.accumulate and any(size % self.pool for size in self.x.shape[1:-1]):
            self.grad_x.zero_()


class Backend(Protocol):
    """The operations; a backend is a module with these functions. They return small tensors and write large ones."""

    def fold_norm(self, statistics: Statistics, weight: Tensor, bias: Tensor, eps: float, into: Affine) -> None:
        """``inverse = 1/√(σ² + eps)``, ``scale = weight·inverse``, ``shift = bias − μ·scale``; they overwrite `into`.

        Shapes: all ``(C,)``; statistics, weight and bias may be of any floating types.
        """

    def norm_relu_conv(
        self, x: Tensor, norm: Affine, weight: Tensor, out: Tensor, pool: int = 1, into: Statistics | None = None
    ) -> None:
        """``out = conv(average_pool(relu(scale·x + shift)))``; the statistics of `out` overwrite `into`, if given.

        A 1×1 convolution and an average pool commute; pooling first spares three quarters of the multiplications.

        Shapes: x ``(N, *spatial, C)``, norm ``(C,)`` each, weight ``(O, C, *kernel)``, out
        ``(N, *spatial // pool, O)``, where `pool` is window and stride of the average pool; 1: none.
        """

    def norm_relu_conv_backward(self, operands: BackwardOperands) -> tuple[Tensor | None, Tensor, Tensor]:
        """The backward pass of `norm_relu_conv`, short of what flows through the batch statistics: see `finish`.

        With ``g`` the gradient at the rectifier's input (zero where it cut off): ``grad_x += scale·g`` (or ``=``).

        Returns:
            The gradients of the convolution's weight (None if not needed), and of the norm's weight and bias:
            ``inverse·Σ g·(x − mean)`` and ``Σ g``.
        """

    def norm_relu_max_pool(self, x: Tensor, norm: Affine, out: Tensor) -> None:
        """``out = max_pool(relu(scale·x + shift))`` with window 3, stride 2, padding 1: an ImageNet network's stem.

        Shapes: x ``(N, *spatial, C)``, out ``(N, *⌈spatial/2⌉, C)``.
        """

    def norm_relu_max_pool_backward(
        self, grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The backward pass of `norm_relu_max_pool`, as `norm_relu_conv_backward` is: ``grad_x = scale·g``."""

    def norm_relu_mean(self, x: Tensor, norm: Affine, out: Tensor) -> None:
        """``out = mean over all pixels of relu(scale·x + shift)``: the head of a network, before its classifier.

        Shapes: x ``(N, *spatial, C)``, out ``(N, C)``.
        """

    def norm_relu_mean_backward(
        self, grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The backward pass of `norm_relu_mean`, as `norm_relu_conv_backward` is: ``grad_x = scale·g``."""

    def statistics(self, x: Tensor, into: Statistics) -> None:
        """Mean and biased variance of each channel of ``x: (N, *spatial, C)``, which overwrite `into`."""

    def finish(self, grad: Tensor, x: Tensor, mean: Tensor, through: Tensor, count: Tensor, out: Tensor) -> None:
        """Subtract what flows through the batch statistics of some channels: ``out = grad − A − B·(x − mean)``.

        ``A = Σ scale·Σg / M`` and ``B = Σ scale·inverse²·Σg·(x − mean) / M``, over all norms that read these channels,
        each from statistics of M values; `out` may be `grad` itself.

        Shapes: grad, x and out ``(N, *spatial, C)``, mean ``(C,)``; through ``(2, C)``: ``A·M`` and ``B·M``, added up
        by all readers; count ``()``: M.
        """
