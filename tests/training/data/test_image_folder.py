from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from efficient_densenet.errors import UserError
from efficient_densenet.training.data import ImageFolder
from efficient_densenet.training.data.images import TransformedImages


def make_classes(folder: Path, classes: Sequence[str] = ("cat", "dog"), count: int = 5, mode: str = "RGB") -> None:
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (40, 52, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{number}.png")


def loaded(root: Path, **arguments: object) -> ImageFolder:
    data = ImageFolder(root=str(root), **{"size": 32, "batch_size": 4, "num_workers": 0, **arguments})
    data.setup()
    return data


def test_folders_for_train_val_and_test(tmp_path: Path) -> None:
    for name, count in (("train", 5), ("val", 3), ("test", 2)):
        make_classes(tmp_path / name, count=count)
    splits = loaded(tmp_path).splits
    assert [len(images) for images in (splits.train, splits.val, splits.test)] == [10, 6, 4]
    assert splits.class_names == ("cat", "dog")


@pytest.mark.parametrize("names", [("Train", "Val", "Test"), ("training", "validation", "testing"), ("train", "valid")])
def test_folders_for_splits_under_their_other_names(tmp_path: Path, names: Sequence[str]) -> None:
    for name in names:
        make_classes(tmp_path / name)
    splits = loaded(tmp_path).splits
    assert splits.class_names == ("cat", "dog")
    assert (splits.test is splits.val) == (len(names) == 2)


def test_splits_beside_other_folders(tmp_path: Path) -> None:
    make_classes(tmp_path / "masks")
    for name in ("Train", "Valid"):
        make_classes(tmp_path / name)
    assert loaded(tmp_path).class_names == ("cat", "dog")


def test_two_folders_for_one_split(tmp_path: Path) -> None:
    for name in ("train", "val", "valid"):
        make_classes(tmp_path / name)
    with pytest.raises(UserError, match="several folders for val: val, valid"):
        loaded(tmp_path)


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    make_classes(tmp_path, ("Train", "Bus"))
    assert loaded(tmp_path).class_names == ("Bus", "Train")


AVIF = ["avif"] if ".avif" in Image.registered_extensions() else []  # where Pillow was built with it


@pytest.mark.parametrize("suffix", ["gif", "jfif", "jp2", *AVIF, "tif", "webp"])
def test_images_of_other_formats(tmp_path: Path, suffix: str) -> None:
    make_classes(tmp_path)
    for file in tmp_path.glob("*/*.png"):
        Image.open(file).save(file.with_suffix(f".{suffix}"))
        file.unlink()
    data = loaded(tmp_path)
    assert sum(len(images) for images, _ in chain(data.train_dataloader(), data.val_dataloader())) == 10


def test_files_that_are_left_out_are_named(tmp_path: Path) -> None:
    make_classes(tmp_path)
    for name in ("cat/notes.txt", "dog/new/1.heic", "dog/.hidden/1.png", "dog/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"left out: cat/notes.txt, dog/new/1.heic$"):
        splits = loaded(tmp_path).splits
    assert len(splits.train) + len(splits.val) == 10


@pytest.mark.parametrize("link", ["val", "test/dog"])
def test_images_that_are_trained_on_are_not_evaluated_through_a_link(tmp_path: Path, link: str) -> None:
    make_classes(tmp_path / "train")
    make_classes(tmp_path / "test", ("cat",))
    (tmp_path / link).symlink_to(tmp_path / link.replace("val", "train").replace("test", "train"))
    with pytest.raises(UserError, match=r"lead to the same images of .*dog: what is measured"):
        loaded(tmp_path)


def test_without_a_test_folder_the_validation_images_are_tested(tmp_path: Path) -> None:
    make_classes(tmp_path / "train")
    make_classes(tmp_path / "val", count=3)
    splits = loaded(tmp_path).splits
    assert splits.test is splits.val


def test_a_single_folder_is_split(tmp_path: Path) -> None:
    make_classes(tmp_path)
    splits = loaded(tmp_path).splits
    assert (len(splits.train), len(splits.val)) == (8, 2)
    assert sorted(label for _, label in splits.val) == [0, 1]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("size", [24, 48])
def test_shapes(tmp_path: Path, size: int, in_channels: int, mode: str) -> None:
    make_classes(tmp_path, mode=mode)
    data = loaded(tmp_path, size=size, in_channels=in_channels)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape[1:] == (in_channels, size, size)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64


@pytest.mark.parametrize("horizontal_flip", [True, False])
def test_mirroring_can_be_switched_off(tmp_path: Path, horizontal_flip: bool) -> None:
    make_classes(tmp_path)
    half = np.zeros((32, 32), dtype=np.uint8)
    half[:, 16:] = 255
    for file in tmp_path.glob("*/*.png"):
        Image.fromarray(half).save(file)
    train = loaded(tmp_path, horizontal_flip=horizontal_flip).splits.train
    mirrored = {bool(image[0, 16, 8] > image[0, 16, 24]) for image, _ in [train[0] for _ in range(30)]}
    assert mirrored == ({True, False} if horizontal_flip else {False})


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        loaded(tmp_path / "nowhere")


def test_a_folder_without_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one folder of images for each class"):
        loaded(tmp_path)


@pytest.mark.parametrize("names", [("val",), ("val", "test")])
def test_a_split_without_training_images(tmp_path: Path, names: Sequence[str]) -> None:
    for name in names:
        make_classes(tmp_path / name)
    with pytest.raises(UserError, match=r"there is no folder .*train"):
        loaded(tmp_path)


def files_of(images: TransformedImages) -> set[str]:
    return {images.images.samples[i][0] for i in images.indices}


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "Testing"), ("train",)])
def test_without_a_validation_folder_training_images_are_held_out(tmp_path: Path, names: Sequence[str]) -> None:
    for name in names:
        make_classes(tmp_path / name)
    splits = loaded(tmp_path).splits
    assert files_of(splits.train) | files_of(splits.val) == {str(path) for path in (tmp_path / names[0]).glob("*/*")}
    assert (len(splits.train), len(splits.val)) == (8, 2)
    assert sorted(label for _, label in splits.val) == [0, 1]
    assert all(torch.equal(splits.val[0][0], splits.val[0][0]) for _ in range(5))  # nothing is drawn at random
    if len(names) == 2:  # what is tested takes no part in the choice of an epoch
        assert files_of(splits.test) == {str(path) for path in (tmp_path / names[1]).glob("*/*")}
        assert splits.tested == "test images"
    assert files_of(loaded(tmp_path).splits.val) == files_of(splits.val)
    assert len({frozenset(files_of(loaded(tmp_path, seed=seed).splits.val)) for seed in range(4)}) > 1
    assert len(loaded(tmp_path, val_fraction=0.4).splits.val) == 4


