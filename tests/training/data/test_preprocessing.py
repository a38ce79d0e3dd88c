from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from efficient_densenet.errors import UserError
from efficient_densenet.training.data import Preprocessing

COLOUR = Preprocessing(in_channels=3, size=4, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0), resize=8)
GREY = Preprocessing(in_channels=1, size=8, mean=(0.5,), std=(0.25,))


def image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
@pytest.mark.parametrize("preprocessing", [COLOUR, GREY])
@pytest.mark.parametrize("size", [(8, 8), (13, 9), (3, 30)])
def test_any_image_becomes_a_tensor_of_the_size(preprocessing: Preprocessing, mode: str, size: tuple[int, int]) -> None:
    tensor = preprocessing.transform()(image(*size, mode))
    assert tensor.shape == (preprocessing.in_channels, preprocessing.size, preprocessing.size)
    assert tensor.dtype == torch.float32


def test_an_image_of_the_size_is_only_normalised() -> None:
    grey = image(8, 8, "L")
    expected = (torch.from_numpy(np.asarray(grey).astype(np.float32))[None] / 255 - 0.5) / 0.25
    torch.testing.assert_close(GREY.transform()(grey), expected)


def test_each_channel_has_its_mean_and_std() -> None:
    white = Image.new("RGB", (8, 8), "white")
    assert COLOUR.transform()(white)[:, 0, 0].tolist() == pytest.approx([1.0, 3.0, 1.0])


def test_the_shorter_side_is_resized_and_the_centre_is_cropped() -> None:
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[2:6, 6:10] = 255
    tensor = COLOUR.transform()(Image.fromarray(pixels))  # the shorter side is 8 already
    assert torch.equal(tensor[2], torch.ones(4, 4))


@pytest.mark.parametrize("preprocessing", [COLOUR, GREY])
def test_the_dictionary_lives_in_a_safe_checkpoint(preprocessing: Preprocessing) -> None:
    file = io.BytesIO()
    torch.save(preprocessing.to_dict(), file)
    file.seek(0)
    assert Preprocessing.from_dict(torch.load(file, weights_only=True)) == preprocessing


@pytest.mark.parametrize(
    "changes",
    [{"in_channels": 2}, {"size": 0}, {"resize": 3}, {"mean": (0.5,)}, {"std": (0.5, 0.5)}],
)
def test_numbers_that_do_not_fit_together(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Preprocessing(**{**COLOUR.to_dict(), **changes})


def test_a_dictionary_of_something_else() -> None:
    with pytest.raises(UserError, match="in_channels"):
        Preprocessing.from_dict({"width": 3})


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (200, 20), (12, 16)])
def test_images_that_are_not_square_are_covered_and_cut(shape: tuple[int, int]) -> None:
    preprocessing = Preprocessing(in_channels=1, size=(12, 16), mean=(0.0,), std=(1.0,), resize=15)
    white = Image.fromarray(np.full(shape, 255, dtype=np.uint8))
    assert torch.equal(preprocessing.transform()(white), torch.ones(1, 12, 16))  # no padding


def test_of_an_image_with_the_same_sides_the_middle_is_seen() -> None:
    square, pair = (
        Preprocessing(in_channels=1, size=size, mean=(0.0,), std=(1.0,), resize=14).transform()(image(20, 20, "L"))
        for size in (12, (12, 12))
    )
    torch.testing.assert_close(square, pair)


def test_descriptions_of_older_checkpoints_are_read() -> None:
    older = {"in_channels": 1, "size": 8, "mean": [0.3], "std": [0.4], "resize": None}
    assert Preprocessing.from_dict(older) == Preprocessing(in_channels=1, size=8, mean=(0.3,), std=(0.4,))
