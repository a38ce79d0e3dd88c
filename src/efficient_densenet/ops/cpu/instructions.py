"""Which instructions the kernels use, and what runs a convolution with them: a kernel of ours, or PyTorch.

The rule rests on measurements (`benchmarks/cpu.py`, docs/cpu.md), with AMX on reasoning alone. A kernel of ours is
faster because the rectified prefix and the result stay in the cache between the steps. That holds unless PyTorch's
convolution has instructions that ours has not: the tile registers of AMX, which multiply bfloat16 several times faster
than anything else on the processor. Ours lack them when they are held to less, or when an older compiler made them.
"""

from __future__ import annotations

import os
from enum import IntEnum
from typing import NamedTuple

import torch

from efficient_densenet.errors import UserError

VARIABLE = "EFFICIENT_DENSENET_INSTRUCTIONS"
_VARIABLE_OF_ONEDNN = "ONEDNN_MAX_CPU_ISA"  # the library that runs PyTorch's convolutions


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


def convolutions(level: Instructions, dtype: torch.dtype, pytorch: Instructions | None = None) -> Convolutions:
    """The rule for activations of this type; the best level at which it was measured decides.

    Args:
        level: what kernels of ours use.
        dtype: the type of the activations.
        pytorch: what PyTorch's convolutions use; None: the same.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return Convolutions(False, "there are no kernels of ours for this type")
    if level == Instructions.BASELINE:
        return Convolutions(False, "kernels of ours were never measured on this kind of processor")
    if dtype == torch.bfloat16 and Instructions.AMX in (level, pytorch):
        if level < Instructions.AMX:
            return Convolutions(False, "PyTorch's use the tile registers of AMX, which is faster")
        return Convolutions(True, "they use the tile registers of AMX; their speed was never measured")
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


def limit_of_pytorch() -> Instructions:
    """The best level that PyTorch's convolutions may use, as far as it matters here: whether AMX is among it."""
    name = os.environ.get(_VARIABLE_OF_ONEDNN, "").upper()
    return BEST if name in ("", "ALL", "DEFAULT") or "AMX" in name else Instructions.AVX512_BF16