def test_how_images_are_divided_is_said(tmp_path: Path) -> None:
    for name, count in (("train", 5), ("test", 2)):
        make_classes(tmp_path / name, count=count)
    held_out = "8 training images, 2 validation images (held out from the training images)"
    assert loaded(tmp_path).divided == f"{held_out}, 4 test images"
    assert loaded(tmp_path / "train").divided == held_out
    make_classes(tmp_path / "val", count=3)
    assert loaded(tmp_path).divided == "10 training images, 6 validation images, 4 test images"
    with pytest.raises(UserError, match=r"val has the validation images: leave val_fraction out"):
        loaded(tmp_path, val_fraction=0.2)


def test_folders_that_might_have_been_meant_for_validation_are_named(tmp_path: Path) -> None:
    for name in ("train", "test", "dev"):
        make_classes(tmp_path / name)
    with pytest.warns(UserWarning, match=r"has no folder val, and its dev is not used"):
        loaded(tmp_path)


def test_test_images_without_classes_are_left_out(tmp_path: Path) -> None:
    make_classes(tmp_path / "train")
    (tmp_path / "test").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "test" / "1.png")
    with pytest.warns(UserWarning, match=r"test has no folder for each class, .* look at them with predict"):
        splits = loaded(tmp_path).splits
    assert splits.test is splits.val


def test_a_class_without_images(tmp_path: Path) -> None:
    make_classes(tmp_path)
    (tmp_path / "unicorn").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path.name}.* unicorn"):
        loaded(tmp_path)


def test_links_to_folders_above_and_to_nothing_are_not_followed(tmp_path: Path) -> None:
    """Otherwise images of one class would be read as another's."""
    make_classes(tmp_path)
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "cat" / "gone.png").symlink_to("nowhere.png")
    splits = loaded(tmp_path).splits
    assert len(splits.train) + len(splits.val) == 10
    elsewhere = tmp_path / "linked"
    elsewhere.mkdir()
    for name in ("cat", "dog"):
        (elsewhere / name).symlink_to(tmp_path / name)
    assert files_of(loaded(elsewhere).splits.val) == {
        path.replace(str(tmp_path), str(elsewhere)) for path in files_of(splits.val)
    }


def test_a_class_whose_name_is_not_text(tmp_path: Path) -> None:
    make_classes(tmp_path)
    os.rename(os.fsencode(tmp_path / "cat"), os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(UserError, match=r"the name of the folder caf.* is not UTF-8; rename it"):
        loaded(tmp_path)


def test_classes_that_differ(tmp_path: Path) -> None:
    make_classes(tmp_path / "train", ("cat", "dog"))
    make_classes(tmp_path / "val", ("cat", "bird"))
    with pytest.raises(UserError, match="the same classes, but only one of them has bird, dog"):
        loaded(tmp_path)


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    make_classes(tmp_path)
    broken = tmp_path / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    data = loaded(tmp_path)
    with pytest.raises(UserError, match=str(broken)):
        list(chain(data.train_dataloader(), data.val_dataloader()))


@pytest.mark.parametrize("fraction", [0, 1])
def test_a_fraction_that_leaves_nothing(fraction: float) -> None:
    with pytest.raises(UserError, match="val_fraction"):
        ImageFolder(root="nowhere", val_fraction=fraction)
