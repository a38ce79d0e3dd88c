"""The command `convert`: rewrite a checkpoint of another library under other names, checking that it is complete."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from efficient_densenet.checkpoints.densenets import DenseNetFile, read_densenet
from efficient_densenet.checkpoints.dialects import from_canonical
from efficient_densenet.checkpoints.files import OUTPUT_SUFFIXES, check_output, write_state_dict
from efficient_densenet.errors import UserError

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
    checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], to: str = "efficient"
) -> tuple[DenseNetFile, int]:
    """Write the DenseNet in the file `checkpoint` to the file `output` under the names that `to` asks for.

    Returns what was read, and the number of tensors written. See the command's help for `to`.

    Raises:
        UserError: the input holds no complete DenseNet, or the output cannot be written.
    """
    output = Path(output)
    if to not in TARGETS:
        raise UserError(f"there is no target {to!r}; there are: {', '.join(TARGETS)}")
    check_output(output)
    if output.exists() and os.path.exists(checkpoint) and output.samefile(checkpoint):
        raise UserError(f"the output {output} is the checkpoint itself; choose another name")
    densenet = read_densenet(checkpoint)
    renamed = from_canonical(densenet.state, TARGETS[to])
    write_state_dict(renamed, output)
    return densenet, len(renamed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Rewrite a checkpoint of torchvision (old or new), timm, MONAI, gpleiss or wandering007 under other names. "
        "The dialect is recognised from the names, nothing in the file is executed, and a file that is not a complete "
        "DenseNet is refused. Optimiser states and whatever else stands beside the weights are left behind."
    )
    parser.add_argument(
        "--to",
        choices=TARGETS,
        default="efficient",
        help="the names to write; efficient and normal are the same ones, since this library's networks have one set "
        "of names however they run, and the file loads into either; the others are for the networks of those libraries",
    )
    parser.add_argument("--checkpoint", required=True, metavar="IN", help="the file to read")
    parser.add_argument(
        "--output", required=True, metavar="OUT", help=f"the file to write, ending in {', '.join(OUTPUT_SUFFIXES)}"
    )


def run(arguments: argparse.Namespace) -> int:
    densenet, number = convert_file(arguments.checkpoint, arguments.output, arguments.to)
    print(f"read     {arguments.checkpoint}: names of {densenet.dialect}")
    print(f"network  {densenet.architecture}")
    print(f"wrote    {arguments.output}: {number} tensors, names of {TARGETS[arguments.to]}")
    return 0
