"""Any folder of images by class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchvision import datasets
from torchvision.transforms import v2

from efficient_densenet.errors import UserError
from efficient_densenet.training.data.base import NO_TEST_SET, Splits
from efficient_densenet.training.data.images import TransformedImages, is_image, stratified_split
from efficient_densenet.training.data.photos import PhotoDataModule
from efficient_densenet.training.data.preprocessing import Preprocessing

_VAL_FRACTION = 0.2


class ImageFolder(PhotoDataModule):
    """Images in one folder per class: ``root/train/CLASS/*`` and ``root/val/CLASS/*``, or ``root/CLASS/*`` alone.

    ``root/test/CLASS/*`` is used for test if it is there; otherwise the validation images are.

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
        if any((self.root / name).is_dir() for name in ("train", "val")):
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


def load_split_folders(root: Path, training_transform: v2.Transform, preprocessing: Preprocessing) -> Splits:
    """The images of ``root/train``, ``root/val`` and, if it is there, ``root/test`` (otherwise ``val`` again).

    Raises:
        UserError: a folder is missing, has no classes or no images, or the classes of the folders differ.
    """
    train = read_class_folders(root / "train", preprocessing)
    evaluated = {}
    for name in ("val", "test"):
        if name == "test" and not (root / name).is_dir():
            continue
        images = read_class_folders(root / name, preprocessing)
        if different := sorted(set(train.classes) ^ set(images.classes)):
            raise UserError(
                f"{root / 'train'} and {root / name} need the same classes, but only one of them has "
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
    """The images of ``folder/CLASS/*`` as a dataset of images and class numbers.

    Raises:
        UserError: the folder is missing, has no classes, or a class has no images.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; it should hold one folder of images for each class")
    try:
        return _VisibleImages(str(folder), loader=preprocessing.read, is_valid_file=is_image)
    except FileNotFoundError as error:
        raise UserError(f"{folder} should hold one folder of images for each class: {error}") from error
