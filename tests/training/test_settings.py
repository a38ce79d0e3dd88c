"""What training scripts of this field have: every option in the table of docs/training.md, in a run of a moment."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import run

TABLE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
SETTINGS = re.findall(r"`(--[^`]+)`", "".join(line for line in TABLE.splitlines(True) if line.startswith("| ")))
LONGER = {"FindLearningRate": ["--trainer.limit_train_batches=4", "--trainer.max_epochs=6"]}
LOGGERS = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images of 40×48 pixels in each of three classes, and the options that train on them."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog", "fox"):
        (folder / name).mkdir()
        for number in range(12):
            pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return ["--data", "ImageFolder", "--data.root", str(folder), "--data.size", "32", "--data.batch_size", "8"]


def test_there_is_a_table():
    assert len(SETTINGS) > 30


@pytest.mark.parametrize("setting", [s for s in SETTINGS if not any(name in s for name in LOGGERS)])
@pytest.mark.filterwarnings("ignore")
def test_a_setting_works(tmp_path, images, setting):
    small = setting.replace("inductor", "aot_eager")  # the compiler of C++ code takes its time
    longer = next((options for name, options in LONGER.items() if name in setting), [])
    assert run("fit", tmp_path, *images, "--data.num_workers=0", *longer, *shlex.split(small)) == 0
    assert list(tmp_path.glob("tiny/version_0/checkpoints/best.ckpt"))
