"""The command `convert`: rewrite a checkpoint of another library under other names, checking that it is complete."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from efficient_densenet.checkpoints.densenets import DenseNetFile, read_densenet
from efficient_densenet.checkpoints.options import add_reading_arguments, reading_options
from efficient_densenet.errors import UserError
from efficient_densenet.weights.dialects import from_canonical
from efficient_densenet.weights.formats import first_few
from efficient_densenet.weights.published import get_published
from efficient_densenet.weights.writing import OUTPUT_SUFFIXES, check_output, write_state_dict

# What --to takes, and the dialect that it means.
TARGETS = {
    "efficient": "efficient-densenet",
    "normal": "efficient-densenet",
    "torchvision": "torchvision",
    "gpleiss": "gpleiss",
    "monai": "monai",
    "wandering007": "wandering007",
}


def convert_file(
    checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], to: str = "efficient", **reading: Any
) -> tuple[DenseNetFile, int]:
    """Write the DenseNet in the file `checkpoint` to the file `output` under the names that `to` asks for.

    Returns what was read, and the number of tensors written. See the command's help for `to`, and `read_densenet` for
    what can be said about reading.

    Raises:
        UserError: the input holds no complete DenseNet, or the output cannot be written.
    """
    output = Path(output)
    if to not in TARGETS:
        raise UserError(f"there is no target {to!r}; there are: {', '.join(TARGETS)}")
    check_output(output)
    densenet = read_densenet(get_published(checkpoint).path, **reading)
    if output.exists() and any(map(output.samefile, densenet.weights.content.files)):
        raise UserError(f"the output {output} is the checkpoint itself; choose another name")
    renamed = from_canonical(densenet.state, TARGETS[to])
    write_state_dict(renamed, output)
    return densenet, len(renamed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Find the DenseNet in a checkpoint and rewrite it under other names, those of torchvision (old or new), timm, "
        "MONAI, gpleiss or wandering007. Names and prefix are recognised, nothing in the file is executed, and what is "
        "not complete is refused. Optimiser states and whatever else is stored with the weights are left out."
    )
    parser.add_argument(
        "--to",
        choices=TARGETS,
        default="efficient",
        help="the names to write; efficient and normal are the same ones, since this library's networks have one set "
        "of names however they run, and the file loads into either; the others are for the networks of those libraries",
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "--output", required=True, metavar="OUT", help=f"the file to write, ending in {', '.join(OUTPUT_SUFFIXES)}"
    )


def run(arguments: argparse.Namespace) -> int:
    file, number = convert_file(arguments.checkpoint, arguments.output, arguments.to, **reading_options(arguments))
    weights = file.weights
    prefix = f", behind the prefix {weights.prefix!r}" if weights.prefix else ""
    print(f"read     {arguments.checkpoint}: names of {weights.dialect}{prefix}")
    print(f"network  {file.architecture}")
    if weights.left_behind:
        print(f"without  {first_few(weights.left_behind)}, which are no part of it")
    print(f"wrote    {arguments.output}: {number} tensors, names of {TARGETS[arguments.to]}")
    return 0
