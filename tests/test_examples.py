"""The programs in examples/ run and learn."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

from efficient_densenet import make_efficient
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


def test_bytes_that_the_fully_convolutional_densenet_keeps():
    """Of each image the features of each block once, whoever else reads them, and what lies between blocks."""
    example = runpy.run_path(str(EXAMPLES / "fc_densenet.py"))
    network = example["FCDenseNet"](classes=3, blocks=(2,), bottom=2, growth=4)
    make_efficient(network, "features")
    alive = []
    for n in (16, 32):  # for less, one thread has a convolution of 1×1 that copies what shares its memory
        x = torch.randn(n, 3, 16, 16)
        for _ in range(2):  # the second call leaves the numbers of channels that the next ones gather
            network(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            output = network(x)
        events = profile.profiler.kineto_results.events()
        alive.append(sum(event.nbytes() for event in events if event.name() == "[memory]"))
        del output
    blocks = 32 + 40 / 4 + 48
    narrow = 32 + 2 * 32 / 4  # what dropout made, which the max pool keeps, and its indices of eight bytes
    scores = 3
    dropout = 4 * 32 + 6 * 4  # a number for each channel of the transition, a flag for each channel of six layers
    assert alive[1] - alive[0] == 16 * (16 * 16 * 4 * (blocks + narrow + scores) + dropout)
