"""Tile sizes: a small table by kind of kernel, shape and device.

A tile is as wide as the channels that it makes, so that few channels do not waste the tensor cores; it is tall enough
to use each weight often; its accumulators fit into the registers without spilling, and its stages into the shared
memory of the device. On Hopper tiles, warps and stages are those that were the fastest of some hundred, timed on an
H200 at the shapes of DenseNet-121 and of L = 40, k = 12 (docs/gpu.md); elsewhere none has been timed.
`tuning` has them timed on the device at hand instead.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor


class Device(NamedTuple):
    """What about a device decides on tiles.

    Constants for each kind of device, so that the order of the sums depends on it and on shapes alone.

    Attributes:
        stages: of a product's pipeline, in half precision; one less in float32, which is twice as large.
        programs: two for each multiprocessor. A weight's gradient is split into so many.
        widest: tile of a product, in columns.
        warp_groups: whether products are those of Hopper.
    """

    stages: int
    programs: int
    widest: int = 128
    warp_groups: bool = False


DEVICES = {(8, 0): Device(4, 216), (9, 0): Device(4, 264, warp_groups=True)}
"""By compute capability: A100 with 163 kB of shared memory for a program, H100 and H200 with 227 kB."""

OTHER = Device(3, 264)
"""What fits every other device of NVIDIA's that is covered: 99 kB."""

ROCM = Device(2, 264, widest=64)
"""64 kB of local memory for a program, and registers for half as wide a tile."""


@dataclass(frozen=True)
class Tile:
    """Rows and columns that a program makes, how deep it multiplies at a time, its warps and its pipeline's stages.

    Attributes:
        minimum_steps: of a program of a weight's gradient. The compiler does not see it. Where pixels are few,
            fewer steps make more programs, and more partial sums; which is faster was timed nowhere.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    minimum_steps: int = 8

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """As the kernels name them; what a kernel does not have is 0."""
        named = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}
        return {name: size for name, size in named.items() if size}


ALONG = Tile(0, 1024, 0, 4, 1)
"""For the merging of a channel's partial results."""

SUM_PARTS = Tile(16, 128, 0, 4, 1)


def precision(x: Tensor) -> str:
    """How float32 is multiplied: in TF32 where PyTorch's convolutions would do that too, else exactly."""
    if x.dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


@functools.cache
def device_of(device: torch.device) -> Device:
    """Its line in the table."""
    if device.type == "cuda" and torch.version.hip is not None:
        return ROCM
    if device.type == "cuda":
        return DEVICES.get(torch.cuda.get_device_capability(device), OTHER)
    return OTHER


class Product(NamedTuple):
    """What decides on a product's tile: rows, channels read and made, taps of the window, pool, type and device."""

    rows: int
    channels: int
    outputs: int
    taps: int
    pool: int
    half: bool
    precision: str
    device: Device

    @property
    def exact(self) -> bool:
        """Without tensor cores, where a product's operands take registers too."""
        return not self.half and self.precision == "ieee"

    @property
    def stages(self) -> int:
        return self.device.stages - (not self.half)


def product(x: Tensor, outputs: int, taps: int, pool: int) -> Product:
    rows = prod([n // pool for n in x.shape[1:-1]], start=x.shape[0])
    return Product(rows, x.shape[-1], outputs, taps, pool, x.element_size() == 2, precision(x), device_of(x.device))


@functools.cache
def elementwise(channels: int, values: int = 4096) -> Tile:
    """For passes without a product."""
    columns = _cover(channels, 16, 64)
    return Tile(values // columns, columns, 0, 4, 1)


@functools.lru_cache(maxsize=4096)
def forward(of: Product) -> Tile:
    """Columns are outputs, depth is channels.

    A pool holds several tiles of x at a time, and so needs flatter ones; so do channels that are loaded one by one. A
    window's x comes rectified, so that nothing is computed in the loop: fewer and larger steps.
    """
    if of.exact:
        return Tile(64, _cover(of.outputs, 16, 64 if of.pool == 1 else 32), 16, 8, 2)
    columns, stages = _cover(of.outputs, 16, of.device.widest), of.stages
    depth = 32 if of.pool == 1 and of.channels % (2 if of.half else 4) == 0 else 16
    if of.half and depth == 32 and (of.taps > 1 or (of.device.warp_groups and of.channels % 4 == 0)):
        depth, stages = 64, stages - 1
    rows = 128
    if of.device.warp_groups and ceil(of.rows / rows) * ceil(of.outputs / columns) < of.device.programs // 2:
        rows = 64  # or multiprocessors would have nothing to do
    return Tile(rows, columns, _cover(of.channels, 16, depth), _warps(of, columns == of.device.widest), stages)


@functools.lru_cache(maxsize=4096)
def grad_x(of: Product) -> Tile:
    """Columns are channels, depth is outputs. Its epilogue needs the registers of a second accumulator."""
    if of.exact:
        return Tile(64, _cover(of.channels, 16, 64), 16, 8, 2)
    columns, stages, rows = 64, of.stages, 64 if of.taps > 9 and not of.half else 128
    if of.device.warp_groups and of.taps > 1:
        stages = 4
        if not of.half:
            columns = 32
        elif of.rows >= 1024 * rows:
            columns, stages = 128, 3
    columns = _cover(of.channels, 16, columns)
    return Tile(rows, columns, _cover(of.outputs, 16, 32), _warps(of, columns >= 64), stages)


@functools.lru_cache(maxsize=4096)
def grad_x_pointwise(of: Product) -> Tile | None:
    """Columns are channels, depth is all outputs. None where `grad_x` is better: where no product reads its weights
    from shared memory, they would have to stay in registers."""
    depth = _cover(of.outputs, 16, 256)
    if of.taps > 1 or of.pool > 1 or of.exact or not of.device.warp_groups or of.outputs > depth:
        return None
    return Tile(32, _cover(of.channels, 16, 64), depth, 4, of.stages - 1)


@functools.lru_cache(maxsize=4096)
def grad_weight(of: Product) -> Tile:
    """Rows are taps and outputs together, columns are channels, depth is pixels."""
    lines = of.taps * of.outputs
    if of.exact:
        return Tile(_cover(lines, 16, 64), _cover(of.channels, 16, 32), 16, 4, 2)
    wide = of.half
    if of.device.warp_groups:  # where outputs take several blocks of rows, x is read and rectified again for each
        wide = of.taps > 1 or (of.half and of.pool == 1 and of.outputs > of.device.widest)
    rows, columns = _cover(lines, 16, of.device.widest), _cover(of.channels, 16, of.device.widest if wide else 64)
    warps = _warps(of, rows * columns >= 64 * of.device.widest)
    if of.half and of.pool == 1 and of.device.warp_groups:
        return Tile(rows, columns, 64, warps, of.stages - (columns > 64))
    return Tile(rows, columns, 32, warps, of.stages)


def rows_per_part(rows: int, products: int, tile: Tile, device: Device) -> int:
    """The rows that a program of a weight gradient adds up, where one pass over them makes `products` tiles."""
    parts = ceil(device.programs / products)
    return max(tile.minimum_steps, ceil(rows / parts / tile.depth)) * tile.depth


def _warps(of: Product, large: bool) -> int:
    """Of a product's tile: on Hopper a warp group, of which several then run on a multiprocessor."""
    return 8 if large and not of.device.warp_groups else 4


def _cover(size: int, least: int, most: int) -> int:
    """The power of two that covers `size`, or its even share of the fewest tiles of `most`."""
    share = ceil(size / ceil(size / most))
    return max(least, 1 << (share - 1).bit_length())
