"""Volumes in NIfTI files, read and augmented by MONAI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from efficient_densenet.errors import UserError, require
from efficient_densenet.training.data.base import NO_TEST_SET, division
from efficient_densenet.training.data.images import folders_in, stratified_split

_SUFFIXES = (".nii", ".nii.gz")


class Volumes(LightningDataModule):
    """Volumes in one folder per class, ``root/CLASS/*.nii.gz``, as MONAI's dictionaries of ``image`` and ``label``.

    Each is read, turned to the axes RAS, normalised to mean 0 and deviation 1, and resized.

    Args:
        root: the folder.
        size: side of the cubes that the network gets, in voxels, or three sides.
        augmentation: MONAI's transforms for the ``image`` of training volumes; None: mirrored left to right at random,
            with other intensities.
        val_fraction: the share of the volumes that is held out for validation.
        batch_size: volumes of one step in each process.
        num_workers: processes that load volumes; 0: the training process does it.
        seed: decides which volumes are held out, and how they are augmented.

    Raises:
        MissingExtraError: MONAI or nibabel is not installed.
        UserError: from `setup`, the folder is missing or holds no classes.
    """

    in_channels = 1

    def __init__(
        self,
        root: str,
        size: int | tuple[int, int, int] = 96,
        augmentation: list[Callable] | None = None,
        val_fraction: float = 0.2,
        batch_size: int = 4,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.monai_data = require("monai.data", "monai")
        require("nibabel", "monai")
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction must be above 0 and below 1, not {val_fraction}")
        self.root = Path(root).expanduser()
        self.size = (size,) * 3 if isinstance(size, int) else size
        self.augmentation = augmentation
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.class_names: list[str] | None = None
        self.tested = NO_TEST_SET

    def setup(self, stage: str = "fit") -> None:
        if self.class_names is not None:
            return
        names = [folder.name for folder in folders_in(self.root)]
        if not names:
            raise UserError(f"there is no folder in {self.root}; it should hold one folder of volumes for each class")
        files = [
            path
            for path in sorted(self.root.glob("[!.]*/[!.]*"))  # hidden ones, as ._1.nii.gz of macOS, are no volumes
            if path.name.endswith(_SUFFIXES)
        ]
        labels = [names.index(path.parent.name) for path in files]
        if empty := set(range(len(names))) - set(labels):
            raise UserError(f"{self.root / names[min(empty)]} holds no volume ({', '.join(_SUFFIXES)})")
        volumes = [{"image": str(path), "label": label} for path, label in zip(files, labels, strict=True)]
        kept, held_out = stratified_split(labels, self.val_fraction, self.seed, names)
        transforms = require("monai.transforms", "monai")
        reading = [
            transforms.LoadImaged("image", image_only=True),
            transforms.EnsureChannelFirstd("image"),
            transforms.Orientationd("image", axcodes="RAS"),
            transforms.NormalizeIntensityd("image"),
            transforms.Resized("image", spatial_size=self.size),
        ]
        usual = [
            transforms.RandFlipd("image", prob=0.5, spatial_axis=0),
            transforms.RandScaleIntensityd("image", factors=0.1, prob=0.5),
            transforms.RandShiftIntensityd("image", offsets=0.1, prob=0.5),
        ]
        augmentation = usual if self.augmentation is None else self.augmentation
        training = transforms.Compose([*reading, *augmentation]).set_random_state(self.seed)
        self.train = self.monai_data.Dataset([volumes[i] for i in kept], training)
        self.val = self.monai_data.Dataset([volumes[i] for i in held_out], transforms.Compose(reading))
        self.class_names = names
        self.held_out_by = division(self.seed, self.train, self.val)

    def train_dataloader(self) -> Any:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> Any:
        return self._loader(self.val)

    def test_dataloader(self) -> Any:
        return self.val_dataloader()

    def _loader(self, volumes: Any, **order: Any) -> Any:
        return self.monai_data.DataLoader(volumes, batch_size=self.batch_size, num_workers=self.num_workers, **order)
