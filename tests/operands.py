"""Arguments for the operations of `efficient_densenet.ops`, in every shape that tends to go wrong."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.cpu.instructions import Instructions
from efficient_densenet.ops.protocol import Affine, Backend, Statistics, statistics_dtype

# Images, spatial size, channels: odd sizes, batch 1, prime channel counts, single channels, single pixels, and a line
# that is single after a pool.
SHAPES = [
    (3, (5, 7), 13),
    (1, (5, 7), 16),
    (2, (1, 1), 5),
    (4, (2, 4), 1),
    (2, (9,), 7),
    (1, (16,), 8),
    (2, (3, 4, 5), 11),
    (3, (3, 4, 3), 1),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

# Every level of instructions that the kernels can be held to on this processor; none where they are not built.
_loaded = library.load()
LEVELS = [level for level in Instructions if _loaded.kernels is not None and level <= _loaded.instructions]


def _has_convolutions(level: Instructions) -> bool:
    with library.held_to(level, ours=True) as loaded:
        return bool(loaded.convolves)


# Those of them with kernels for whole convolutions, which on ARM run in tests alone.
CONVOLVING = [level for level in LEVELS if _has_convolutions(level)]


EVERY_OPERATION = [name for name in vars(Backend) if not name.startswith("_")]


class Operands(NamedTuple):
    x: Tensor
    norm: Affine

    @classmethod
    def random(cls, shape: tuple, dtype: torch.dtype = torch.float64, spare: int = 0) -> Operands:
        """With `spare` channels, `x` is a slice of the channels of a larger tensor."""
        n, spatial, channels = shape
        torch.manual_seed(n + channels)
        x = slice_of_channels(torch.randn(n, *spatial, channels).to(dtype), spare)
        small = statistics_dtype(dtype)
        scale, shift, mean = torch.randn(3, channels, dtype=small).unbind()
        return cls(x, Affine(mean, torch.rand(channels, dtype=small) + 0.5, scale, shift))

    def double(self) -> Operands:
        return Operands(self.x.double(), double(self.norm))


def double(norm: Affine) -> Affine:
    return Affine(*(t.double() for t in norm))


def empty_statistics(x: Tensor, channels: int | None = None) -> Statistics:
    """NaN where an operation must write the statistics of activations like `x`."""
    n = x.shape[-1] if channels is None else channels
    return Statistics(*torch.full((2, n), torch.nan, dtype=statistics_dtype(x.dtype), device=x.device))


def measured(ops: Backend, x: Tensor) -> Statistics:
    """`ops.statistics` of `x`."""
    found = empty_statistics(x)
    ops.statistics(x, found)
    return found


def slice_of_channels(x: Tensor, spare: int) -> Tensor:
    """The same values, with `spare` further channels before and behind them in memory, full of NaN."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 2 * spare), float("nan"))
    wide[..., spare : spare + x.shape[-1]] = x
    return wide[..., spare : spare + x.shape[-1]]


def weight_for(x: Tensor, out_channels: int, kernel: int) -> Tensor:
    weight = torch.randn(out_channels, x.shape[-1], *[kernel] * (x.dim() - 2), dtype=torch.float64)
    return weight.to(x.dtype)
