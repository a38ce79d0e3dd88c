"""The programs in examples/ run and learn."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

from efficient_densenet.execution import KEEP

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_images_of_ones_own_from_a_folder_to_predictions(tmp_path, capsys):
    example = runpy.run_path(str(EXAMPLES / "own_images.py"))
    small = ["--data.batch_size=4", "--data.num_workers=0", "--trainer.limit_train_batches=1", "--data.size=64"]
    assert example["main"](tmp_path, 5, *small) == 0
    printed = capsys.readouterr().out
    assert "measured on 3 validation images" in printed
    assert all(pattern in printed for pattern in example["PATTERNS"])


def test_the_fully_convolutional_densenet_learns(capsys):
    example = runpy.run_path(str(EXAMPLES / "fc_densenet.py"))
    assert example["main"](steps=20, size=32) > 0.8
    assert "step 20  loss" in capsys.readouterr().out


def test_it_computes_the_same_whatever_it_keeps():
    example = runpy.run_path(str(EXAMPLES / "fc_densenet.py"))
    outputs = []
    for keep in KEEP:
        torch.manual_seed(0)
        network = example["FCDenseNet"](classes=3, blocks=(2, 2), bottom=2, growth=4, keep=keep).double()
        output = network(torch.randn(2, 3, 16, 24, dtype=torch.float64))
        assert output.shape == (2, 3, 16, 24)
        output.square().sum().backward()
        outputs.append(torch.cat([output.flatten(), *(p.grad.flatten() for p in network.parameters())]))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-8, atol=1e-8)
