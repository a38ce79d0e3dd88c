"""The command `predict`: the most likely classes of image files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from efficient_densenet.checkpoints.options import add_reading_arguments, reading_options
from efficient_densenet.errors import UserError, require

for _package in ("lightning", "torchvision"):
    require(_package, "train")

from torchvision.datasets.folder import IMG_EXTENSIONS

from efficient_densenet.training.data.images import is_image, read_image
from efficient_densenet.training.trained import TrainedNetwork, load_trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_reading_arguments(parser)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="an image file, or a folder of them")
    parser.add_argument("--top", type=int, default=5, help="how many classes to print for each image")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--batch-size", type=int, default=32, help="images that go through the network together")


def run(arguments: argparse.Namespace) -> int:
    if arguments.top < 1 or arguments.batch_size < 1:
        raise UserError("--top and --batch-size must be 1 or more")
    device = _device(arguments.device)
    trained = load_trained(arguments.checkpoint, **reading_options(arguments))
    trained.network.to(device)
    paths = iter(image_files(arguments.paths))
    while batch := list(islice(paths, arguments.batch_size)):
        for path, probabilities in zip(batch, predict(trained, batch, device), strict=True):
            print(path)
            shares, classes = probabilities.topk(min(arguments.top, len(probabilities)))
            for share, index in zip(shares.tolist(), classes.tolist(), strict=True):
                print(f"  {share:7.2%}  {trained.class_names[index]}")
    return 0


@torch.inference_mode()
def predict(trained: TrainedNetwork, paths: Sequence[Path], device: torch.device) -> Tensor:
    """Probabilities ``(images, classes)`` of the images at `paths`, on the CPU.

    Raises:
        UserError: an image cannot be read; the message names it.
    """
    transform = trained.preprocessing.transform()
    images = torch.stack([transform(read_image(path)) for path in paths])
    return trained.network(images.to(device)).softmax(1).cpu()


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
        found = sorted(file for file in path.rglob("*") if is_image(file) and not _is_hidden(file.relative_to(path)))
        if not found:
            raise UserError(f"the folder {path} holds no image ({', '.join(IMG_EXTENSIONS)})")
        yield from found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name!r} here ({str(error).splitlines()[0]}); use cpu") from error
    return device
