"""Reading image files, and the datasets that all data modules are made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from efficient_densenet.errors import UserError, require
from efficient_densenet.training.data.dicom import DICOM_SUFFIXES, read_dicom
from efficient_densenet.training.data.unreadable import UnreadableImageError, unreadable

# PIL reads AVIF only where it was built with a library for it.
_AVIF = [".avif"] if ".avif" in Image.registered_extensions() else []
IMAGE_SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe", ".jp2", *_AVIF, *DICOM_SUFFIXES)


def read_image(path: str | os.PathLike[str], value_range: tuple[float, float] | None = None) -> Image.Image | Tensor:
    """Decode an image file, turned as its EXIF data say.

    Images of 8 bits become a PIL image, whatever their colour mode. Grey images with more, and those of DICOM files,
    become a tensor ``(1, H, W)`` of intensities from 0 to 1, with all their bits: PIL would clip them to white.

    Args:
        path: the file; those that end in ``.dcm`` or ``.dicom`` are read by pydicom.
        value_range: the values that become 0 and 1, for images with more than 8 bits; others are clipped. None: 0 and
            65535, or the window and the values of a DICOM file (`dicom.read_dicom`).

    Raises:
        UnreadableImageError: the file is missing, corrupt, cut short, or has an unknown range of values.
        MissingExtraError: the file needs pydicom, which is not installed.
    """
    if Path(path).suffix.lower() in DICOM_SUFFIXES:
        return _within(*read_dicom(path, value_range))
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    # These are what PIL raises for damaged files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise unreadable(path, error) from error
    if image.mode.startswith("I;16"):
        return _within(np.asarray(image), value_range or (0, 65535))
    if image.mode in ("I", "F"):
        if value_range is None:
            raise UnreadableImageError(
                f"the image {os.fspath(path)!r} has 32 bits a channel, whose range is unknown: train with it, as in "
                "--data.value_range [0,4095]"
            )
        return _within(np.asarray(image), value_range)
    return image


def _within(values: np.ndarray, value_range: tuple[float, float]) -> Tensor:
    """``(H, W)`` values → intensities ``(1, H, W)``."""
    low, high = value_range
    intensities = (torch.from_numpy(values.astype(np.float32)) - low) / (high - low)
    return intensities.clamp(0, 1)[None]


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether the name of a file is that of an image."""
    return Path(path).name.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(path: str | os.PathLike[str], folder: Path) -> bool:
    """Whether a file in `folder`, or a folder between them, is hidden, as ``._1.jpg`` of macOS is."""
    return any(part.startswith(".") for part in Path(path).relative_to(folder).parts)


def files_below(folder: Path) -> Iterator[Path]:
    """All files in `folder` and the folders below it, without hidden ones and links to nothing.

    Folders may be links; each is read once, under the name that comes first in alphabetical order.
    """
    seen = set()
    for below, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(below)
        if real in seen:  # a link to a folder above, for example
            folders.clear()
            continue
        seen.add(real)
        # Hidden folders are not entered, or a visible link to one of them would be left out as seen.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = (Path(below, name) for name in names if not name.startswith("."))
        yield from (path for path in visible if path.is_file())


class LabelledImages(Protocol):
    """A dataset of images and targets, such as torchvision's. If it has `targets`, they are read without the images."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


class TransformedImages(Dataset):
    """Some or all images of a dataset, each seen through a transform.

    Args:
        images: the dataset, without a transform of its own.
        transform: image → tensor ``(C, H, W)``.
        indices: which images; None: all.
    """

    def __init__(
        self,
        images: LabelledImages,
        transform: Callable[[Any], Tensor],
        indices: Sequence[int] | None = None,
    ) -> None:
        self.images = images
        self.transform = transform
        self.indices = range(len(images)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, target = self.images[self.indices[index]]
        return self.transform(image), target

    def targets(self) -> list[Any]:
        """Of all images, in order."""
        found = getattr(self.images, "targets", None)
        return [self.images[i][1] if found is None else found[i] for i in self.indices]


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
