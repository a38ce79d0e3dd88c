"""Any folder of images by class."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchvision.transforms import v2

from efficient_densenet.errors import UserError
from efficient_densenet.training.data.base import HELD_OUT, NO_TEST_SET, Splits
from efficient_densenet.training.data.images import (
    IMAGE_SUFFIXES,
    TransformedImages,
    files_below,
    folders_in,
    is_image,
    stratified_split,
)
from efficient_densenet.training.data.photos import PhotoDataModule
from efficient_densenet.training.data.preprocessing import Preprocessing
from efficient_densenet.weights.formats import first_few, shortened

_VAL_FRACTION = 0.2
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class ImageFolder(PhotoDataModule):
    """Images in one folder per class: ``root/train/CLASS/*`` and ``root/val/CLASS/*``, or ``root/CLASS/*`` alone.

    Without a folder ``val``, a share of the training images is held out for validation. ``root/test/CLASS/*`` is used
    for test alone if it is there; otherwise the validation images are tested. ``Train``, ``training``, ``valid``,
    ``validation`` and the like mean the same.

    Args:
        root: the folder.
        val_fraction: the share of the training images that is held out for validation where there is no ``val`` folder;
            None: a fifth.
        kwargs: those of `PhotoDataModule` and `ImageDataModule`.
    """

    def __init__(self, root: str, val_fraction: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise UserError(f"val_fraction must be above 0 and below 1, not {val_fraction}")
        self.root = Path(root).expanduser()
        self.val_fraction = val_fraction

    def load(self) -> Splits:
        training, others = self.root, dict[str, Path]()
        if _is_split(self.root):
            training, others = _folder_of(self.root, "train"), self._other_folders()
        return load_class_folders(
            training, others, self.own_training_transform(), self.preprocessing, self.val_fraction, self.seed
        )

    def _other_folders(self) -> dict[str, Path]:
        """Those for ``val`` and ``test``, as far as they are there."""
        found = {name: folder for name in ("val", "test") if (folder := _folder_of(self.root, name)).is_dir()}
        unknown = [path.name for path in folders_in(self.root) if path.name.lower() not in _SPLITS]
        if "val" in found and self.val_fraction is not None:
            raise UserError(f"{found['val']} has the validation images: leave val_fraction out")
        if "val" not in found and unknown:
            warnings.warn(f"{self.root} has no folder val, and its {first_few(unknown)} is not used", stacklevel=2)
        if "test" in found and not folders_in(found["test"]):
            warnings.warn(
                f"{found['test']} has no folder for each class, so that nothing is known of its images, and they are "
                "not tested: look at them with predict",
                stacklevel=2,
            )
            del found["test"]
        return found


def _is_split(root: Path) -> bool:
    """Whether the folders in `root` are splits and not classes.

    They are where one is called ``train`` or ``val``, where there are folders for two splits, whatever else is there,
    and where all have names of splits.
    """
    names = [path.name for path in folders_in(root)]
    found = [_SPLITS[name.lower()] for name in names if name.lower() in _SPLITS]
    return bool({"train", "val"} & {*names}) or len({*found}) > 1 or (bool(names) and len(found) == len(names))


def _folder_of(root: Path, split: str) -> Path:
    """The folder of ``train``, ``val`` or ``test`` under one of its names; the usual one where there is none."""
    found = [path for path in folders_in(root) if _SPLITS.get(path.name.lower()) == split]
    if len(found) > 1:
        raise UserError(f"{root} has several folders for {split}: {', '.join(path.name for path in found)}; keep one")
    return found[0] if found else root / split


def load_class_folders(
    training: Path,
    others: Mapping[str, Path],
    training_transform: v2.Transform,
    preprocessing: Preprocessing,
    val_fraction: float | None = None,
    seed: int = 0,
) -> Splits:
    """The images of ``training/CLASS/*``, and those for validation and test.

    Args:
        training: the folder of the training images.
        others: those for ``val`` and ``test``, as far as they are there. Without the first one, validation images are
            held out from the training images; without the second one, the validation images are tested.
        training_transform: of the training images.
        preprocessing: of the others.
        val_fraction: the share that is held out; None: a fifth.
        seed: decides which images these are.

    Raises:
        UserError: a folder is missing, has no classes or no images, their classes differ, two are links to the same
            images, or there are too few images to hold any out.
    """
    train = read_class_folders(training, preprocessing)
    evaluated = {}
    for name, folder in others.items():
        images = read_class_folders(folder, preprocessing)
        if different := sorted(set(train.classes) ^ set(images.classes)):
            raise UserError(
                f"{training} and {folder} need the same classes, but only one of them has "
                f"{', '.join(different[:5])}{' …' if len(different) > 5 else ''}"
            )
        if same := [c for c in train.classes if (folder / c).resolve() == (training / c).resolve()]:
            raise UserError(
                f"{folder} and {training} lead to the same images of {first_few(same)}: what is measured on images "
                "that are trained on would say too much; leave one of the two out"
            )
        evaluated[name] = TransformedImages(images, preprocessing.transform())
    kept: list[int] | None = None  # all
    if "val" not in others:
        fraction = val_fraction or _VAL_FRACTION
        kept, held_out = stratified_split(train.targets, fraction, seed, train.classes)
        evaluated["val"] = TransformedImages(train, preprocessing.transform(), held_out)
    return Splits(
        class_names=tuple(train.classes),
        train=TransformedImages(train, training_transform, kept),
        val=evaluated["val"],
        test=evaluated.get("test", evaluated["val"]),
        validated="validation images" if "val" in others else HELD_OUT,
        tested="test images" if "test" in others else NO_TEST_SET,
    )


class _ClassFolders:
    """A dataset of images and class numbers, those of ``folder/CLASS/*`` and of the folders below, in order."""

    def __init__(self, folder: Path, class_names: Sequence[str], preprocessing: Preprocessing) -> None:
        self.classes = class_names
        self.preprocessing = preprocessing
        self.samples: list[tuple[str, int]] = []
        self.left_out: list[str] = []
        for number, name in enumerate(class_names):
            for path in sorted(files_below(folder / name), key=lambda path: (str(path.parent), path.name)):
                if is_image(path):
                    self.samples.append((str(path), number))
                else:
                    self.left_out.append(str(path.relative_to(folder)))
        self.targets = [number for _, number in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, number = self.samples[index]
        return self.preprocessing.read(path), number


def read_class_folders(folder: Path, preprocessing: Preprocessing) -> _ClassFolders:
    """The images of ``folder/CLASS/*`` as a dataset of images and class numbers; warns of files that are left out.

    Raises:
        UserError: the folder is missing, has no classes, a class has no images, or its name is not text.
    """
    wanted = "it should hold one folder of images for each class"
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; {wanted}")
    names = [path.name for path in folders_in(folder)]
    if not names:
        raise UserError(f"there is no folder in {folder}; {wanted}")
    if unreadable := [name for name in names if name.encode(errors="ignore").decode() != name]:
        raise UserError(f"the name of the folder {shortened(unreadable[0])} in {folder} is not UTF-8; rename it")
    images = _ClassFolders(folder, names, preprocessing)
    if empty := sorted({*range(len(names))} - {*images.targets}):
        raise UserError(
            f"{folder} has no image of {first_few([names[number] for number in empty])}; {wanted}, with "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    if images.left_out:
        names_left_out = first_few(images.left_out)
        warnings.warn(
            f"{folder} holds files that do not end as images do, and are left out: {names_left_out}", stacklevel=2
        )
    return images
