"""Any folder of images by class."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torchvision import datasets
from torchvision.transforms import v2

from efficient_densenet.errors import UserError
from efficient_densenet.training.data.base import NO_TEST_SET, Splits
from efficient_densenet.training.data.images import TransformedImages, is_hidden, is_image, stratified_split
from efficient_densenet.training.data.photos import PhotoDataModule
from efficient_densenet.training.data.preprocessing import Preprocessing
from efficient_densenet.weights.formats import first_few

_VAL_FRACTION = 0.2
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class ImageFolder(PhotoDataModule):
    """Images in one folder per class: ``root/train/CLASS/*`` and ``root/val/CLASS/*``, or ``root/CLASS/*`` alone.

    ``root/test/CLASS/*`` is used for test if it is there; otherwise the validation images are. ``Train``, ``training``,
    ``valid``, ``validation`` and the like mean the same.

    Args:
        root: the folder.
        val_fraction: the share of the images that is held out for validation where there is no ``val`` folder; None: a
            fifth.
        kwargs: those of `PhotoDataModule` and `ImageDataModule`.
    """

    def __init__(self, root: str, val_fraction: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise UserError(f"val_fraction must be above 0 and below 1, not {val_fraction}")
        self.root = Path(root).expanduser()
        self.val_fraction = val_fraction

    def load(self) -> Splits:
        if _is_split(self.root):
            if self.val_fraction is not None:
                raise UserError(f"{self.root} is split into folders already: leave val_fraction out")
            return load_split_folders(self.root, self.own_training_transform(), self.preprocessing)
        images = read_class_folders(self.root, self.preprocessing)
        kept, held_out = stratified_split(images.targets, self.val_fraction or _VAL_FRACTION, self.seed)
        validated = TransformedImages(images, self.preprocessing.transform(), held_out)
        return Splits(
            class_names=tuple(images.classes),
            train=TransformedImages(images, self.own_training_transform(), kept),
            val=validated,
            test=validated,
            tested=NO_TEST_SET,
        )


def _is_split(root: Path) -> bool:
    """Whether the folders in `root` are splits and not classes.

    They are where one is called ``train`` or ``val``, where there are folders for two splits, whatever else is there,
    and where all have names of splits.
    """
    names = [path.name for path in _folders_in(root)]
    found = [_SPLITS[name.lower()] for name in names if name.lower() in _SPLITS]
    return bool({"train", "val"} & {*names}) or len({*found}) > 1 or (bool(names) and len(found) == len(names))


def _folders_in(root: Path) -> list[Path]:
    """Those that are not hidden; none where there is no such folder."""
    return sorted(path for path in root.glob("*") if path.is_dir() and not path.name.startswith("."))


def _folder_of(root: Path, split: str) -> Path:
    """The folder of ``train``, ``val`` or ``test`` under one of its names; the usual one where there is none."""
    found = [path for path in _folders_in(root) if _SPLITS.get(path.name.lower()) == split]
    if len(found) > 1:
        raise UserError(f"{root} has several folders for {split}: {', '.join(path.name for path in found)}; keep one")
    return found[0] if found else root / split


def load_split_folders(root: Path, training_transform: v2.Transform, preprocessing: Preprocessing) -> Splits:
    """The images of ``root/train``, ``root/val`` and, if it is there, ``root/test`` (otherwise ``val`` again).

    Raises:
        UserError: a folder is missing or there twice, has no classes or no images, or their classes differ.
    """
    training = _folder_of(root, "train")
    train = read_class_folders(training, preprocessing)
    evaluated = {}
    for name in ("val", "test"):
        folder = _folder_of(root, name)
        if name == "test" and not folder.is_dir():
            continue
        images = read_class_folders(folder, preprocessing)
        if different := sorted(set(train.classes) ^ set(images.classes)):
            raise UserError(
                f"{training} and {folder} need the same classes, but only one of them has "
                f"{', '.join(different[:5])}{' …' if len(different) > 5 else ''}"
            )
        evaluated[name] = TransformedImages(images, preprocessing.transform())
    return Splits(
        class_names=tuple(train.classes),
        train=TransformedImages(train, training_transform),
        val=evaluated["val"],
        test=evaluated.get("test", evaluated["val"]),
        tested="test images" if "test" in evaluated else NO_TEST_SET,
    )


class _VisibleImages(datasets.ImageFolder):
    """Hidden folders, such as ``.ipynb_checkpoints``, are no classes."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError(f"there is no folder in {directory}")
        return classes, {name: number for number, name in enumerate(classes)}


def read_class_folders(folder: Path, preprocessing: Preprocessing) -> datasets.ImageFolder:
    """The images of ``folder/CLASS/*`` as a dataset of images and class numbers; warns of files that are left out.

    Raises:
        UserError: the folder is missing, has no classes, or a class has no images.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; it should hold one folder of images for each class")
    left_out: list[str] = []

    def is_visible_image(path: str) -> bool:
        if is_hidden(path, folder):
            return False
        known = is_image(path)
        if not known:
            left_out.append(path)
        return known

    try:
        images = _VisibleImages(str(folder), loader=preprocessing.read, is_valid_file=is_visible_image)
    except FileNotFoundError as error:
        raise UserError(f"{folder} should hold one folder of images for each class: {error}") from error
    if left_out:
        names = first_few([os.path.relpath(path, folder) for path in sorted(left_out)])
        warnings.warn(f"{folder} holds files that do not end as images do, and are left out: {names}", stacklevel=2)
    return images
