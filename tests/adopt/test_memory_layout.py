"""What adopted parts hand out lies in memory as the ordinary network's does, so that views and dropout behind work."""

from __future__ import annotations

import copy

import pytest
import torch
from comparison import assert_close, training_step
from look_alikes import Loop, PlainLayer, transition
from others import pair, randomised, torchvision_small
from torch import nn
from torch.nn import functional as F

from efficient_densenet import dense_block, make_efficient

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
every_layout = pytest.mark.parametrize("weights", FORMATS)
every_input = pytest.mark.parametrize("images", FORMATS)


def x(images, channels=6, size=(6, 4)):
    made = torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return made.contiguous(memory_format=FORMATS[images])


def twins(network, weights="contiguous", keep="bottleneck"):
    ordinary = randomised(network).to(memory_format=FORMATS[weights])
    return ordinary, make_efficient(copy.deepcopy(ordinary), keep)


class FunctionalDropout(nn.Module):
    """Dropout behind a block and inside its transition, and views of more than one pixel."""

    def __init__(self):
        super().__init__()
        self.block, self.bn, self.conv = Loop(), nn.BatchNorm2d(18), nn.Conv2d(18, 4, 1)

    def forward(self, x):
        x = F.dropout(self.block(x), 0.3, self.training)
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class Layer(PlainLayer):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.2, self.training)


PARTS = {
    "a block": Loop,
    "only what it made": lambda: Loop("new"),
    "a block and its transition": lambda: nn.Sequential(Loop(), transition(18, 4)),
    "another module behind it": lambda: nn.Sequential(Loop(), nn.Dropout(0.3), nn.Tanh()),
    "a dropout inside a transition": lambda: nn.Sequential(
        Loop(), nn.Sequential(nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 4, 1), nn.Dropout(0.3), nn.MaxPool2d(2))
    ),
    "two blocks in a longer sequence": lambda: nn.Sequential(
        nn.Tanh(), Loop(), transition(18, 6), Loop(), transition(18, 6), nn.Dropout(0.3), nn.Conv2d(6, 2, 1)
    ),
    "functions between them": FunctionalDropout,
}


@every_layout
@every_input
@pytest.mark.parametrize("name", PARTS)
def test_the_layout_and_the_masks_are_those_of_the_ordinary_network(name, images, weights):
    ordinary, efficient = twins(PARTS[name](), weights)
    for training in (True, False):
        results = []
        for network in (ordinary.train(training), efficient.train(training)):
            torch.manual_seed(3)
            results.append(training_step(network, x(images)))
        assert_close(results[1], results[0])
        assert results[1]["output"].stride() == results[0]["output"].stride()
    with torch.no_grad():
        assert efficient(x(images)).stride() == ordinary(x(images)).stride()


@every_layout
@every_input
def test_dropout_in_layers_draws_the_same_masks_in_every_layout(images, weights):
    ordinary, efficient = pair(
        torchvision_small(drop_rate=0.3), "inputs", lambda network: network.to(memory_format=FORMATS[weights])
    )
    results = []
    for network in (ordinary, efficient):
        torch.manual_seed(3)
        results.append(training_step(network, x(images, 3, (33, 35))))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("stem", [3, 1], ids=["colour", "grey"])
def test_a_view_of_the_features_of_a_whole_network(stem):
    network = torchvision_small()
    network.features.conv0 = nn.Conv2d(stem, 6, 7, 2, 3, bias=False)
    ordinary, efficient = pair(network)
    features = [model.features(x("contiguous", stem, (32, 32))) for model in (ordinary, efficient)]
    torch.testing.assert_close(features[1].view(2, -1), features[0].view(2, -1))


def test_what_is_handed_out_may_be_changed_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Loop("slice")

        def forward(self, x):
            return F.relu_(self.block(x)).view(len(x), -1)

    ordinary, efficient = twins(InPlace())
    assert_close(training_step(efficient, x("contiguous")), training_step(ordinary, x("contiguous")))


@every_input
def test_a_block_of_ones_own(images):
    layers = randomised(nn.ModuleList(nn.Sequential(*list(PlainLayer(6 + 4 * i, 4))) for i in range(2)))
    given = x(images)
    made = dense_block(given, layers)
    assert made.is_contiguous(memory_format=FORMATS[images])
