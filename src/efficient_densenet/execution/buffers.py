"""Room for activations: channels-last in memory, and on a CPU in large pages."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # of Linux


def room(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """An empty ``(N, channels, *size)``, channels-last in memory, and no view, which could not be changed in place."""
    shape = (x.shape[0], *size, channels)
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    return _in_huge_pages(x.new_empty_strided((shape[0], channels, *size), (strides[0], 1, *strides[1:-1])))


def beside(x: Tensor, channels: int | None = None) -> Tensor:
    """An empty tensor like ``x: (N, *spatial, C)``, contiguous, perhaps of other channels."""
    return _in_huge_pages(x.new_empty((*x.shape[:-1], x.shape[-1] if channels is None else channels)))


def _in_huge_pages(x: Tensor) -> Tensor:
    """Ask for pages of 2 MB for a large tensor on a CPU.

    The C library gives large blocks back to the system as soon as they are free, so that every step meets its memory
    for the first time: at 4 kB a page fault, that is a tenth of a step.
    """
    if type(x) is torch.Tensor and x.device.type == "cpu" and x.nbytes >= 2 * _HUGE_PAGE:
        begin = -(-x.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (x.data_ptr() + x.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        _advise()(begin, end - begin, _MADV_HUGEPAGE)  # advice: it may be declined
    return x


@functools.cache
def _advise() -> Callable[[int, int, int], int]:
    if not sys.platform.startswith("linux"):
        return lambda begin, length, advice: 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
