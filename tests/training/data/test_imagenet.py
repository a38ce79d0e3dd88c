from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image

from efficient_densenet.errors import UserError
from efficient_densenet.training.data import ImageNet

WNIDS = ("n01440764", "n02012849", "n99999999")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, wnid, number in itertools.product(("train", "val"), WNIDS, range(2)):
        folder = tmp_path / split / wnid
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 260), (200, 90, 30)).save(folder / f"{number}.JPEG")
    return tmp_path


def loaded(root: Path) -> ImageNet:
    data = ImageNet(root=str(root), batch_size=6, num_workers=0)
    data.setup()
    return data


def test_evaluation_crops_and_normalises_alone(root: Path) -> None:
    data = loaded(root)
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (6, 3, 224, 224)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.preprocessing.resize == 256
    assert torch.equal(images[0], images[1])


def test_every_training_image_has_its_own_colours(root: Path) -> None:
    images, _ = next(iter(loaded(root).train_dataloader()))
    assert images.shape == (6, 3, 224, 224)
    # the files are all of one colour
    assert len({tuple(image[:, 100, 100].tolist()) for image in images}) == 6


def test_the_names_of_the_classes_are_those_of_the_meta_file(root: Path) -> None:
    torch.save(({"n01440764": ("tench", "Tinca tinca"), "n02012849": ("crane",)}, []), root / "meta.bin")
    assert loaded(root).class_names == ("tench", "crane", "n99999999")


def test_without_a_meta_file_the_names_are_the_folders(root: Path) -> None:
    assert loaded(root).class_names == WNIDS


def test_a_damaged_meta_file(root: Path) -> None:
    torch.save(({"n01440764": ("tench",)}, []), root / "meta.bin")
    contents = (root / "meta.bin").read_bytes()
    for damaged in (b"", b"hello", contents[: len(contents) // 2], contents[:-30]):
        (root / "meta.bin").write_bytes(damaged)
        with pytest.raises(UserError, match=r"meta\.bin is damaged"):
            loaded(root)


def test_missing_folders_name_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path.name}.*prepare-imagenet"):
        loaded(tmp_path)
