"""The convolutions between the fused passes, by PyTorch itself, and the form of their weights' gradients.

On a CPU they are oneDNN's. Where kernels of our own are faster, `cpu` does not come here.
"""

from __future__ import annotations

import functools
from math import prod

import torch
from torch import Tensor

from efficient_densenet.ops.layout import channels_first, channels_last

_aten = torch.ops.aten
_CHANNELS_PER_SUM = 64


def convolve(s: Tensor, weight: Tensor) -> Tensor:
    """``(n, *spatial, C)`` → ``(n, *spatial, O)``, contiguous; stride 1, padded so that the resolution stays."""
    return channels_last(_aten.convolution(channels_first(s), weight, None, *_geometry(weight))).contiguous()


def convolve_pooled(s: Tensor, weight: Tensor) -> Tensor:
    """`convolve` for a 1×1 window after an average pool, as a sum over groups of channels.

    In the ordinary network the pool comes after the convolution and averages its rounding errors too. Where it comes
    first, shorter sums make up for that.
    """
    groups = zip(s.split(_CHANNELS_PER_SUM, -1), weight.split(_CHANNELS_PER_SUM, 1), strict=True)
    return functools.reduce(torch.Tensor.add_, (convolve(*group) for group in groups))


def convolve_backward(grad_out: Tensor, s: Tensor, weight: Tensor, need_weight: bool) -> tuple[Tensor, Tensor]:
    """The gradients of `s`, contiguous, and of `weight` (undefined where it is not needed)."""
    g, grad_weight, _ = _aten.convolution_backward(
        channels_first(grad_out), channels_first(s), weight, None, *_geometry(weight), [True, need_weight, False]
    )
    return channels_last(g).contiguous(), grad_weight


def gradient_like(grad: Tensor | None, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient in its parameter's memory format, and in this type (None: the parameter's); zero if there is none."""
    if grad is None:
        return torch.zeros_like(parameter, dtype=dtype)
    same_type = grad.dtype == (parameter.dtype if dtype is None else dtype)
    if same_type and prod(parameter.shape[2:]) == 1 and grad.is_contiguous() and parameter.is_contiguous():
        return grad.as_strided(parameter.shape, parameter.stride())  # only strides of single pixels may differ
    return torch.empty_like(parameter, dtype=dtype).copy_(grad)


def _geometry(weight: Tensor) -> tuple:
    """Stride, padding, dilation, transposed, output padding and groups."""
    kernel = weight.shape[2:]
    ones = [1] * len(kernel)
    return ones, [k // 2 for k in kernel], ones, False, [0] * len(kernel), 1
