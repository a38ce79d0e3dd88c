"""Reading image files, and the datasets that all data modules are made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from efficient_densenet.errors import UserError, require


class UnreadableImageError(UserError):
    """An image file is corrupt, cut short or of a kind that cannot be used; the message names it.

    When it comes out of a worker process, ``DataLoader`` builds it anew from the text of the whole traceback. That
    text ends with the message, and only the message is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rstrip().rpartition(f"{UnreadableImageError.__name__}: ")[2])


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file into an 8-bit PIL image, whatever its colour mode, turned as its EXIF data say.

    Grey images of 16 bits are scaled to 8: left to itself, PIL would clip them to white.

    Raises:
        UnreadableImageError: the file is missing, corrupt, cut short, or has an unknown range of values.
    """
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    # These are what PIL raises for damaged files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableImageError(
            f"cannot read the image {os.fspath(path)!r} ({reason}); replace or remove it"
        ) from error
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableImageError(
            f"the image {os.fspath(path)!r} has 32 bits a channel, whose range is unknown; save it with 8 or 16 bits"
        )
    return image


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether the name of a file is that of an image; hidden files, such as ``._1.jpg`` of macOS, are none."""
    name = Path(path).name
    return not name.startswith(".") and name.lower().endswith(IMG_EXTENSIONS)


class LabelledImages(Protocol):
    """A dataset of PIL images and class numbers, such as torchvision's."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class TransformedImages(Dataset):
    """Some or all images of a dataset, each seen through a transform.

    Args:
        images: the dataset, without a transform of its own.
        transform: PIL image → tensor ``(C, H, W)``.
        indices: which images; None: all.
    """

    def __init__(
        self,
        images: LabelledImages,
        transform: Callable[[Image.Image], Tensor],
        indices: Sequence[int] | None = None,
    ) -> None:
        self.images = images
        self.transform = transform
        self.indices = range(len(images)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[self.indices[index]]
        return self.transform(image), label


def stratified_split(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the images that are kept and of the `fraction` that is held out, in equal shares of every class.

    Raises:
        UserError: a class has too few images, or the fraction leaves one side without some class.
    """
    train_test_split: Any = require("sklearn.model_selection", "train").train_test_split
    try:
        kept, held_out = train_test_split(range(len(labels)), test_size=fraction, random_state=seed, stratify=labels)
    except ValueError as error:
        raise UserError(f"cannot hold out {fraction} of {len(labels)} images with every class: {error}") from error
    return kept, held_out
