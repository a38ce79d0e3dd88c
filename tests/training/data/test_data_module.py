from __future__ import annotations

from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn

from efficient_densenet.errors import UserError
from efficient_densenet.training.data import ImageDataModule, Preprocessing
from efficient_densenet.training.data.base import Splits
from efficient_densenet.training.data.images import TransformedImages


class Numbers(ImageDataModule):
    """`count` one-pixel images that show their own number."""

    def __init__(self, count: int, **kwargs: Any) -> None:
        super().__init__(Preprocessing(in_channels=1, size=1, mean=(0.0,), std=(1 / 255,)), **kwargs)
        self.count = count

    def load(self) -> Splits:
        images = [
            (Image.fromarray(np.full((1, 1), number, dtype=np.uint8)), number % 2) for number in range(self.count)
        ]
        data = TransformedImages(images, self.preprocessing.transform())
        return Splits(("even", "odd"), data, data, data)


def numbers(count: int, processes: int = 1, **kwargs: Any) -> Numbers:
    data = Numbers(count, num_workers=kwargs.pop("num_workers", 0), **kwargs)
    data.trainer = SimpleNamespace(world_size=processes)
    data.setup()
    return data


def shown(loader: Any) -> list[list[int]]:
    return [images.flatten().round().int().tolist() for images, _ in loader]


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [
        (12, 4, [4, 4, 4]),
        (14, 4, [4, 4, 4, 2]),
        (13, 4, [4, 4, 4]),  # a batch of one image has no variance to normalise with
        (3, 4, [3]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_training_drops_nothing_but_a_last_batch_of_one(count: int, batch_size: int, sizes: list[int]) -> None:
    data = numbers(count, batch_size=batch_size)
    assert [len(batch) for batch in shown(data.train_dataloader())] == sizes
    assert list(chain(*shown(data.val_dataloader()))) == list(range(count))


def test_training_images_are_shuffled_anew_each_epoch_and_by_the_seed() -> None:
    data = numbers(64, batch_size=64)
    torch.manual_seed(0)
    loader = data.train_dataloader()
    (first,), (second,) = shown(loader), shown(loader)
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second != list(range(64))
    torch.manual_seed(0)
    assert shown(data.train_dataloader()) == [first]


def test_the_batch_is_shared_by_the_processes() -> None:
    data = numbers(16, processes=4, batch_size=8)
    assert data.train_dataloader().batch_size == data.val_dataloader().batch_size == 2


@pytest.mark.parametrize(("count", "dropped"), [(17, False), (18, True), (16, False)])
def test_the_last_batch_is_that_of_a_process(count: int, dropped: bool) -> None:
    # two processes have 9, 9 and 8 images, in batches of 3, 4 and 3
    batch_size = 8 if dropped else 6
    assert numbers(count, processes=2, batch_size=batch_size).train_dataloader().drop_last is dropped


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(UserError, match=r"batch_size 6 .* 4 processes"):
        numbers(8, processes=4, batch_size=6).train_dataloader()


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"num_workers": -1}])
def test_numbers_out_of_range(arguments: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        Numbers(4, **arguments)


def test_the_classes_are_known_after_setup_alone() -> None:
    data = Numbers(4)
    with pytest.raises(RuntimeError, match="setup"):
        _ = data.num_classes
    data.setup()
    assert (data.class_names, data.num_classes, data.in_channels, data.input_size) == (("even", "odd"), 2, 1, 1)


def test_workers_stay_between_epochs() -> None:
    data = numbers(8, num_workers=1, batch_size=4)
    assert data.train_dataloader().persistent_workers
    assert list(chain(*shown(data.val_dataloader()))) == list(range(8))


class Perceptron(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1), nn.Linear(1, 2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("images", float(len(batch[0])), reduce_fx="sum", batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_trains_on_it() -> None:
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Perceptron(), datamodule=Numbers(9, batch_size=4, num_workers=0))
    assert trainer.global_step == 2 * 2
    assert trainer.callback_metrics["images"] == 9


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Digits", {}),
        ("CIFAR10", {"root": "nowhere", "val_fraction": 0.1}),
        ("CIFAR100", {"root": "nowhere", "download": False}),
        ("ImageFolder", {"root": "nowhere", "size": 32, "in_channels": 1, "horizontal_flip": False}),
        ("ImageNet", {"root": "nowhere"}),
    ],
)
def test_a_configuration_file_can_name_it_without_touching_the_disk(name: str, arguments: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    shared = {"batch_size": 32, "num_workers": 0, "seed": 7}
    configured = parser.parse_object(
        {"data": {"class_path": f"efficient_densenet.training.data.{name}", "init_args": {**arguments, **shared}}}
    )
    data = parser.instantiate_classes(configured).data
    assert type(data).__name__ == name
    assert {key: getattr(data, key) for key in shared} == shared
