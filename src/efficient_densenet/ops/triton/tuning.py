"""The fastest of some tiles, timed at the first use of each kind of shape: with EFFICIENT_DENSENET_AUTOTUNE=1."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from efficient_densenet.ops.triton import launch
from efficient_densenet.ops.triton.tiles import Product, Tile

AUTOTUNE = os.environ.get("EFFICIENT_DENSENET_AUTOTUNE", "0") not in ("", "0")


def tuned(default: Tile, attempt: Callable[[Tile], Any], name: str, x: Tensor, of: Product) -> Tile:
    """`default`, or where tuning is on the fastest of the tiles around it for such shapes.

    Shapes are told apart by their size and channels in powers of two. While a CUDA graph is captured nothing is timed,
    but what was found before is used. `attempt` runs many times: it must not add to a result.
    """
    if not AUTOTUNE or isinstance(x, FakeTensor):
        return default
    size = x.numel().bit_length(), of.channels.bit_length()
    key = name, x.device, x.dtype, size, of._replace(rows=0, channels=0)
    if key not in _found:
        if torch.cuda.is_current_stream_capturing():
            return default
        tiles = [tile for tile in _around(default) if name != "grad_x_pointwise" or tile.depth >= of.outputs]
        if name == "grad_weight":
            tiles += [replace(default, minimum_steps=steps) for steps in (4, 2)]
        _found[key] = min(tiles, key=lambda tile: _milliseconds(attempt, tile, x.device))
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
        for stages in (1, 2, 3, 4)
    ]


def _milliseconds(attempt: Callable[[Tile], Any], tile: Tile, device: torch.device) -> float:
    from triton.testing import do_bench

    def once() -> None:
        with launch.operation(device):
            attempt(tile)

    try:
        return do_bench(once, warmup=5, rep=20)
    except launch.CannotStart:
        return inf
