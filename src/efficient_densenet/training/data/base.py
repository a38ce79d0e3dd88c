"""What all data modules share: the splits, and the loaders that serve them."""

from __future__ import annotations

from collections.abc import Callable, Sized
from math import ceil
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchvision.transforms import v2

from efficient_densenet.errors import UserError
from efficient_densenet.training.data.augmentation import MixedBatches, training_transform
from efficient_densenet.training.data.images import TransformedImages
from efficient_densenet.training.data.preprocessing import Preprocessing


class Splits(NamedTuple):
    """Datasets of tensors ``(C, H, W)`` and class numbers, and the names of the classes in the order of numbers.

    `validated` and `tested` say what `val` and `test` are, for people to read.
    """

    class_names: tuple[str, ...]
    train: TransformedImages
    val: TransformedImages
    test: TransformedImages
    validated: str = "validation images"
    tested: str = "test images"


HELD_OUT = "validation images (held out from the training images)"
NO_TEST_SET = "validation images (there is no test set)"


def division(seed: int, train: Sized, val: Sized) -> dict[str, int]:
    """What says which images are held out, where they are drawn: another seed or share gives others."""
    return {"seed": seed, "kept": len(train), "held_out": len(val)}


class ImageDataModule(LightningDataModule):
    """Images by class, in batches of ``(images (N, in_channels, H, W), classes (N,))``. Where `multi_label` is true,
    the targets are ``(N, labels)``: 1 has the label, 0 has it not, NaN is unknown.

    A subclass defines `load`. Nothing is read before `setup` (or `prepare_data`); the classes are known after it.

    Args:
        preprocessing: what evaluation does to one image.
        batch_size: images of one optimiser step over all processes: each of W loads ``batch_size / W``. The trainer's
            ``accumulate_grad_batches`` multiplies it.
        num_workers: processes that load images, for each training process; 0: the training process does it.
        seed: decides which images are held out, where no held-out set is given. Order and augmentation of the training
            images are drawn from PyTorch's random numbers (``lightning.seed_everything(seed, workers=True)``).
        sampling: ``balanced`` draws training images so that every class comes equally often, with replacement.
        augmentation: further transforms of torchvision or timm for training images, ``RandAugment`` for example; they
            follow the data's own. A ``RandomErasing`` comes after normalisation, where zero is the mean colour.
        mixup: draws the share of the other image from Beta(α, α) and mixes images and targets of a batch (Zhang et al.,
            ICLR 2018); 0: none.
        cutmix: likewise, by a rectangle of the other image (Yun et al., ICCV 2019). With both, each batch draws one.

    Raises:
        UserError: an argument is out of range, or (from the loaders) `batch_size` is not a multiple
            of the number of processes; from `setup`, the data is missing or damaged.
    """

    multi_label = False

    def __init__(
        self,
        preprocessing: Preprocessing,
        batch_size: int = 64,
        num_workers: int = 2,
        seed: int = 0,
        sampling: Literal["natural", "balanced"] = "natural",
        augmentation: list[Callable] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        if num_workers < 0:
            raise UserError(f"num_workers must be 0 or more, not {num_workers}")
        if min(mixup, cutmix) < 0:
            raise UserError(f"mixup and cutmix must be 0 or more, not {mixup} and {cutmix}")
        if sampling == "balanced" and self.multi_label:
            raise UserError("sampling balanced is for images of one class; with several labels use model.class_weights")
        self.preprocessing = preprocessing
        self.sampling = sampling
        self.augmentation = augmentation or []
        self.mixup = mixup
        self.cutmix = cutmix
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._splits: Splits | None = None

    def load(self) -> Splits:
        """Read the data from disk; a subclass says how."""
        raise NotImplementedError

    def setup(self, stage: str = "fit") -> None:
        if self._splits is None:
            self._splits = self.load()

    @property
    def splits(self) -> Splits:
        if self._splits is None:
            raise RuntimeError("the data is not read yet: call setup() first")
        return self._splits

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.splits.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        return self.preprocessing.in_channels

    @property
    def input_size(self) -> int:
        """The shorter side of the images in pixels."""
        return min(self.preprocessing.height, self.preprocessing.width)

    @property
    def tested(self) -> str:
        return self.splits.tested

    @property
    def held_out_by(self) -> dict[str, int] | None:
        """What says which images are held out from the training images; None: no image is."""
        held_out = self.splits.validated == HELD_OUT
        return division(self.seed, self.splits.train, self.splits.val) if held_out else None

    @property
    def divided(self) -> str:
        """How many images are for what, for people to read."""
        train, val, test = self.splits.train, self.splits.val, self.splits.test
        parts = [f"{len(train)} training images", f"{len(val)} {self.splits.validated}"]
        return ", ".join([*parts, f"{len(test)} test images"] if test is not val else parts)

    def training_targets(self) -> Tensor:
        """Of all training images: classes ``(N,)`` or labels ``(N, labels)``."""
        return torch.tensor(self.splits.train.targets())

    def training_transform(self, *geometry: v2.Transform, **further: Any) -> v2.Transform:
        """What training does to one image: `geometry`, which makes it as large as evaluation does, and the rest."""
        return training_transform(self.preprocessing, geometry, self.augmentation, **further)

    def train_dataloader(self) -> DataLoader:
        images = self.splits.train
        # Batch norm cannot normalise a 1×1 map of a single image, so an epoch that would end with one image leaves it
        # out. Every other remainder is trained on, and so is a set smaller than a batch.
        batch_size = self._batch_size_of_a_process()
        images_of_a_process = ceil(len(images) / self._num_processes())
        drop_last = images_of_a_process > batch_size and images_of_a_process % batch_size == 1
        order: dict[str, Any] = {"shuffle": True}
        if self.sampling == "balanced":
            classes = self.training_targets()
            weights = 1 / torch.bincount(classes)[classes]
            order = {"sampler": WeightedRandomSampler(weights, len(images))}
        if self.mixup or self.cutmix:
            classes_to_mix = None if self.multi_label else self.num_classes
            order["collate_fn"] = MixedBatches(self.mixup, self.cutmix, classes_to_mix)
        return self._loader(images, drop_last=drop_last, **order)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.splits.val)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.splits.test)

    def predict_dataloader(self) -> DataLoader:
        return self._loader(self.splits.test)

    def _loader(self, images: Dataset, **order: Any) -> DataLoader:
        return DataLoader(
            images,
            batch_size=self._batch_size_of_a_process(),
            **order,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _num_processes(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _batch_size_of_a_process(self) -> int:
        processes = self._num_processes()
        if self.batch_size % processes:
            raise UserError(
                f"batch_size {self.batch_size} cannot be shared equally by {processes} processes; "
                f"use a multiple of {processes}"
            )
        return self.batch_size // processes
