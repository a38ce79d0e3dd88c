from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from efficient_densenet.errors import UserError
from efficient_densenet.training.data.images import (
    TransformedImages,
    UnreadableImageError,
    files_below,
    read_image,
    stratified_split,
)


def gradient_image(size: int = 16, mode: str = "RGB") -> Image.Image:
    ramp = np.linspace(0, 255, size * size).astype(np.uint8).reshape(size, size)
    return Image.fromarray(ramp).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_reads_every_colour_mode(tmp_path: Path, mode: str) -> None:
    gradient_image(mode=mode).save(tmp_path / "image.png")
    image = read_image(tmp_path / "image.png")
    assert image.size == (16, 16)
    assert image.mode == mode


def test_grey_images_of_16_bits_keep_all_of_them(tmp_path: Path) -> None:
    values = np.array([[0, 1, 0x8000, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "xray.png")
    torch.testing.assert_close(read_image(tmp_path / "xray.png"), torch.from_numpy(values[None] / np.float32(65535)))
    windowed = read_image(tmp_path / "xray.png", value_range=(1, 0x8000))
    assert windowed.tolist() == [[[0, 0, 1, 1]]]


def damaged(kind: str, path: Path) -> None:
    if kind == "32 bits":
        Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(path, "tiff")
        return
    gradient_image(64).save(path, "png")
    contents = path.read_bytes()
    path.write_bytes({"cut": contents[: len(contents) // 2], "empty": b"", "no image": b"hello"}[kind])


@pytest.mark.parametrize("kind", ["cut", "empty", "no image", "32 bits"])
def test_a_damaged_image_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "broken.tif"
    damaged(kind, path)
    with pytest.raises(UnreadableImageError, match=r"broken\.tif"):
        read_image(path)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png"):
        read_image(tmp_path / "gone.png")


def error_from(loader: DataLoader) -> str:
    try:
        list(loader)
    except UserError as error:
        # Its traceback would keep the workers, which Python's garbage collector takes seconds to end.
        return str(error.with_traceback(None))
    pytest.fail("every image was read")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_is_one_line_also_from_a_worker(tmp_path: Path, num_workers: int) -> None:
    (tmp_path / "cats").mkdir()
    damaged("cut", tmp_path / "cats" / "broken.png")
    images = TransformedImages(datasets.ImageFolder(str(tmp_path), loader=read_image), v2.PILToTensor())
    message = error_from(DataLoader(images, num_workers=num_workers))
    assert re.fullmatch(r"cannot read the image '.*broken\.png' \(.*\); replace or remove it", message)


@pytest.mark.parametrize("link", ["images", "zebras"])
def test_files_below_a_folder(tmp_path: Path, link: str) -> None:
    """A folder that can be reached under two names is read under the first; a link to nothing is no file."""
    for name in (".cache/set/1.png", "photos/2.png", "photos/.3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "cached").symlink_to(tmp_path / ".cache/set")
    (tmp_path / link).symlink_to(tmp_path / "photos")
    (tmp_path / "photos/above").symlink_to(tmp_path)
    (tmp_path / "photos/gone.png").symlink_to(tmp_path / "nothing")
    found = [str(path.relative_to(tmp_path)) for path in files_below(tmp_path)]
    assert found == ["cached/1.png", f"{min(link, 'photos')}/2.png"]
    assert [path.name for path in files_below(tmp_path / link)] == ["2.png"]


def test_the_error_survives_pickling() -> None:
    error = UnreadableImageError("cannot read the image 'a: b.png'")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "cannot read the image 'a: b.png'"


def test_a_split_is_stratified_seeded_and_complete() -> None:
    labels = [0] * 60 + [1] * 30
    kept, held_out = stratified_split(labels, fraction=1 / 3, seed=0)
    assert sorted(kept + held_out) == list(range(90))
    assert sum(labels[index] for index in held_out) == 10
    assert stratified_split(labels, fraction=1 / 3, seed=0) == (kept, held_out)
    assert stratified_split(labels, fraction=1 / 3, seed=1)[1] != held_out


@pytest.mark.parametrize("labels", [[0, 0, 0, 1], [0, 0, 1, 1], [0]])
def test_too_few_images_to_split(labels: list[int]) -> None:
    with pytest.raises(UserError, match="cannot hold out"):
        stratified_split(labels, fraction=0.2, seed=0)


def test_the_class_that_is_too_small_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot hold out 0.2 of 4 images .* \(the smallest, dog, has 1\): give more"):
        stratified_split([0, 0, 0, 1], 0.2, 0, ["cat", "dog"])
