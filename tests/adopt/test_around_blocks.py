"""A decoder around converted blocks, whose activations `recomputing` leaves to backward: exact, by exact bytes."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from comparison import assert_close, assert_identical, training_step
from others import pair, torchvision_small
from torch import nn
from torch.nn import functional as F

from efficient_densenet import make_efficient, recomputing
from efficient_densenet.execution import KEEP


class Unet(nn.Module):
    """An encoder that calls its transition piece by piece, as segmentation_models_pytorch does, and a decoder."""

    def __init__(self, mode="nearest"):
        super().__init__()
        self.mode = mode
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.block1, self.block2 = (torchvision_small().features.denseblock1 for _ in range(2))  # 6 → 14 channels
        self.norm, self.relu = nn.BatchNorm2d(14), nn.ReLU(inplace=True)
        self.conv, self.pool = nn.Conv2d(14, 6, 1, bias=False), nn.AvgPool2d(2)
        self.decode = nn.Sequential(nn.Conv2d(28, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        skip = self.relu(self.norm(self.block1(self.stem(x))))
        x = self.block2(self.pool(self.conv(skip)))
        x = torch.cat([F.interpolate(x, scale_factor=2, mode=self.mode), skip], 1)
        return self.head(self.decode(x))


class Forgetting(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        with recomputing():
            return self.network(x)


def step(network, x):
    return {name.replace("network.", ""): value for name, value in training_step(network, x).items()}


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.filterwarnings("error")
def test_recomputing_changes_no_bit(mode, keep):
    ordinary, efficient = pair(Unet(mode), keep)
    x = torch.randn(3, 3, 12, 10, dtype=torch.float64)
    expected = step(efficient, x)
    assert_close(expected, step(ordinary, x))
    again, _ = pair(Unet(mode), keep)
    assert_identical(step(Forgetting(make_efficient(copy.deepcopy(again), keep)), x), expected)


@pytest.mark.parametrize(
    ("context", "decoder"),
    [(nullcontext, 14 + 28 + 5), (recomputing, 0)],
    ids=["nothing recomputed", "recomputing"],
)
def test_bytes_kept_by_blocks_and_what_stands_around_them(context, decoder):
    """Of each image the blocks' features, what convolutions made, and what comes out.

    And, unless it is forgotten, what norm and rectifier of the skip connection, the concatenation, and norm and
    rectifier of the decoder made.
    """
    network, alive = make_efficient(Unet(), "features"), []
    for n in (8, 16):
        x = torch.randn(n, 3, 16, 16)
        for _ in range(2):  # the second call leaves the numbers of channels that the next ones gather
            network(x)
        recording = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with recording as profile, context():
            output = network(x)
        events = profile.profiler.kineto_results.events()
        assert not any("stage_forward" in event.name() for event in events), "blocks run as if nobody watched"
        alive.append(sum(event.nbytes() for event in events if event.name() == "[memory]"))
        del output
    values = 14 + 14 / 4 + 6 + 5 + 2
    assert alive[1] - alive[0] == 8 * 16 * 16 * 4 * (values + decoder)
