"""DenseNet-121 on images of one's own, from a folder to predictions: the commands of docs/own_images.md without a
download. The images are generated, and the weights are random ones in the format that torchvision publishes.

    python examples/own_images.py
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

from efficient_densenet.cli import main as efficient_densenet

CONFIG = Path(__file__).parents[1] / "configs" / "finetune.yaml"
PATTERNS = ("rows", "columns", "checks")


def draw(pattern: str, generator: np.random.Generator, side: int = 128) -> Image.Image:
    """A pattern of random period and phase, under noise."""
    period, phase = generator.uniform(8, 24), generator.uniform(0, 6.28, 2)
    across, down = np.sin(6.28 * np.mgrid[:side, :side] / period + phase[:, None, None])
    bright = {"rows": across, "columns": down, "checks": across * down}[pattern]
    pixels = 128 + 80 * bright[..., None] + generator.normal(0, 30, (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_images(folder: Path, count: int) -> None:
    """So many images of each pattern, in a folder with its name."""
    generator = np.random.default_rng(0)
    for pattern in PATTERNS:
        (folder / pattern).mkdir(parents=True)
        for number in range(count):
            draw(pattern, generator).save(folder / pattern / f"{number:03d}.png")


def make_weights(file: Path) -> None:
    """Those of a new DenseNet-121 under the names that torchvision's files have since 2017."""
    torch.manual_seed(0)
    state = torchvision.models.densenet121().state_dict()
    names = {name: re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name) for name in state}
    torch.save({names[name]: tensor for name, tensor in state.items() if "num_batches" not in name}, file)


def main(folder: Path, images: int = 100, *options: str) -> int:
    """Make `images` of each class in `folder`, train the classifier on them, measure it and predict; the exit code."""
    make_images(folder / "my_images", images)
    make_weights(folder / "densenet121.pth")
    data = ["--config", str(CONFIG), "--data.root", str(folder / "my_images"), "--data.size", "96"]
    data += ["--trainer.default_root_dir", str(folder / "runs"), *options]
    head_alone = ["--model.freeze", "backbone", "--model.warmup", "0", "--trainer.max_epochs", "4"]
    head_alone += ["--model.optimizer.lr", "0.003"]
    best = folder / "runs" / "finetune" / "version_0" / "checkpoints" / "best.ckpt"
    return (
        efficient_densenet(["fit", *data, "--model.weights", str(folder / "densenet121.pth"), *head_alone])
        or efficient_densenet(["test", *data])
        or efficient_densenet(["predict", "--checkpoint", str(best), str(folder / "my_images" / "rows" / "000.png")])
    )


if __name__ == "__main__":
    sys.exit(main(Path(tempfile.mkdtemp())))
