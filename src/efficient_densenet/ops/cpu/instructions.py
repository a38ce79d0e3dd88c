"""Which instructions the kernels use, and what runs a convolution with them: a kernel of ours, or PyTorch.

The rule rests on measurements (`benchmarks/cpu.py`, docs/cpu.md). A kernel of ours is faster because the rectified
prefix and the result stay in the cache between the steps. That holds unless PyTorch's convolution has instructions that
ours has not: the tiles of AMX, which multiply bfloat16 several times faster than anything else on the processor.
"""

from __future__ import annotations

import os
from enum import IntEnum
from typing import NamedTuple

import torch

from efficient_densenet.errors import UserError

VARIABLE = "EFFICIENT_DENSENET_INSTRUCTIONS"


class Instructions(IntEnum):
    """The levels that the kernels are compiled for. A processor of one level also has all levels below it."""

    BASELINE = 0  # SSE2 on x86-64, NEON on ARM
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX = 4

    @property
    def option(self) -> str:
        """The name by which a user asks for this level."""
        return self.name.lower()


class Convolutions(NamedTuple):
    """Who runs the convolutions of one type, with a window of 1 or 3: kernels of ours or PyTorch; and why."""

    ours: bool
    reason: str


def convolutions(level: Instructions, dtype: torch.dtype) -> Convolutions:
    """The rule for activations of this type at this level; the best level at which it was measured decides."""
    if dtype not in (torch.float32, torch.bfloat16):
        return Convolutions(False, "there are no kernels of ours for this type")
    if level == Instructions.BASELINE:
        return Convolutions(False, "kernels of ours were never measured on this kind of processor")
    if level == Instructions.AMX and dtype == torch.bfloat16:
        return Convolutions(False, "PyTorch's use the tiles of AMX, which is faster")
    return Convolutions(True, "they are faster than PyTorch's with these instructions")


BEST = max(Instructions)


def named(name: str) -> Instructions:
    """The level of this name, such as ``"avx2"``.

    Raises:
        UserError: there is no such level.
    """
    for level in Instructions:
        if name.lower() == level.option:
            return level
    names = ", ".join(level.option for level in Instructions)
    raise UserError(f"there is no instruction level {name!r}; there are: {names}")


def limit() -> Instructions:
    """The best level that may be used: what the environment variable says, or any.

    Raises:
        UserError: the variable names no level.
    """
    name = os.environ.get(VARIABLE)
    try:
        return named(name) if name else BEST
    except UserError as error:
        raise UserError(f"{VARIABLE}: {error}") from None
