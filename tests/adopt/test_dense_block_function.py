"""`dense_block`: the definition by concatenation, on one's own layers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from comparison import assert_close, training_step
from look_alikes import bottleneck_parts
from torch import nn

from efficient_densenet import dense_block, make_efficient, report
from efficient_densenet.errors import UserError
from efficient_densenet.execution import KEEP

every_keep = pytest.mark.parametrize("keep", KEEP)


def plain_layer(reads, makes):
    return nn.Sequential(nn.BatchNorm2d(reads), nn.ReLU(), nn.Conv2d(reads, makes, 3, padding=1, bias=False))


def with_dropout(reads, makes):
    return nn.Sequential(*plain_layer(reads, makes), nn.Dropout2d(0.3))


def bottleneck(reads, makes):
    return nn.Sequential(bottleneck_parts(reads, makes))


class Block(nn.Module):
    """By its definition, and by `dense_block` where `keep` is given."""

    def __init__(self, layer, keep=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.keep = nn.ModuleList(layer(5 + 3 * i, 3) for i in range(4)), keep
        self.double()

    def forward(self, x):
        if self.keep is not None:
            return dense_block(x, self.layers, self.keep)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def step(block):
    x = torch.linspace(-2, 2, 2 * 5 * 7 * 6, dtype=torch.float64).sin().view(2, 5, 7, 6)
    torch.manual_seed(1)
    return training_step(block, x)


@every_keep
@pytest.mark.parametrize("layer", [plain_layer, bottleneck, with_dropout])
@pytest.mark.filterwarnings("error")
def test_it_is_the_block_by_its_definition(layer, keep):
    assert_close(step(Block(layer, keep)), step(Block(layer)))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer[2].register_forward_hook(lambda _m, _i, output: output * 2),
        lambda layer: layer[0].register_forward_hook(lambda _m, _i, output: output * 2),
        lambda layer: layer.__setitem__(1, nn.SiLU()),
        lambda layer: layer.__setitem__(0, nn.GroupNorm(1, layer[0].num_features).double()),
    ],
    ids=["hook", "hook on a norm", "activation", "norm"],
)
def test_what_does_not_fit_the_buffer_recomputes_with_one_warning(change):
    blocks = Block(plain_layer), Block(plain_layer, "features")
    for block in blocks:
        change(block.layers[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = step(blocks[1])
    told = ["dense_block recomputes and does not use the shared buffer" in str(w.message) for w in caught]
    assert told == [True]
    assert_close(actual, step(blocks[0]))


def test_errors_say_what_does_not_fit():
    x = torch.randn(2, 5, 4, 4)
    layers = [plain_layer(5, 3), plain_layer(8, 3)]
    with pytest.raises(UserError, match="keep must be one of"):
        dense_block(x, layers, keep="all")
    with pytest.raises(UserError, match="no dense block: there are none"):
        dense_block(x, [])
    with pytest.raises(UserError, match="no dense block: its forward uses"):
        dense_block(x, [layers[0], nn.Linear(8, 3)])
    with pytest.raises(UserError, match=r"no dense block: it could not be tried: RuntimeError: .* 9"):
        dense_block(x, [layers[0], plain_layer(9, 3)])
    with pytest.raises(UserError, match="the first layer reads 5 channels, and the input has 4"):
        dense_block(x[:, :4], layers)


@pytest.mark.filterwarnings("error")
def test_a_network_with_such_blocks_can_be_converted_too():
    """Its blocks are recorded as what they are, though they call the function."""
    network = nn.Sequential(Block(bottleneck, "features"), nn.Conv2d(17, 4, 1).double())
    assert [entry.now for entry in report(make_efficient(copy.deepcopy(network))).entries] == ["shared buffer"]
    assert_close(step(make_efficient(copy.deepcopy(network))), step(network))


def test_exported_as_ordinary_operations():
    block = Block(plain_layer, "features").eval()
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    program = torch.export.export(block, (x,))
    assert "efficient_densenet." not in str(program.graph)
    torch.testing.assert_close(program.module()(x), copy.deepcopy(block)(x))
