"""Amounts of memory, as people write them."""

from __future__ import annotations

import argparse
import re

from efficient_densenet.errors import UserError

_UNITS = {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate(("", "k", "M", "G", "T"))
    if prefix or unit == "B"
}


class _UnreadableError(UserError, argparse.ArgumentTypeError):
    """Of text that a user gave, whether on a command line, whose parser then shows the message, or not."""


def parse_bytes(text: str) -> int:
    """``"12GB"`` → 12,000,000,000; ``"500 MiB"`` → 524,288,000. Also a type for `argparse`.

    Raises:
        UserError: it is no amount of memory.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip(), re.IGNORECASE)
    factors = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if match is None or match[2].lower() not in factors:
        raise _UnreadableError(f"{text!r} is not an amount of memory; write it as 12GB, 500MB or 8GiB")
    return int(float(match[1]) * factors[match[2].lower()])


def format_bytes(nbytes: float) -> str:
    """``12_000_000`` → ``"12.0 MB"``; from ten thousand megabytes ``"11.0 GB"``, below a tenth of one ``"1.0 kB"``."""
    if abs(nbytes) >= 1e10:
        return f"{nbytes / 1e9:,.1f} GB"
    if abs(nbytes) >= 1e5 or nbytes == 0:
        return f"{megabytes(nbytes)} MB"
    return f"{nbytes / 1e3:.1f} kB" if abs(nbytes) >= 100 else f"{nbytes:.0f} B"


def megabytes(nbytes: float, decimals: int = 1) -> str:
    """Megabytes of a million bytes, where the unit stands elsewhere."""
    return f"{nbytes / 1e6:,.{decimals}f}"
