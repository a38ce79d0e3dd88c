"""What all data modules share: the splits, and the loaders that serve them."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from efficient_densenet.errors import UserError
from efficient_densenet.training.data.images import TransformedImages
from efficient_densenet.training.data.preprocessing import Preprocessing


class Splits(NamedTuple):
    """Datasets of tensors ``(C, H, W)`` and class numbers, and the names of the classes in the order of numbers.

    `tested` says what `test` is, for people to read.
    """

    class_names: tuple[str, ...]
    train: TransformedImages
    val: TransformedImages
    test: TransformedImages
    tested: str = "test images"


NO_TEST_SET = "validation images (there is no test set)"


class ImageDataModule(LightningDataModule):
    """Images by class, in batches of ``(images (N, in_channels, input_size, input_size), labels (N,))``.

    A subclass defines `load`. Nothing is read before `setup` (or `prepare_data`); the classes are known after it.

    Args:
        preprocessing: what evaluation does to one image.
        batch_size: images of one optimiser step over all processes: each of W loads ``batch_size / W``. The trainer's
            ``accumulate_grad_batches`` multiplies it.
        num_workers: processes that load images, for each training process; 0: the training process does it.
        seed: decides which images are held out, where no held-out set is given. Order and augmentation of the training
            images are drawn from PyTorch's random numbers (``lightning.seed_everything(seed, workers=True)``).

    Raises:
        UserError: `batch_size` or `num_workers` is out of range, or (from the loaders) `batch_size` is not a multiple
            of the number of processes; from `setup`, the data is missing or damaged.
    """

    def __init__(self, preprocessing: Preprocessing, batch_size: int = 64, num_workers: int = 2, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        if num_workers < 0:
            raise UserError(f"num_workers must be 0 or more, not {num_workers}")
        self.preprocessing = preprocessing
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
        return self.preprocessing.size

    def train_dataloader(self) -> DataLoader:
        images = self.splits.train
        # Batch norm cannot normalise a 1×1 map of a single image, so an epoch that would end with one image leaves it
        # out. Every other remainder is trained on, and so is a set smaller than a batch.
        batch_size = self._batch_size_of_a_process()
        images_of_a_process = ceil(len(images) / self._num_processes())
        drop_last = images_of_a_process > batch_size and images_of_a_process % batch_size == 1
        return self._loader(images, shuffle=True, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.splits.val)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.splits.test)

    def predict_dataloader(self) -> DataLoader:
        return self._loader(self.splits.test)

    def _loader(self, images: Dataset, shuffle: bool = False, drop_last: bool = False) -> DataLoader:
        return DataLoader(
            images,
            batch_size=self._batch_size_of_a_process(),
            shuffle=shuffle,
            drop_last=drop_last,
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
