"""Activations in memory: channels-last here, and in the ordinary network perhaps not."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from efficient_densenet.ops.layout import pieces


def empty_activation(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """An empty ``(N, channels, *size)``, channels-last in memory; no view, for autograd forbids changing some views."""
    shape = (x.shape[0], *size, channels)
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    return x.new_empty_strided((shape[0], channels, *size), (strides[0], 1, *strides[1:-1]))


def empty_like(x: Tensor, channels: int | None = None) -> Tensor:
    """An empty tensor like ``x: (N, *spatial, C)``, contiguous, perhaps of other channels."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] if channels is None else channels))


def copied_when_written(x: Tensor) -> Tensor:
    """A copy of `x` that shares its memory until somebody writes into one of the two, and the other is still there."""
    if _can_share(x):
        try:
            return torch._lazy_clone(x)
        except RuntimeError:  # memory that another library allocated
            pass
    return x.clone()


def take_rows(given: list[Tensor], to_write: bool = False) -> Tensor:
    """``(N, *spatial, C)``, contiguous, of the ``(N, C, *spatial)`` that is taken out of a list of one.

    In the same memory, where that is possible: a contiguous tensor is reordered there, a few images at a time. But
    nobody who still has the tensor sees a change, nor, with `to_write`, a later one.
    """
    x = given.pop()
    rows = x.movedim(1, -1)
    if rows.is_contiguous():
        return copied_when_written(rows) if to_write else rows
    if len(x) == 1 or not (x.is_contiguous() and _can_share(x)):
        return rows.contiguous()
    x = copied_when_written(x)
    rows = x.view(rows.shape)  # the same memory, in the other order
    for images, scratch in pieces(rows):
        rows[images].copy_(scratch.copy_(x[images].movedim(1, -1)))
    return rows


def _can_share(x: Tensor) -> bool:
    """Whether PyTorch can copy it on write, and it is all of its memory. On a GPU this was never tried."""
    return x.device.type == "cpu" and x.untyped_storage().nbytes() == x.numel() * x.element_size()


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x: (N, C, *spatial)``, or a convolution's weight, is for PyTorch: it then makes activations that are.

    It never is with one spatial dimension, for which PyTorch has no such layout.
    """
    return x.dim() > 3 and x.stride(1) == 1 and x.stride(-1) >= x.shape[1]
