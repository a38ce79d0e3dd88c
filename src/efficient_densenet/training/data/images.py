"""Reading image files, and the datasets that all data modules are made of."""

from __future__ import annotations

import os
from collections import Counter
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


def folders_in(root: Path) -> list[Path]:
    """The folders in `root` that are not hidden, in order; none where there is no such folder."""
    return sorted(path for path in root.glob("*") if path.is_dir() and not path.name.startswith("."))


def files_below(folder: Path) -> Iterator[Path]:
    """All files in `folder` and the folders below it, without hidden ones (``._1.jpg`` of macOS) and links to nothing.

    Folders may be links; each is read once, under the name that comes first in alphabetical order, and a link to a
    folder that `folder` is in is not followed.
    """
    seen = {os.path.realpath(above) for path in (folder.absolute(), folder.resolve()) for above in path.parents}
    pending = [folder]
    while pending:
        below = pending.pop()
        real = os.path.realpath(below)
        if real in seen:
            continue
        seen.add(real)
        with os.scandir(below) as found:  # which knows what is a folder without asking for each file
            # Hidden folders are not entered, or a visible link to one of them would be left out as seen.
            visible = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
        yield from (Path(entry.path) for entry in visible if entry.is_file())
        pending += [Path(entry.path) for entry in reversed(visible) if entry.is_dir()]


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


def stratified_split(
    labels: Sequence[int], fraction: float, seed: int, class_names: Sequence[str] | None = None
) -> tuple[list[int], list[int]]:
    """Indices of the images that are kept and of the `fraction` that is held out, in equal shares of every class.

    Raises:
        UserError: a class has too few images, or the fraction leaves one side without some class.
    """
    train_test_split: Any = require("sklearn.model_selection", "train").train_test_split
    try:
        kept, held_out = train_test_split(range(len(labels)), test_size=fraction, random_state=seed, stratify=labels)
    except ValueError as error:
        rarest, number = min(Counter(labels).items(), key=lambda item: item[1])
        raise UserError(
            f"cannot hold out {fraction:g} of {len(labels)} images so that each of {len({*labels})} classes is on both "
            f"sides (the smallest, {class_names[rarest] if class_names else rarest}, has {number}): give more images, "
            "another share, or validation images of your own"
        ) from error
    return kept, held_out
