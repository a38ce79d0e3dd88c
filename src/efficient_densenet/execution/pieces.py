"""Pieces of a batch: some images, or, where a single one is too large, some of its lines (of a volume, planes)."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.ops.layout import even_parts

# Bytes of the tensor that is cut. A CPU's piece is to stay in a cache. Elsewhere fewer, larger pieces are better: on a
# GPU, 256 images are one. By then the blocks' memory, several times as much, is free again.
_MOST = {"cpu": 8 << 20}
_MOST_ELSEWHERE = 512 << 20
# Bytes of pieces and of their gradients that are held for their second use, at most; also at most so many times the
# bytes of the first block's input. The backward pass of that block has just freed as much: its features and their
# gradient, which are at least twice as wide as its input.
_HELD = {"cpu": 64 << 20}
_HELD_ELSEWHERE = 2 << 30
_HELD_TIMES = 4


class Piece(NamedTuple):
    """A part of a tensor ``(N, lines, …, C)`` and of what a max pool of window 3, stride 2 and padding 1 makes of it.

    Every line, and every line of the pool's output, belongs to one piece. So that the windows of the piece are whole,
    and are those of a pool of the piece by itself, it begins two lines before those that belong to it, unless it is the
    first of its image: the first window that this makes belongs to the piece before.

    Attributes:
        images: which.
        lines: which of them, those in front included.
        front: how many lines there are in front: 0 or 2.
        windows: lines of the pool's output that belong to it.
    """

    images: slice
    lines: slice
    front: int
    windows: slice


def pieces(shape: Sequence[int], dtype: torch.dtype, device: torch.device, by_lines: bool = True) -> list[Piece]:
    """Those of a tensor of this shape, ``(N, lines, …, C)``, in their order; whole images, unless `by_lines`."""
    images, lines = shape[:2]
    if not prod(shape):
        return []
    most = _MOST.get(device.type, _MOST_ELSEWHERE) // dtype.itemsize
    per_image = prod(shape[1:])
    if per_image <= most or not by_lines:
        windows = slice(0, ceil(lines / 2) if by_lines else lines)
        return [Piece(some, slice(0, lines), 0, windows) for some in even_parts(images, max(1, most // per_image))]
    found = []
    for image in range(images):
        for windows in even_parts(ceil(lines / 2), max(1, most // (2 * per_image // lines))):
            front = 2 if windows.start else 0
            some = slice(2 * windows.start - front, min(lines, 2 * windows.stop))
            found.append(Piece(slice(image, image + 1), some, front, windows))
    return found


def held_values(grad_out: Tensor) -> int:
    """How many values of pieces and of their gradients may wait for their second use; two pieces always may.

    Args:
        grad_out: the gradient of what the pool makes, which is the input of the first block.
    """
    kind, size = grad_out.device.type, grad_out.element_size()
    most = min(_HELD.get(kind, _HELD_ELSEWHERE), _HELD_TIMES * grad_out.numel() * size)
    return max(2 * _MOST.get(kind, _MOST_ELSEWHERE), most) // size
