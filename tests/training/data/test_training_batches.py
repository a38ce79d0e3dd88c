"""What training does to images and batches beside evaluation: augmentation, mixing, sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from efficient_densenet.training.data import ImageDataModule, Preprocessing
from efficient_densenet.training.data.augmentation import shifted_crop, training_transform
from efficient_densenet.training.data.base import Splits
from efficient_densenet.training.data.images import TransformedImages


class Unequal(ImageDataModule):
    """30 images of one grey pixel in class 0, and 10 in class 1; those of class 1 are white."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(Preprocessing(in_channels=1, size=2, mean=(0.0,), std=(1.0,)), num_workers=0, **kwargs)

    def load(self) -> Splits:
        classes = [0] * 30 + [1] * 10
        images = [(Image.fromarray(np.full((2, 2), 255 * c, dtype=np.uint8)), c) for c in classes]
        data = TransformedImages(images, self.training_transform())
        return Splits(("black", "white"), data, data, data)


def batches(**arguments: Any) -> list[Any]:
    torch.manual_seed(0)
    data = Unequal(**arguments)
    data.setup()
    return list(data.train_dataloader())


def test_sampling_can_balance_the_classes():
    assert sum(targets.sum().item() for _, targets in batches(batch_size=40)) == 10
    ((_, drawn),) = batches(batch_size=40, sampling="balanced")
    assert 12 <= drawn.sum() <= 28


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_targets_are_the_shares_of_the_images(kind):
    for images, targets in batches(batch_size=40, **{kind: 1.0}):
        assert targets.shape == (40, 2)
        torch.testing.assert_close(images.mean((1, 2, 3)), targets[:, 1])  # an image is as white as its share
        torch.testing.assert_close(targets.sum(1), torch.ones(40))


def test_with_both_each_batch_draws_one():
    kinds = {
        "cutmix" if ((images == 0) | (images == 1)).all() else "mixup"
        for images, _ in batches(batch_size=4, mixup=1.0, cutmix=1.0)
    }
    assert kinds == {"mixup", "cutmix"}


def test_augmentation_follows_the_crop_and_erases_what_is_normalised():
    preprocessing = Preprocessing(in_channels=3, size=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    erase = v2.RandomErasing(p=1.0, scale=(0.2, 0.4))
    transform = training_transform(preprocessing, [v2.CenterCrop(4)], [erase, v2.RandomInvert(p=1.0)])
    image = transform(Image.new("RGB", (6, 6), "black"))
    assert image.shape == (3, 4, 4)
    assert set(image.flatten().tolist()) == {1.0, 0.0}  # inverted to white; erased to the mean colour


@pytest.mark.parametrize("in_channels", [1, 3])
def test_films_of_16_bits_are_augmented_like_images_of_8(in_channels):
    preprocessing = Preprocessing(in_channels, size=8, mean=(0.4,) * in_channels, std=(0.5,) * in_channels)
    transform = training_transform(preprocessing, [shifted_crop(preprocessing, 4), v2.RandomHorizontalFlip()])
    pixels = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)
    torch.manual_seed(3)
    image = transform(Image.fromarray(pixels[0].numpy()))
    torch.manual_seed(3)
    torch.testing.assert_close(transform(pixels / 255), image)
    assert training_transform(preprocessing, [v2.RandAugment()])(pixels / 255).isfinite().all()
