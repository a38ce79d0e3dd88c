"""Activations in memory: channels-last here, and in the ordinary network perhaps not."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor


def empty_activation(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """An empty ``(N, channels, *size)``, channels-last in memory, and no view, which could not be changed in place."""
    shape = (x.shape[0], *size, channels)
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    return x.new_empty_strided((shape[0], channels, *size), (strides[0], 1, *strides[1:-1]))


def empty_like(x: Tensor, channels: int | None = None) -> Tensor:
    """An empty tensor like ``x: (N, *spatial, C)``, contiguous, perhaps of other channels."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] if channels is None else channels))


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x: (N, C, *spatial)``, or a convolution's weight, is for PyTorch: it then makes activations that are.

    It never is with one spatial dimension, for which PyTorch has no such layout.
    """
    return x.dim() > 3 and x.stride(1) == 1 and x.stride(-1) >= x.shape[1]
