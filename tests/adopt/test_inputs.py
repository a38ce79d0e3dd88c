"""Forwards that ask for certain inputs, inputs that do not fit, and parameters whose shapes are not known yet."""

from __future__ import annotations

import copy

import pytest
import torch
from comparison import assert_close, training_step
from look_alikes import Loop, PlainLayer, network, parts, transition
from others import randomised
from torch import nn
from torch.nn import functional as F

from efficient_densenet import make_efficient, report, restore
from efficient_densenet.errors import UserError
from efficient_densenet.execution import shared


def asking(demand):
    class Asking(Loop):
        def forward(self, x):
            demand(x)
            return super().forward(x)

    return Asking()


def square(x):
    assert x.shape[-1] == x.shape[-2]


def even(x):
    if x.size(2) % 2 or x.size(3) % 2:
        raise ValueError("odd")


def divisible_by_16(x):
    x.view(len(x), 6, x.shape[2] // 16, 16, x.shape[3] // 16, 16)


def of_28_pixels(x):
    x.view(-1, 6, 28, 28)


@pytest.mark.parametrize(
    ("demand", "size"),
    [(square, 5), (even, 6), (divisible_by_16, 16), (of_28_pixels, 28)],
    ids=["square", "even", "divisible by 16", "28 pixels"],
)
@pytest.mark.filterwarnings("error")
def test_forwards_that_ask_for_certain_sizes(demand, size):
    ordinary = randomised(asking(demand))
    efficient = make_efficient(copy.deepcopy(ordinary))
    assert report(efficient).adopted[0].now == "shared buffer"
    x = torch.randn(2, 6, size, size, dtype=torch.float64)
    for training in (True, False):
        assert_close(training_step(efficient.train(training), x), training_step(ordinary.train(training), x))
    wrong = x[..., 1:]
    assert error_of(efficient, wrong) == error_of(ordinary, wrong)


def test_it_is_tried_at_two_sizes_in_training_and_in_evaluation(monkeypatch):
    tried = set()
    run = shared.run

    def noting(x, plan, modules, *rest):
        tried.add((modules[0].training, x.shape))
        return run(x, plan, modules, *rest)

    monkeypatch.setattr(shared, "run", noting)
    make_efficient(Loop())
    sizes = [torch.Size([2, 6, 4, 3]), torch.Size([3, 6, 3, 5])]
    assert tried == {(training, size) for training in (True, False) for size in sizes}


def error_of(module, *arguments):
    with pytest.raises(Exception) as caught:
        module(*arguments)
    return type(caught.value), str(caught.value)


def images(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


WRONG = {
    "no images": (images(6, 5, 5), None),
    "other channels": (images(2, 5, 5, 5), images(2, 4, 9, 9)),
    "a line": (images(2, 6, 5), images(2, 3, 9)),
    "a volume": (images(2, 6, 5, 5, 5), images(2, 3, 9, 9, 9)),
    "a vector": (images(6), images(3)),
    "a number": (images(), images()),
    "a pixel": (images(2, 6, 1, 1), None),
    "double precision": (images(2, 6, 5, 5, dtype=torch.float64), images(2, 3, 9, 9, dtype=torch.float64)),
    "whole numbers": (images(2, 6, 5, 5, dtype=torch.int64), images(2, 3, 9, 9, dtype=torch.int64)),
    "nothing": (None, None),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.filterwarnings("ignore::efficient_densenet.EfficiencyWarning")
def test_inputs_that_do_not_fit_raise_what_the_ordinary_network_raises(name, training):
    of_block, of_stem = WRONG[name]
    block = nn.Sequential(nn.Sequential(PlainLayer(6, 4), PlainLayer(10, 4)), transition(14, 6))
    stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    for ordinary, x in ((block, of_block), (nn.Sequential(*stem, *block), of_stem)):
        efficient = make_efficient(copy.deepcopy(ordinary))
        assert error_of(efficient.train(training), x) == error_of(ordinary.train(training), x)


# ---- lazy parameters -------------------------------------------------------------------------------------------


def lazy_block():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(4, 3, padding=1)) for _ in range(2)
            )

        def forward(self, x):
            for layer in self.layers:
                x = torch.cat([x, layer(x)], 1)
            return x

    return Lazy()


class LazyHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), Loop(), nn.BatchNorm2d(18))
        self.classifier = nn.LazyLinear(4)

    def forward(self, x):
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))


