"""Scikit-learn's scanned digits: real images that come with a package, so that nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms import v2

from efficient_densenet.errors import require
from efficient_densenet.training.data.base import HELD_OUT, NO_TEST_SET, ImageDataModule, Splits
from efficient_densenet.training.data.images import TransformedImages, stratified_split
from efficient_densenet.training.data.preprocessing import Preprocessing

_BRIGHTEST = 16  # the scans have the intensities 0 to 16


class Digits(ImageDataModule):
    """1,797 handwritten digits of 8×8 grey pixels: 1,198 to train on, a third held out for validation and test.

    Augmentation: a shift of up to one pixel. Nothing is mirrored: a mirrored 2 is no 2.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(Preprocessing(in_channels=1, size=8, mean=(0.305,), std=(0.376,)), **kwargs)

    def load(self) -> Splits:
        digits = require("sklearn.datasets", "train").load_digits()
        pixels = (digits.images * (255 / _BRIGHTEST)).round().astype(np.uint8)
        labels = digits.target.tolist()
        images = [(Image.fromarray(image), label) for image, label in zip(pixels, labels, strict=True)]
        kept, held_out = stratified_split(labels, fraction=1 / 3, seed=self.seed)
        training_transform = self.training_transform(v2.RandomCrop(self.input_size, padding=1))
        evaluated = TransformedImages(images, self.preprocessing.transform(), held_out)
        return Splits(
            class_names=tuple(str(name) for name in digits.target_names),
            train=TransformedImages(images, training_transform, kept),
            val=evaluated,
            test=evaluated,
            validated=HELD_OUT,
            tested=NO_TEST_SET,
        )
