"""The operations of `Backend` for tensors without values: they allocate what they return, and compute nothing.

Where a convolution is PyTorch's, they also allocate the workspace that it has on a CPU: a piece of the rectified prefix
and its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_densenet.ops import cpu
from efficient_densenet.ops.convolution import pieces
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics


def fold_norm(statistics: Statistics, weight: Tensor, bias: Tensor, eps: float, into: Affine) -> None:
    pass


def norm_relu_conv(
    x: Tensor, norm: Affine, weight: Tensor, out: Tensor, pool: int = 1, into: Statistics | None = None
) -> None:
    pass


def norm_relu_conv_backward(operands: BackwardOperands) -> tuple[Tensor | None, Tensor, Tensor]:
    if operands.pool > 1 or cpu.own_convolution(operands.x, operands.weight) is None:
        for _, scratch in pieces(operands.x):
            torch.empty_like(scratch)
            break  # the others are not larger
    grad_weight = torch.empty_like(operands.weight) if operands.need_weight else None
    return grad_weight, *_of_norm(operands.norm)


def norm_relu_max_pool(x: Tensor, norm: Affine, out: Tensor) -> None:
    pass


def norm_relu_max_pool_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _of_norm(norm)


def norm_relu_mean(x: Tensor, norm: Affine, out: Tensor) -> None:
    pass


def norm_relu_mean_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _of_norm(norm)


def statistics(x: Tensor, into: Statistics) -> None:
    pass


def finish(grad: Tensor, x: Tensor, mean: Tensor, through: Tensor, count: Tensor, out: Tensor) -> None:
    pass


def _of_norm(norm: Affine) -> tuple[Tensor, Tensor]:
    """The gradients of a norm's weight and bias."""
    return torch.empty_like(norm.scale), torch.empty_like(norm.shift)
