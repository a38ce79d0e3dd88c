"""From tensors to a kernel's arguments, and the launch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import gcd
from typing import Any

import torch
from torch import Tensor

from efficient_densenet.ops.convolution import row_stride
from efficient_densenet.ops.triton.tiles import Tile

RUN_TIME = (
    *("x_stride", "out_stride", "grad_stride", "grad_out_stride", "grad_x_stride"),
    *("rows", "blocks", "rows_per_block", "rows_per_part", "depth", "height", "width", "channels", "outputs"),
    *("stride_output", "stride_channel", "stride_tap", "number", "taps"),
)
"""Arguments whose values the compiler must not look at, or it would compile again for some of them."""


def run(kernel: Any, programs: int, tile: Tile, *arguments: Any) -> None:
    """Start `programs` programs of `kernel` on the device of the first argument, in the current stream."""
    device = arguments[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[(programs,)](*arguments, **tile.sizes(), num_warps=tile.warps, num_stages=tile.stages)


def ceil_div(size: int, part: int) -> int:
    """As `triton.cdiv`, which takes microseconds on the host."""
    return -(-size // part)


def matrix(x: Tensor) -> tuple[Tensor, int]:
    """`x`, or a copy if it must be, with evenly spaced rows; and how far apart they are."""
    stride = row_stride(x)
    return (x.contiguous(), x.shape[-1]) if stride is None else (x, stride)


def packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as ``(O, taps, C)``: a copy of the weights of a window, unless they are channels-last already."""
    return weight.to(dtype).movedim(1, -1).contiguous()


def cube(size: Sequence[int]) -> list[int]:
    """1, 2 or 3 sizes as 3: missing ones are 1."""
    return [1] * (3 - len(size)) + list(size)


def common_divisor(x: Tensor, *sizes: int) -> int:
    """The number of values, at most 16 bytes of them, by which all sizes can be divided: see `rows`."""
    return gcd(16 // x.element_size(), *sizes)
