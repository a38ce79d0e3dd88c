"""Tile sizes: a small table by kind of kernel, shape and device.

None of these has been timed on a GPU. They follow from the shapes: a tile is as wide as the channels that it makes, so
that few channels do not waste the tensor cores; it is tall enough to use each weight often; its accumulators fit into
the registers without spilling, and its stages into the shared memory of the device.
`tuning` has them timed instead.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Device(NamedTuple):
    """What about a device decides on tiles, and which of several ways it goes.

    Constants for each kind of device, so that the order of the sums depends on it and on shapes alone.

    Attributes:
        stages: of a product's pipeline, in half precision; one less in float32, which is twice as large.
        programs: two for each multiprocessor. A weight's gradient is split into so many.
        widest: tile of a product, in columns.
        warp_groups: whether products are those of Hopper.
        windows: where a convolution with a window gets its rectified x: "fused" computes it for each tap, "rectified"
            before the product in a pass of its own, and "cudnn" leaves the product to cuDNN, which wants that too.
        windows_backward: "fused" or "cudnn".
        widest_prefix: tile of a prefix's gradient through a window in half precision, in channels.
        pixels: that a weight's gradient without a pool multiplies at a time in a wide tile, in half precision.
        finishes: whether the gradient of a bottleneck's output is finished in the kernel of its prefix's gradient,
            up to `widest` outputs: a program has a block of rows and all channels.
        least_rows: of a tile whose grid would have fewer than `programs`.
    """

    stages: int
    programs: int
    widest: int = 128
    warp_groups: bool = False
    windows: str = "fused"
    windows_backward: str = "fused"
    widest_prefix: int = 64
    pixels: int = 32
    finishes: bool = False
    least_rows: int = 128

    def changed(self, *candidates: str) -> Device:
        """With the changes of these `CANDIDATES`."""
        return self._replace(**{field: value for name in candidates for field, value in CANDIDATES[name].items()})


CANDIDATES: dict[str, dict[str, Any]] = {
    "rectified": {"windows": "rectified"},
    "cudnn forward": {"windows": "cudnn"},
    "cudnn backward": {"windows_backward": "cudnn"},
    "wide prefix": {"widest_prefix": 128},
    "64 pixels": {"pixels": 64},
    "finishing": {"finishes": True},
    "64 rows": {"least_rows": 64},
}
"""What may be better than a device's line, as changes of it; ``benchmarks/gpu.py`` measures each beside the line.

Off until a GPU has shown that it is faster there: then it belongs into the line. docs/gpu.md says what is expected.
"""

OURS = ("rectified", "wide prefix", "64 pixels", "finishing", "64 rows")
CUDNN = ("cudnn forward", "cudnn backward", "64 pixels", "finishing", "64 rows")
"""Candidates that go together: products of ours, and those with a window by cuDNN."""

DEVICES = {(8, 0): Device(4, 216), (9, 0): Device(4, 264, warp_groups=True)}
"""By compute capability: A100 with 163 kB of shared memory for a program, H100 and H200 with 227 kB."""

OTHER = Device(3, 264)
"""What fits every other device of NVIDIA's that is covered: 99 kB."""

ROCM = Device(2, 264, widest=64)
"""64 kB of local memory for a program, and registers for half as wide a tile."""


@dataclass(frozen=True)
class Tile:
    """Rows and columns that a program makes, how deep it multiplies at a time, its warps and its pipeline's stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

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
    """Its line in the table, with what `choose` chose."""
    line = OTHER
    if device.type == "cuda" and torch.version.hip is not None:
        line = ROCM
    elif device.type == "cuda":
        line = DEVICES.get(torch.cuda.get_device_capability(device), OTHER)
    return line.changed(*_chosen)


def choose(*candidates: str) -> None:
    """From now on in this process, let every device's line have the changes of these: to compare and measure them."""
    _chosen[:] = candidates
    device_of.cache_clear()


_chosen: list[str] = []


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
    def rectified(self) -> bool:
        """Whether x is rectified before the forward product, by a pass of its own."""
        return self.taps > 1 and self.device.windows != "fused"

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

    A pool holds several tiles of x at a time, and so needs flatter ones; so do channels that are loaded one by one.
    """
    if of.exact:
        return Tile(64, _cover(of.outputs, 16, 64 if of.pool == 1 else 32), 16, 8, 2)
    depth = 32 if of.pool == 1 and of.channels % (2 if of.half else 4) == 0 else 16
    columns = _cover(of.outputs, 16, of.device.widest)
    rows = _rows(128, of, ceil(of.outputs / columns))
    stages = of.stages
    if of.rectified and of.half:  # nothing is computed in the loop: fewer and larger steps
        depth, stages = 2 * depth, stages - 1
    return Tile(rows, columns, _cover(of.channels, 16, depth), 8 if columns == of.device.widest else 4, stages)


@functools.lru_cache(maxsize=4096)
def grad_x(of: Product) -> Tile:
    """Columns are channels, depth is outputs. Its epilogue needs the registers of a second accumulator."""
    if of.exact:
        return Tile(64, _cover(of.channels, 16, 64), 16, 8, 2)
    columns = _cover(of.channels, 16, of.device.widest_prefix if of.taps > 1 and of.half else 64)
    rows = _rows(64 if of.taps > 9 and not of.half else 128, of, ceil(of.channels / columns))
    return Tile(rows, columns, _cover(of.outputs, 16, 32), 8 if columns >= 64 else 4, of.stages)


@functools.lru_cache(maxsize=4096)
def finishing_grad_x(of: Product) -> Tile | None:
    """As `grad_x`, for all outputs and channels of some rows; None where they are finished in a pass of their own."""
    if not of.device.finishes or of.exact or of.outputs > of.device.widest:
        return None
    columns = _cover(of.channels, 16, 64 if of.half else 32)
    return Tile(64, columns, _cover(of.outputs, 16, of.device.widest), 4, of.stages - 1)


@functools.lru_cache(maxsize=4096)
def grad_weight(of: Product) -> Tile:
    """Rows are taps and outputs together, columns are channels, depth is pixels."""
    lines = of.taps * of.outputs
    if of.exact:
        return Tile(_cover(lines, 16, 64), _cover(of.channels, 16, 32), 16, 4, 2)
    rows, columns = _cover(lines, 16, of.device.widest), _cover(of.channels, 16, of.device.widest if of.half else 64)
    warps = 8 if rows * columns >= 64 * of.device.widest else 4
    depth = of.device.pixels if of.half and of.pool == 1 and warps == 8 else 32  # or registers spill on sm_80
    return Tile(rows, columns, depth, warps, of.stages - (depth > 32))


def rows_per_part(rows: int, products: int, depth: int, device: Device) -> int:
    """The rows that a program of a weight gradient adds up, where one pass over them makes `products` tiles."""
    parts = ceil(device.programs / products)
    return max(8, ceil(rows / parts / depth)) * depth


def _rows(rows: int, of: Product, column_blocks: int) -> int:
    """As many, or half as many again and again for a small grid, where the device's line says so."""
    while rows > of.device.least_rows and ceil(of.rows / rows) * column_blocks < of.device.programs:
        rows //= 2
    return rows


def _cover(size: int, least: int, most: int) -> int:
    """The power of two that covers `size`, or its even share of the fewest tiles of `most`."""
    share = ceil(size / ceil(size / most))
    return max(least, 1 << (share - 1).bit_length())
