"""The convolutions between the fused passes, by PyTorch itself.

On a CPU they are oneDNN's. Where kernels of our own are faster, `cpu` does not come here.
"""

from __future__ import annotations

import functools

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


def _geometry(weight: Tensor) -> tuple:
    """Stride, padding, dilation, transposed, output padding and groups."""
    kernel = weight.shape[2:]
    ones = [1] * len(kernel)
    return ones, [k // 2 for k in kernel], ones, False, [0] * len(kernel), 1