@pytest.mark.parametrize("build", [lambda: network(nn.Conv2d(3, 6, 3), Loop()), LazyHead], ids=["sequence", "head"])
def test_a_lazy_classifier_is_no_obstacle(build):
    torch.manual_seed(0)
    efficient = make_efficient(build())
    x = torch.randn(2, 3, 6, 7)
    efficient(x)
    ordinary = build()
    ordinary(x)
    ordinary.load_state_dict(efficient.state_dict())
    assert {e.now for e in report(efficient).adopted} <= {"shared buffer", "joins stem and transitions"}
    assert_close(training_step(efficient, x), training_step(ordinary, x))


def test_lazy_layers_are_named_with_the_way_out():
    with pytest.raises(UserError, match=r"\(Lazy\): some of its parameters have no shape yet: call the model once"):
        make_efficient(lazy_block())
    model = make_efficient(nn.Sequential(lazy_block(), nn.LazyConv2d(6, 1), Loop()))
    found = {entry.name: entry for entry in report(model).entries}
    assert "no shape yet" in found["0"].reason and found["2"].now == "shared buffer"
    model(torch.randn(2, 6, 5, 5))
    assert [entry.now for entry in report(make_efficient(restore(model))).adopted] == ["shared buffer"] * 2


# ---- names and repeats -----------------------------------------------------------------------------------------


def test_a_refused_block_is_reported_under_its_own_name():
    class Masked(Loop):
        def __init__(self):
            super().__init__()
            self.layers, self.net = nn.ModuleList(self.net), None

        def forward(self, x, mask):
            for layer in self.layers:
                x = torch.cat((x, mask * layer(x)), 1)
            return x

    with pytest.raises(UserError, match=r"came:\n  0 \(Masked\): it could not be tried: .* argument: 'mask'$"):
        make_efficient(nn.Sequential(Masked(), nn.Conv2d(18, 3, 1)))


def test_one_rectifier_for_all_of_a_flat_sequence():
    relu = nn.ReLU(inplace=True)
    ordinary = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), relu, nn.MaxPool2d(3, 2, 1),
        Loop(), nn.BatchNorm2d(18), relu, nn.Conv2d(18, 6, 1), nn.AvgPool2d(2), Loop(), nn.BatchNorm2d(18), relu,
    )  # fmt: skip
    ordinary[4].net[0][1] = relu
    ordinary = randomised(ordinary)
    efficient = make_efficient(copy.deepcopy(ordinary))
    assert [adopted.start for adopted in efficient.adoption.segments] == [0, 4]
    x = torch.randn(2, 3, 13, 12, dtype=torch.float64)
    assert_close(training_step(efficient, x), training_step(ordinary, x))


def test_the_same_layer_twice_is_no_dense_block():
    """It would read other channels the second time."""
    layer = parts(6, 6)
    with pytest.raises(UserError, match="no dense block"):
        make_efficient(nn.Sequential(layer, layer))


@pytest.mark.filterwarnings("error")
def test_a_size_that_the_look_could_not_know_is_looked_at_when_it_comes():
    def small_or_doubled(x):
        assert max(x.shape) < 40

    ordinary = randomised(asking(small_or_doubled))
    efficient = make_efficient(copy.deepcopy(ordinary))
    x = torch.randn(2, 6, 5, 50, dtype=torch.float64)
    assert error_of(efficient, x) == error_of(ordinary, x)
