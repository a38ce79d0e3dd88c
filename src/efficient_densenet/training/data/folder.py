"""Any folder of images by class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchvision import datasets
from torchvision.transforms import v2

from efficient_densenet.errors import UserError
from efficient_densenet.training.data.augmentation import shifted_crop
from efficient_densenet.training.data.base import NO_TEST_SET, ImageDataModule, Splits
from efficient_densenet.training.data.images import TransformedImages, is_image, read_image, stratified_split
from efficient_densenet.training.data.preprocessing import Preprocessing, convert_mode, to_tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_GREY_MEAN = (0.449,)  # the average of ImageNet's channels
_GREY_STD = (0.226,)
_MAX_SMALL_SIZE = 32  # the largest images for which the network has the CIFAR stem


class ImageFolder(ImageDataModule):
    """Images in one folder per class: ``root/train/CLASS/*`` and ``root/val/CLASS/*``, or ``root/CLASS/*`` alone.

    ``root/test/CLASS/*`` is used for test if it is there; otherwise the validation images are. Augmentation: up to 32
    pixels, as for CIFAR: resize, pad by an eighth, crop. Above, as for ImageNet: a random part of the image, resized.

    Args:
        root: the folder.
        size: side of the square images that the network gets, in pixels.
        in_channels: 3 for colour, 1 for grey; images are converted.
        val_fraction: the share of the images that is held out for validation where there is no ``val`` folder.
        horizontal_flip: mirror every second training image; not for text, or where left and right differ.
    """

    def __init__(
        self,
        root: str,
        size: int = 224,
        in_channels: int = 3,
        val_fraction: float = 0.2,
        horizontal_flip: bool = True,
        **kwargs: Any,
    ) -> None:
        preprocessing = Preprocessing(
            in_channels=in_channels,
            size=size,
            mean=IMAGENET_MEAN if in_channels == 3 else _GREY_MEAN,
            std=IMAGENET_STD if in_channels == 3 else _GREY_STD,
            resize=None if size <= _MAX_SMALL_SIZE else round(size * 256 / 224),
        )
        super().__init__(preprocessing, **kwargs)
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction must be above 0 and below 1, not {val_fraction}")
        self.root = Path(root).expanduser()
        self.val_fraction = val_fraction
        self.horizontal_flip = horizontal_flip

    def load(self) -> Splits:
        if any((self.root / name).is_dir() for name in ("train", "val")):
            return load_split_folders(self.root, self._training_transform(), self.preprocessing)
        images = read_class_folders(self.root)
        kept, held_out = stratified_split(images.targets, self.val_fraction, self.seed)
        validated = TransformedImages(images, self.preprocessing.transform(), held_out)
        return Splits(
            class_names=tuple(images.classes),
            train=TransformedImages(images, self._training_transform(), kept),
            val=validated,
            test=validated,
            tested=NO_TEST_SET,
        )

    def _training_transform(self) -> v2.Transform:
        size = self.preprocessing.size
        if size <= _MAX_SMALL_SIZE:
            crop = [v2.Resize(size), shifted_crop(self.preprocessing, padding=size // 8)]
        else:
            crop = [v2.RandomResizedCrop(size)]
        flip = [v2.RandomHorizontalFlip()] if self.horizontal_flip else []
        return v2.Compose([convert_mode(self.in_channels), *crop, *flip, to_tensor(), self.preprocessing.normalize()])


def load_split_folders(root: Path, training_transform: v2.Transform, preprocessing: Preprocessing) -> Splits:
    """The images of ``root/train``, ``root/val`` and, if it is there, ``root/test`` (otherwise ``val`` again).

    Raises:
        UserError: a folder is missing, has no classes or no images, or the classes of the folders differ.
    """
    train = read_class_folders(root / "train")
    evaluated = {}
    for name in ("val", "test"):
        if name == "test" and not (root / name).is_dir():
            continue
        images = read_class_folders(root / name)
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


def read_class_folders(folder: Path) -> datasets.ImageFolder:
    """The images of ``folder/CLASS/*`` as a dataset of PIL images and class numbers.

    Raises:
        UserError: the folder is missing, has no classes, or a class has no images.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; it should hold one folder of images for each class")
    try:
        return _VisibleImages(str(folder), loader=read_image, is_valid_file=is_image)
    except FileNotFoundError as error:
        raise UserError(f"{folder} should hold one folder of images for each class: {error}") from error
