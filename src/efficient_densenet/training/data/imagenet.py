"""ImageNet (ILSVRC 2012), 1,000 classes."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torchvision.datasets.imagenet import META_FILE, load_meta_file
from torchvision.transforms import v2

from efficient_densenet.errors import UserError
from efficient_densenet.training.data.base import ImageDataModule, Splits
from efficient_densenet.training.data.folder import load_class_folders
from efficient_densenet.training.data.lighting import PCALighting
from efficient_densenet.training.data.photos import IMAGENET_MEAN, IMAGENET_STD
from efficient_densenet.training.data.preprocessing import Preprocessing


class ImageNet(ImageDataModule):
    """ImageNet from the folders that ``efficient-densenet prepare-imagenet`` makes, at 224×224 pixels.

    Augmentation: a random part of the image, resized; mirror; colour jitter; PCA lighting. Evaluation: the shorter
    side resized to 256, centre crop.

    Args:
        root: the folder with ``train`` and ``val``, each with one folder per class, and ``meta.bin`` with the names of
            the classes; without it the folders' names are used.
    """

    def __init__(self, root: str = "data/imagenet", **kwargs: Any) -> None:
        super().__init__(
            Preprocessing(in_channels=3, size=224, resize=256, mean=IMAGENET_MEAN, std=IMAGENET_STD), **kwargs
        )
        self.root = Path(root).expanduser()

    def load(self) -> Splits:
        if not (self.root / "train").is_dir() or not (self.root / "val").is_dir():
            raise UserError(
                f"{self.root} should hold the folders train and val; make them from the ImageNet archives with "
                f"`efficient-densenet prepare-imagenet --archives DIR --output {self.root}`"
            )
        training_transform = self.training_transform(
            v2.RandomResizedCrop(self.input_size),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
            intensities=[PCALighting()],
        )
        splits = load_class_folders(
            self.root / "train", {"val": self.root / "val"}, training_transform, self.preprocessing
        )
        names = self._names_of_folders()
        return splits._replace(class_names=tuple(names.get(folder, folder) for folder in splits.class_names))

    def _names_of_folders(self) -> dict[str, str]:
        """WordNet ID → the first of the words for the class."""
        path = self.root / META_FILE
        if not path.exists():
            return {}
        try:
            words, _ = load_meta_file(self.root)
        except (RuntimeError, UnpicklingError, EOFError, LookupError, ValueError) as error:
            raise UserError(f"{path} is damaged; delete it and run prepare-imagenet again") from error
        return {wnid: synonyms[0] for wnid, synonyms in words.items()}
