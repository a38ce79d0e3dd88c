"""How activations lie in memory, and the pieces of a batch that are worked on one after the other."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from math import ceil, prod

import torch
from torch import Tensor

# Bytes of the scratch tensor. A CPU's is to stay in the cache; elsewhere fewer, larger pieces are better.
SCRATCH = {"cpu": 4 << 20}
_SCRATCH_ELSEWHERE = 64 << 20


def pieces(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the images of ``x: (N, *spatial, C)``, each with a contiguous scratch tensor of its shape."""
    if not len(x):
        return
    bytes_per_image = max(1, prod(x.shape[1:]) * x.element_size())
    most = max(1, SCRATCH.get(x.device.type, _SCRATCH_ELSEWHERE) // bytes_per_image)
    parts = even_parts(len(x), most)
    step = parts[0].stop
    scratch = torch.empty((step, *x.shape[1:]), dtype=x.dtype, device=x.device)
    for images in parts:
        count = images.stop - images.start
        yield images, scratch[:count] if count < step else scratch


def even_parts(count: int, most: int) -> list[slice]:
    """Slices of at most `most` things, of nearly one length, that together are `count` things (at least one)."""
    step = ceil(count / ceil(count / most))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def row_stride(x: Tensor) -> int | None:
    """The distance between the rows of ``x: (N, *spatial, C)``, if it is a slice of the channels of a whole tensor."""
    return stride_of_rows(x.shape, x.stride())


@functools.lru_cache(maxsize=4096)  # a network asks for the same few, thousands of times
def stride_of_rows(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """As `row_stride`, for such a shape and strides."""
    if shape[-1] > 1 and strides[-1] != 1:
        return None
    distance, rows = shape[-1], 1
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size > 1:
            if rows == 1:
                distance = stride
            if stride != distance * rows:
                return None
            rows *= size
    return distance


def channels_first(x: Tensor) -> Tensor:
    """``(n, *spatial, C)`` as PyTorch's own operations want it: a view."""
    return x.movedim(-1, 1)


def channels_last(x: Tensor) -> Tensor:
    """The view back."""
    return x.movedim(1, -1)
