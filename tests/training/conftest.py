"""Images to train on for a moment."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of twelve images of 40×48 pixels in each of three classes, and the options that train on it."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog", "fox"):
        (folder / name).mkdir()
        for number in range(12):
            pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    options = ["--data", "ImageFolder", "--data.root", str(folder), "--data.size", "32", "--data.batch_size", "8"]
    return [*options, "--data.num_workers", "0"]
