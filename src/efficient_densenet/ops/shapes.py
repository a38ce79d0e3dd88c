"""The operations of `Backend` for tensors without values: they allocate what the backends do, and compute nothing.

What is allocated, and when, is that of `cpu`: nothing where one of its kernels is the whole operation; elsewhere a
piece of the rectified prefix, and PyTorch's convolution of it. Two pieces stand for all: none is larger, and what one
has made is there until the next one has made its own.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from efficient_densenet.ops.convolution import convolve, convolve_backward
from efficient_densenet.ops.cpu.tensors import own_convolution
from efficient_densenet.ops.layers import Layers, LayersBackward
from efficient_densenet.ops.layout import pieces
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics


def fold_norm(statistics: Statistics, weight: Tensor, bias: Tensor, eps: float, into: Affine) -> None:
    pass


def norm_relu_conv(
    x: Tensor, norm: Affine, weight: Tensor, out: Tensor, pool: int = 1, into: Statistics | None = None
) -> None:
    if pool == 1 and own_convolution(x, weight) is not None:
        return
    for _, scratch in islice(pieces(x), 2):
        s = _pooled(scratch, pool)
        if pool == 1 or own_convolution(s, weight) is None:
            made = convolve(s, weight)  # noqa: F841


def norm_relu_conv_backward(operands: BackwardOperands) -> tuple[Tensor | None, Tensor, Tensor]:
    _, x, norm, weight, _, _, _, pool, need_weight = operands
    if pool > 1 or own_convolution(x, weight) is None:
        for images, scratch in islice(pieces(x), 2):
            s, grad = _pooled(scratch, pool), operands.grad_out[images]
            own = pool > 1 and own_convolution(s, weight) is not None
            made = torch.empty_like(s) if own else convolve_backward(grad, s, weight, need_weight)  # noqa: F841
    return torch.empty_like(weight) if need_weight else None, *_of_norm(norm)


def norm_relu_max_pool(x: Tensor, norm: Affine, out: Tensor) -> None:
    pass


def norm_relu_max_pool_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    grad_out.new_empty(grad_out.shape, dtype=torch.uint8)  # the argmax of each window
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


def run_layers(layers: Layers, fold: bool, measure: bool) -> int:
    """All of them, as far as shapes can tell: the native call allocates no tensors."""
    return len(layers.readers) // layers.per_layer


def run_layers_backward(layers: Layers, operands: LayersBackward) -> int:
    return len(layers.readers) // layers.per_layer - operands.start


def _pooled(scratch: Tensor, pool: int) -> Tensor:
    """The prologue of a piece: in the scratch tensor, or, after a pool, in one of its own."""
    n, *spatial, channels = scratch.shape
    return scratch if pool == 1 else scratch.new_empty((n, *(size // pool for size in spatial), channels))


def _of_norm(norm: Affine) -> tuple[Tensor, Tensor]:
    """The gradients of a norm's weight and bias."""
    return torch.empty_like(norm.scale), torch.empty_like(norm.shift)
