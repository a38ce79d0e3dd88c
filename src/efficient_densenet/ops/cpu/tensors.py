"""Tensors as the kernels want them, and which kernels those are."""

from __future__ import annotations

from math import prod

from torch import Tensor

from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.cpu.library import load
from efficient_densenet.ops.layout import stride_of_rows
from efficient_densenet.ops.protocol import Affine


def own_convolution(x: Tensor, weight: Tensor) -> library.Kernels | None:
    """The kernels, where the whole operation is one of them: a 1×1 window, or 3×3 over images that are large enough.

    Where `instructions` says so, it takes half to nine tenths of the time of oneDNN and the passes around it.
    """
    loaded = load()
    if x.dtype not in loaded.convolves or weight.dtype != x.dtype or not x.shape[0]:
        return None
    if not (weight.is_contiguous() or weight.movedim(1, -1).is_contiguous()):  # nor channels-last
        return None
    assert loaded.kernels is not None
    kernels = loaded.kernels[x.dtype]
    if weight.shape[2:] == (3, 3):
        return kernels if kernels.suits(*x.shape[1:3]) else None
    return kernels if prod(weight.shape[2:]) == 1 else None


def convolution_of(x: Tensor, weight: Tensor) -> library.Convolution:
    """The taps of a window lie at equal distances, whether the weight is contiguous or channels-last."""
    n, height, width = x.shape[:3] if weight.dim() == 4 else (1, 1, x.numel() // x.shape[-1])
    return library.Convolution(
        n, height, width, weight.shape[-1], *weight.shape[:2], *weight.stride()[:2], weight.stride(-1)
    )


def kernels_for(x: Tensor) -> library.Kernels:
    """Those for activations of this type."""
    kernels = load().kernels
    assert kernels is not None
    return kernels[x.dtype]


def rows_of(x: Tensor) -> library.Rows:
    """A slice of the channels of a contiguous ``(n, *spatial, C)``."""
    stride = stride_of_rows(x.shape, x.stride())
    assert stride is not None, f"{x.shape} with strides {x.stride()} is no slice of channels"
    return library.Rows(x.data_ptr(), stride)


def affine_of(norm: Affine) -> library.Affine:
    mean, _, scale, shift = norm
    assert mean.is_contiguous() and scale.is_contiguous() and shift.is_contiguous()
    return library.Affine(mean.data_ptr(), scale.data_ptr(), shift.data_ptr())


def volume_of(x: Tensor, pool: int) -> library.Volume:
    """Of ``x: (n, *spatial, C)``, with a window of `pool` in each direction that there is."""
    missing = [1] * (5 - x.dim())
    return library.Volume(x.shape[0], *missing, *x.shape[1:-1], *missing, *[pool] * (x.dim() - 2))
