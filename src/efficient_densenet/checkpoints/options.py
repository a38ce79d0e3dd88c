"""What every command that reads a checkpoint can be told about it."""

from __future__ import annotations

import argparse
from typing import Any


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="IN",
        help="what to read: a checkpoint of fit or weights of a DenseNet; of shards, their index or folder",
    )
    parser.add_argument(
        "--prefix",
        help="which network, where the file holds several: the one whose names begin so (None: the only one)",
    )
    parser.add_argument("--ema", action="store_true", help="take the averaged copy of the weights")
    parser.add_argument(
        "--allow-non-finite", action="store_true", help="do not refuse weights that are infinite or not a number"
    )


def reading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `read_densenet` that the command line gives."""
    return {name: getattr(arguments, name) for name in ("prefix", "ema", "allow_non_finite")}
