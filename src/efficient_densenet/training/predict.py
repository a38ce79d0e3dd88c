"""The command `predict`: the most likely classes of image files, or their features, printed or in a file."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from efficient_densenet.checkpoints.options import add_reading_arguments, reading_options
from efficient_densenet.errors import UserError, require
from efficient_densenet.files import replacing

for _package in ("lightning", "torchvision"):
    require(_package, "train")

from efficient_densenet.training.data.images import IMAGE_SUFFIXES, files_below, is_image
from efficient_densenet.training.data.unreadable import UnreadableImageError
from efficient_densenet.training.networks import head_of
from efficient_densenet.training.trained import TrainedNetwork, load_trained

Rows = Iterator[tuple[Path, list[float]]]
Compute = Callable[[Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_reading_arguments(parser)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="an image file, or a folder of them")
    parser.add_argument("--top", type=int, default=5, help="how many classes to print for each image")
    parser.add_argument("--output", type=Path, help="write all classes to this file, .csv or .json, in place of that")
    parser.add_argument("--features", action="store_true", help="write what the classifier gets, not the classes")
    parser.add_argument("--class-names", type=Path, help="a file with the names of the classes, one a line")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--batch-size", type=int, default=32, help="images that go through the network together")


def run(arguments: argparse.Namespace) -> int:
    output: Path | None = arguments.output
    if arguments.top < 1 or arguments.batch_size < 1:
        raise UserError("--top and --batch-size must be 1 or more")
    if output is not None and output.suffix not in _WRITERS:
        raise UserError(f"the output must end in {' or '.join(_WRITERS)}, not {output.name!r}")
    if arguments.features and output is None:
        raise UserError("--features are many numbers: give a file for them with --output")
    device = _device(arguments.device)
    trained = load_trained(arguments.checkpoint, arguments.class_names, **reading_options(arguments))
    trained.network.to(device)
    compute, names = _features(trained) if arguments.features else _probabilities(trained)
    skipped: list[Path] = []
    rows = _rows(trained, compute, image_files(arguments.paths), device, arguments.batch_size, skipped)
    if output is None:
        _print(rows, names, arguments.top)
    else:
        with (
            replacing(output) as beside,
            beside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            _WRITERS[output.suffix](rows, names, file)
    if skipped:
        print(f"images that could not be read and were skipped: {len(skipped)}", file=sys.stderr)
    return 1 if skipped else 0


@torch.inference_mode()
def _rows(
    trained: TrainedNetwork,
    compute: Compute,
    paths: Iterator[Path],
    device: torch.device,
    batch_size: int,
    skipped: list[Path],
) -> Rows:
    """What is computed of each image; those that cannot be read are named and put into `skipped`."""
    transform = trained.preprocessing.transform()
    while batch := list(islice(paths, batch_size)):
        read: list[tuple[Path, Tensor]] = []
        for path in batch:
            try:
                read.append((path, transform(trained.preprocessing.read(path))))
            except UnreadableImageError as error:
                print(error, file=sys.stderr)
                skipped.append(path)
        if read:
            values = compute(torch.stack([image for _, image in read]).to(device)).float().cpu()
            yield from zip([path for path, _ in read], values.tolist(), strict=True)


def _probabilities(trained: TrainedNetwork) -> tuple[Compute, list[str]]:
    """What computes them, ``(N, classes)``, and what the columns are."""

    def compute(images: Tensor) -> Tensor:
        return trained.probabilities(trained.network(images))

    return compute, trained.class_names


def _features(trained: TrainedNetwork) -> tuple[Compute, list[str]]:
    """What computes the input ``(N, features)`` of the classifier, and what the columns are."""
    head, got = head_of(trained.network), []
    head.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0]))

    def compute(images: Tensor) -> Tensor:
        trained.network(images)
        return got.pop()

    return compute, [f"feature{i}" for i in range(head.in_features)]


def _print(rows: Rows, names: Sequence[str], top: int) -> None:
    for path, probabilities in rows:
        print(str(path).encode(errors="backslashreplace").decode())  # a file's name need not be text
        best = sorted(zip(probabilities, names, strict=True), key=lambda pair: -pair[0])
        for probability, name in best[:top]:
            print(f"  {probability:7.2%}  {name}")


def _write_csv(rows: Rows, names: Sequence[str], file: TextIO) -> None:
    writer = csv.writer(file)
    writer.writerow(["path", *names])
    for path, values in rows:
        writer.writerow([path, *(f"{value:.6g}" for value in values)])


def _write_json(rows: Rows, names: Sequence[str], file: TextIO) -> None:
    named = ({"path": str(path), "values": dict(zip(names, values, strict=True))} for path, values in rows)
    file.write("[")
    for i, row in enumerate(named):
        file.write(("," if i else "") + "\n" + json.dumps(row))
    file.write("\n]\n")


_WRITERS: dict[str, Callable[[Rows, Sequence[str], TextIO], None]] = {".csv": _write_csv, ".json": _write_json}


def image_files(paths: Sequence[Path]) -> Iterator[Path]:
    """The files among `paths`, and all images in those that are folders and in the folders below them, in order.

    Raises:
        UserError: a path does not exist, or a folder holds no image.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no file or folder {path}")
        if not path.is_dir():
            yield path
            continue
        found = sorted(filter(is_image, files_below(path)))
        if not found:
            raise UserError(f"the folder {path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        yield from found


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name!r} here ({str(error).splitlines()[0]}); use cpu") from error
    return device
