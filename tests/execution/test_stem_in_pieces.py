"""The stem's backward pass by pieces: gradients for every kind of stem and of piece, and its bytes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from comparison import assert_close, training_step
from torch import nn

from efficient_densenet.adopt.look import look
from efficient_densenet.adopt.trial import Tensors
from efficient_densenet.execution import pieces, shared
from efficient_densenet.execution.plan import parts
from efficient_densenet.execution.stem_operators import StemArguments
from efficient_densenet.measure.memory import peak_bytes
from efficient_densenet.ops import plain_pytorch

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
SIZES = ((13,), (11, 8), (9, 6, 5))


class OnBuffer(nn.Module):
    """Runs a sequence by its plan."""

    def __init__(self, sequence):
        super().__init__()
        self.sequence = sequence
        chain = look([sequence], Tensors("cpu"), modes=(None,))[0].chain
        assert chain.reason is None and chain.is_stem
        self.plan = chain.plan

    def forward(self, x):
        return shared.run(x, self.plan, parts([self.sequence]), "features")

    def named_parameters(self, *arguments, **named):
        return self.sequence.named_parameters(*arguments, **named)

    def named_buffers(self, *arguments, **named):
        return self.sequence.named_buffers(*arguments, **named)


def stem(dims=2, window=7, stride=2, deep=False, bias=False, channels=6, **entry):
    convolution, norm = CONVOLUTIONS[dims - 1], NORMS[dims - 1]
    torch.manual_seed(0)
    modules = [convolution(3, channels, window, stride, window // 2, bias=bias, **entry), norm(channels), nn.ReLU()]
    if deep:
        modules += [convolution(channels, 8, 3, padding=1, bias=bias), norm(8), nn.ReLU()]
        modules += [convolution(8, 5, 3, padding=1, bias=bias), norm(5), nn.ReLU()]
    for module in modules[1::3]:
        for tensor in (module.weight, module.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        for tensor in (module.bias, module.running_mean):
            nn.init.normal_(tensor)
    return nn.Sequential(*modules, POOLS[dims - 1](3, 2, 1))


def frozen(sequence):
    sequence[0].requires_grad_(False)
    sequence[1].eval()


PIECES = {"whole": 8 << 20, "images": 6000, "lines": 600, "kept, whole": 8 << 20, "kept, lines": 600}
KINDS = {
    "one dimension": {"dims": 1},
    "two dimensions": {"dims": 2, "bias": True},
    "three dimensions": {"dims": 3},
    "3×3 without stride": {"window": 3, "stride": 1},
    "even window": {"window": 4},
    "dilated and grouped": {"window": 3, "dilation": 2, "groups": 3},
    "three convolutions": {"window": 3, "deep": True, "bias": True},
    "three convolutions of volumes": {"dims": 3, "window": 3, "deep": True},
}


@pytest.mark.parametrize("plain", [False, True], ids=["native", "plain"])
@pytest.mark.parametrize("size", PIECES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [nn.Module.train, nn.Module.eval, frozen], ids=["training", "evaluation", "frozen"])
def test_gradients_by_pieces_are_the_ordinary_ones(kind, size, plain, change, monkeypatch):
    monkeypatch.setitem(pieces._MOST, "cpu", PIECES[size])
    monkeypatch.setitem(pieces._HELD, "cpu", 0)
    if "kept" in size:
        described = StemArguments.engine
        monkeypatch.setattr(StemArguments, "engine", lambda self: replace(described(self), keeps_last=True))
    ordinary = stem(**KINDS[kind]).double()
    change(ordinary)
    torch.manual_seed(1)
    x = torch.randn(3, 3, *SIZES[KINDS[kind].get("dims", 2) - 1], dtype=torch.float64)
    if plain:
        with plain_pytorch():
            actual = training_step(OnBuffer(copy.deepcopy(ordinary)), x)
    else:
        actual = training_step(OnBuffer(copy.deepcopy(ordinary)), x)
    assert_close(actual, training_step(ordinary, x))


@pytest.mark.parametrize("lines", [1, 2, 3, 4, 7, 32, 33])
@pytest.mark.parametrize("most", [1, 4 * 40, 4 * 1000])
def test_every_line_and_every_window_belongs_to_one_piece(lines, most, monkeypatch):
    monkeypatch.setitem(pieces._MOST, "cpu", most)
    shape, counted = (3, lines, 5, 2), torch.zeros(3, lines, dtype=torch.int)
    windows = torch.zeros(3, (lines + 1) // 2, dtype=torch.int)
    for images, some, front, of_pool in pieces.pieces(shape, torch.float32, torch.device("cpu")):
        counted[images, some.start + front : some.stop] += 1
        windows[images, of_pool] += 1
        assert front == (2 if of_pool.start else 0) and some.start % 2 == 0
        assert (some.stop - some.start + 1) // 2 == of_pool.stop - of_pool.start + front // 2
    assert (counted == 1).all() and (windows == 1).all()


@pytest.mark.parametrize("deep", [False, True])
def test_neither_the_last_output_nor_its_gradient_exists_whole_in_backward(deep, monkeypatch):
    """More images need no more memory; with three convolutions, two gradients of outputs that are kept."""
    monkeypatch.setitem(pieces._MOST, "cpu", 1 << 16)
    monkeypatch.setitem(pieces._HELD, "cpu", 0)
    network = OnBuffer(stem(window=3, deep=deep, channels=8))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    peaks = []
    for n in (8, 16):
        made = network(torch.randn(n, 3, 64, 64))
        grad = torch.ones_like(made)
        peaks.append(peak_bytes(lambda made=made, grad=grad: made.backward(grad)))
    values = 8 * 32 * 32
    assert (peaks[1] - peaks[0]) / (8 * 4) <= (2.01 * values if deep else 0.01 * values)
