"""Tile sizes: a small table by kind of kernel, shape and device.

None of these has been timed on a GPU. They follow from the shapes: a tile is as wide as the channels that it makes, so
that few channels do not waste the tensor cores; it is tall enough to use each weight often; its accumulators fit into
the registers without spilling, and its stages into the shared memory of the smallest device covered (about 99 kB).
Set EFFICIENT_DENSENET_AUTOTUNE=1 to have them timed, once per kind of shape and process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor

AUTOTUNE = os.environ.get("EFFICIENT_DENSENET_AUTOTUNE", "0") not in ("", "0")
# Row blocks of a weight gradient are chosen so that about so many programs run: two for each multiprocessor of the
# largest devices. A constant, so that the order of the sums depends on shapes alone.
_PROGRAMS = 264


@dataclass(frozen=True)
class Tile:
    """Rows and columns that a program makes, how deep it multiplies at a time, its warps and its pipeline's stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def sizes(self) -> dict[str, int]:
        """As the kernels name them; what a kernel does not have is 0."""
        named = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}
        return {name: size for name, size in named.items() if size}


ALONG = Tile(0, 1024, 0, 4, 1)
"""For the merging of a channel's partial results."""

SUM_PARTS = Tile(16, 128, 0, 4, 1)


BY_PYTORCH: frozenset[tuple[str, int]] = frozenset()
"""What cuDNN does better: "forward" or "backward" with the number of taps of the kernel, such as ("forward", 9).

Unmeasured, and so empty. To be faster, it would have to make up for writing the rectified prefix to a scratch and
reading it again, and for reading the output once more for its statistics.
"""


def precision(x: Tensor) -> str:
    """How float32 is multiplied: in TF32 where PyTorch's convolutions would do that too, else exactly."""
    if x.dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def elementwise(channels: int, values: int = 4096) -> Tile:
    """For passes without a product."""
    columns = _cover(channels, 16, 64)
    return Tile(values // columns, columns, 0, 4, 1)


def forward(x: Tensor, outputs: int, pool: int) -> Tile:
    """Columns are outputs, depth is channels; a pool holds several tiles of x at a time, and so takes flatter ones."""
    if _exact(x):
        return Tile(64, _cover(outputs, 16, 64), 16, 8, 2)
    depth = 32 if pool == 1 or x.element_size() == 2 else 16
    columns = _cover(outputs, 16, 128)
    return Tile(128, columns, _cover(x.shape[-1], 16, depth), 8 if columns == 128 else 4, _stages(x))


def grad_x(x: Tensor, outputs: int, taps: int) -> Tile:
    """Columns are channels, depth is outputs. Its epilogue needs the registers of a second accumulator."""
    columns = _cover(x.shape[-1], 16, 64)
    if _exact(x):
        return Tile(64, columns, 16, 8, 2)
    rows = 64 if taps > 9 and x.element_size() == 4 else 128
    return Tile(rows, columns, _cover(outputs, 16, 32), 8 if columns == 64 else 4, _stages(x))


def grad_weight(x: Tensor, outputs: int, taps: int) -> Tile:
    """Rows are taps and outputs together, columns are channels, depth is pixels."""
    if _exact(x):
        return Tile(_cover(taps * outputs, 16, 64), _cover(x.shape[-1], 16, 32), 16, 4, 2)
    rows, columns = _cover(taps * outputs, 16, 128), _cover(x.shape[-1], 16, 128 if x.element_size() == 2 else 64)
    return Tile(rows, columns, 32, 8 if rows * columns >= 64 * 128 else 4, _stages(x))


def rows_per_part(rows: int, products: int, depth: int) -> int:
    """The rows that a program of a weight gradient adds up, where one pass over them makes `products` tiles."""
    parts = ceil(_PROGRAMS / products)
    return max(8, ceil(rows / parts / depth)) * depth


def tuned(
    default: Tile, attempt: Callable[[Tile], Any], name: str, x: Tensor, outputs: int, taps: Sequence[int], pool: int
) -> Tile:
    """`default`, or where tuning is on the fastest of the tiles around it for such shapes.

    Shapes are told apart by their size and channels in powers of two. While a CUDA graph is captured nothing is timed,
    but what was found before is used. `attempt` runs many times: it must not add to a result.
    """
    if not AUTOTUNE:
        return default
    key = name, x.device, precision(x), x.dtype, x.numel().bit_length(), x.shape[-1].bit_length(), outputs, *taps, pool
    if key not in _found:
        if torch.cuda.is_current_stream_capturing():
            return default
        _found[key] = min(_around(default), key=lambda tile: _milliseconds(attempt, tile))
    return _found[key]


_found: dict[tuple, Tile] = {}


def _around(tile: Tile) -> list[Tile]:
    shapes = {
        (tile.rows, tile.columns),
        (max(16, tile.rows // 2), tile.columns),
        (tile.rows, max(16, tile.columns // 2)),
    }
    depths = {tile.depth, max(16, tile.depth // 2), min(64, tile.depth * 2)}
    return [tile] + [
        Tile(rows, columns, depth, warps, stages)
        for rows, columns in sorted(shapes)
        for depth in sorted(depths)
        for warps in (4, 8)
        for stages in (2, 3, 4)
    ]


def _milliseconds(attempt: Callable[[Tile], Any], tile: Tile) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(lambda: attempt(tile), warmup=5, rep=20)
    except OutOfResources:
        return inf


def _cover(size: int, least: int, most: int) -> int:
    """The power of two that covers `size`, or its even share of the fewest tiles of `most`."""
    share = ceil(size / ceil(size / most))
    return max(least, 1 << (share - 1).bit_length())


def _exact(x: Tensor) -> bool:
    """Without tensor cores, where a product's operands take registers too."""
    return x.dtype == torch.float32 and precision(x) == "ieee"


def _stages(x: Tensor) -> int:
    """More of half precision fit; devices before sm_90 other than sm_80 have 99 kB of shared memory, others more."""
    return 3 if x.element_size() == 2 else 2
