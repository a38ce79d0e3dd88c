"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2

from efficient_densenet.errors import UserError
from efficient_densenet.training.data.augmentation import shifted_crop
from efficient_densenet.training.data.base import HELD_OUT, ImageDataModule, Splits
from efficient_densenet.training.data.images import TransformedImages, stratified_split
from efficient_densenet.training.data.preprocessing import Preprocessing

_SIZE = 32


class CIFAR10(ImageDataModule):
    """60,000 colour images of 32×32 pixels in 10 classes: 50,000 to train on, 10,000 for test.

    Augmentation as in the paper: pad 4, crop, mirror.

    Args:
        root: the folder that holds the archive (``cifar-10-python.tar.gz``, ``cifar-100-python.tar.gz``) or what was
            unpacked from it.
        val_fraction: the share of the training images that is held out for validation; 0: validation is on the test
            set, as in the paper.
        download: get the archive from its web site if it is not there.
    """

    source = datasets.CIFAR10
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

    def __init__(self, root: str = "data", val_fraction: float = 0.0, download: bool = False, **kwargs: Any) -> None:
        super().__init__(Preprocessing(in_channels=3, size=_SIZE, mean=self.mean, std=self.std), **kwargs)
        if not 0 <= val_fraction < 1:
            raise UserError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
        self.root = Path(root).expanduser()
        self.val_fraction = val_fraction
        self.download = download

    def prepare_data(self) -> None:
        """Unpack the archive, and download it before if that is wanted; nothing is done where all files are right."""
        if self._is_unpacked():
            return
        archive = self.root / self.source.filename
        if not self.download and not archive.exists():
            raise UserError(self._missing())
        if not self.download and not check_integrity(str(archive), self.source.tgz_md5):
            raise UserError(
                f"{archive} is cut short or corrupt (its MD5 sum is not {self.source.tgz_md5}); "
                f"get it again from {self.source.url}, or set download to true"
            )
        try:
            self.source(self.root, download=True)  # an intact archive is unpacked without a download
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot get {self.source.url} and unpack it in {self.root} ({error}); try again, or put the file there"
            ) from error

    def load(self) -> Splits:
        if not self._is_unpacked():
            raise UserError(self._missing())
        train, test = self.source(self.root, train=True), self.source(self.root, train=False)
        training_transform = self.training_transform(
            shifted_crop(self.preprocessing, padding=4), v2.RandomHorizontalFlip()
        )
        evaluation_transform = self.preprocessing.transform()
        tested = validated = TransformedImages(test, evaluation_transform)
        kept: list[int] | None = None  # all
        said = "validation images (the test images, as in the paper)"
        if self.val_fraction:
            kept, held_out = stratified_split(train.targets, self.val_fraction, self.seed)
            validated = TransformedImages(train, evaluation_transform, held_out)
            said = HELD_OUT
        return Splits(
            class_names=tuple(train.classes),
            train=TransformedImages(train, training_transform, kept),
            val=validated,
            test=tested,
            validated=said,
        )

    def _is_unpacked(self) -> bool:
        meta = (self.source.meta["filename"], self.source.meta["md5"])
        return all(
            check_integrity(str(self.root / self.source.base_folder / name), md5)
            for name, md5 in [*self.source.train_list, *self.source.test_list, meta]
        )

    def _missing(self) -> str:
        return (
            f"{self.root / self.source.base_folder} is missing or incomplete; put {self.source.filename} from "
            f"{self.source.url} into {self.root}, or set download to true"
        )


class CIFAR100(CIFAR10):
    """60,000 other images in 100 classes; everything else is as for CIFAR-10."""

    source = datasets.CIFAR100
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
