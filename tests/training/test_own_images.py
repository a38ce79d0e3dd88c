"""The commands of docs/own_images.md, one after the other, on a few generated images."""

from __future__ import annotations

import csv
import hashlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from documents import blocks
from PIL import Image

from efficient_densenet.cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = [
    command
    for block in blocks(ROOT / "docs" / "own_images.md")
    if block.test == "tests/training/test_own_images.py"
    for command in block.commands
]
SMALL = ["--data.size=64", "--data.batch_size=4", "--data.num_workers=0", "--trainer.accelerator=cpu"]
BRIEF = ["--trainer.max_epochs=3", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]


def make_images(folder: Path, names: list[str], count: int) -> None:
    generator = np.random.default_rng(0)
    for shade, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(100 * shade, 100 * shade + 56, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Weights of DenseNet-121 in the cache of torch.hub, in torchvision's format and under the name of its file."""
    state = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): tensor  # as in 2017
        for name, tensor in torchvision.models.densenet121().state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(state, cache / "new.pth")
    digest = hashlib.sha256((cache / "new.pth").read_bytes()).hexdigest()[:8]
    (cache / "new.pth").rename(cache / f"densenet121-{digest}.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.url", f"https://example.org/densenet121-{digest}.pth")
    return state


@pytest.mark.filterwarnings("ignore")
def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys, published):
    make_images(tmp_path / "my_images", ["cat", "dog"], 6)
    make_images(tmp_path / "new_images", ["unknown"], 3)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    fit, test, predict = (shlex.split(command)[1:] for command in COMMANDS)

    assert main([*fit, *SMALL, *BRIEF]) == 0
    said = capsys.readouterr().out
    assert "the data decide: images of 64 pixels with 3 channels, 2 classes (cat, dog)" in said
    held_out = "3 validation images (held out from the training images)"
    assert f"the data are divided: 9 training images, {held_out}\n" in said
    trained = torch.load("runs/finetune/version_0/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    name = "features.denseblock1.denselayer1.conv1.weight"
    before, after = published[name.replace("conv1", "conv.1")], trained[f"network.{name}"]
    assert 0 < (after - before).norm() < 0.1 * before.norm()  # it began with them

    assert main([*test, *SMALL]) == 0
    assert "measured on 3 validation images" in capsys.readouterr().out

    assert main(predict) == 0
    rows = list(csv.DictReader(Path("predictions.csv").read_text().splitlines()))
    assert [row["path"] for row in rows] == [f"new_images/unknown/{i}.jpg" for i in range(3)]
    assert all(abs(float(row["cat"]) + float(row["dog"]) - 1) < 1e-4 for row in rows)
