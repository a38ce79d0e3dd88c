"""What a forward reads besides its input: noticed when a block is looked at, and at every call afterwards."""

from __future__ import annotations

import copy
import io
import random
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comparison import assert_close, training_step
from look_alikes import Loop
from others import randomised
from torch import nn
from torch.nn import functional as F

from efficient_densenet import EfficiencyWarning, make_efficient, report
from efficient_densenet.adopt import decide
from efficient_densenet.adopt.conditions import conditions


def x(channels=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, 5, 4, dtype=torch.float64, generator=generator)


def twins(network):
    ordinary = randomised(network)
    return ordinary, make_efficient(copy.deepcopy(ordinary))


def assert_same(ordinary, efficient, given=None):
    given = x() if given is None else given
    assert_close(training_step(efficient, given), training_step(ordinary, given))


# ---- randomness ------------------------------------------------------------------------------------------------


class Dropping(Loop):
    """Stochastic depth, in training: now and then a layer's output is doubled."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        for part in self.net:
            y = part(x)
            if self.training and self.draw(self) < 1e-9:
                y = 2 * y
            x = torch.cat((x, y), 1)
        return x


DRAWS = {
    "Python": (lambda _: random.random(), lambda: None),
    "NumPy": (lambda _: np.random.rand(), lambda: None),
    "a generator of Python": (lambda self: self.own.random(), lambda: random.Random(0)),
    "a generator of NumPy": (lambda self: self.own.random(), lambda: np.random.default_rng(0)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_from_elsewhere_are_noticed_and_not_used_up(name):
    draw, generator = DRAWS[name]
    block = Dropping(draw)
    block.own = generator()
    state, of_numpy = random.getstate(), np.random.get_state()[1].tolist()
    efficient = make_efficient(block)
    assert random.getstate() == state and np.random.get_state()[1].tolist() == of_numpy
    if block.own is not None:
        assert block.own.random() == generator().random()
    (entry,) = report(efficient).adopted
    assert (entry.now, "draws random numbers" in entry.reason) == ("recompute", True)
    assert report(efficient.eval()).adopted[0].now == "shared buffer"


# ---- attributes ------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    scale: float = 1.0
    inner: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(scale=1.0))


class Plain:
    def __init__(self):
        self.scale, self.inner = 1.0, [{"scale": 1.0}]


class Configured(Loop):
    def __init__(self, cfg, read):
        super().__init__()
        self.cfg, self.read = cfg, read

    def forward(self, x):
        return super().forward(x) * self.read(self.cfg)


def set_attribute(cfg):
    cfg.scale = 0.5


CONFIGURATIONS = {
    "a namespace": (lambda: SimpleNamespace(scale=1.0), lambda cfg: cfg.scale, set_attribute),
    "a dataclass": (Settings, lambda cfg: cfg.scale, set_attribute),
    "an object": (Plain, lambda cfg: cfg.scale, set_attribute),
    "a namespace in a dataclass": (Settings, lambda c: c.inner.scale, lambda c: setattr(c.inner, "scale", 0.5)),
    "containers in an object": (Plain, lambda c: c.inner[0]["scale"], lambda c: c.inner[0].update(scale=0.5)),
    "a list": (lambda: [1.0], lambda cfg: cfg[0], lambda cfg: cfg.__setitem__(0, 0.5)),
    "a number of NumPy": (
        lambda: SimpleNamespace(scale=np.float64(1.0)),
        lambda cfg: float(cfg.scale),
        lambda cfg: setattr(cfg, "scale", np.float64(0.5)),
    ),
    "an array": (lambda: np.ones(2), lambda cfg: float(cfg[0]), lambda cfg: cfg.__setitem__(0, 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_values_in_attributes_that_change_take_effect(name):
    build, read, change = CONFIGURATIONS[name]
    ordinary, efficient = twins(Configured(build(), read))
    assert report(efficient).adopted[0].now == "shared buffer"
    assert_same(ordinary, efficient)
    for network in (ordinary, efficient):
        change(network.cfg)
    with pytest.warns(EfficiencyWarning, match="its forward uses mul"):
        assert_same(ordinary, efficient)


def test_a_value_of_the_class_that_changes_takes_effect(monkeypatch):
    class Classy(Configured):
        cfg_of_class = SimpleNamespace(scale=1.0)

    ordinary, efficient = twins(Classy(None, lambda _: Classy.cfg_of_class.scale))
    assert_same(ordinary, efficient)
    monkeypatch.setattr(Classy.cfg_of_class, "scale", 0.5)
    with pytest.warns(EfficiencyWarning, match="its forward uses mul"):
        assert_same(ordinary, efficient)


class Counting(Loop):
    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def forward(self, x):
        self.counts.calls += 1
        return super().forward(x)


def test_what_a_forward_writes_into_an_object_is_noticed_and_undone():
    counts = SimpleNamespace(calls=0)
    efficient = make_efficient(Counting(counts))
    assert counts.calls == 0
    assert report(efficient).adopted[0].reason == "its forward stores 'counts' in a module"
    efficient(x().float())
    assert counts.calls == 1


def test_only_so_much_is_looked_at():
    """What is large, deep or refers to itself does not take long."""
    block = Loop()
    block.large, block.itself, deep = list(range(10_000)), SimpleNamespace(), SimpleNamespace(scale=1.0)
    block.itself.itself = block.itself
    for _ in range(9):
        deep = SimpleNamespace(deep=deep)
    block.deep = deep
    found = conditions([block])[1]
    block.large[-1] = 0
    assert conditions([block])[1] == found
    assert make_efficient(block)


class Attributes(dict):
    """As many write it: what is an entry is an attribute. Its copies are not the same."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__ = self


def test_odd_objects_do_no_harm_and_are_not_looked_at_at_every_call(monkeypatch):
    block = Loop()
    block.lock, block.generator, block.file = threading.Lock(), iter([1, 2]), io.StringIO("text")
    block.optimizer = torch.optim.SGD(block.parameters(), 0.1)
    block.settings = Attributes(a=1, inner=Attributes(b=[2]))
    block.__dict__["itself"] = block
    efficient = make_efficient(block)
    efficient(x().float())
    monkeypatch.setattr(decide, "look", None)
    for _ in range(2):
        efficient(x().float())
    assert next(block.generator) == 1 and block.settings.inner.b == [2] and block.file.read() == "text"


# ---- a forward of its own --------------------------------------------------------------------------------------


class Doubled:
    """Stands in for the forward of a convolution."""

    def __init__(self, conv, factor):
        self.conv, self.factor = conv, factor

    def __call__(self, x):
        return F.conv2d(x, self.conv.weight * self.factor, self.conv.bias, padding=1)


def replace_forward(network, factor=2):
    conv = network.net[1][2]
    conv.forward = Doubled(conv, factor)


def test_a_forward_that_is_an_object():
    before = randomised(Loop())
    replace_forward(before)
    twice = make_efficient(copy.deepcopy(before))
    assert (report(twice).adopted[0].now, report(twice).adopted[0].reason) == (
        "recompute",
        "the weight of Conv2d is computed",
    )
    assert_same(before, twice)
    ordinary, efficient = twins(Loop())
    for network in (ordinary, efficient):
        replace_forward(network, 1)
    with pytest.warns(EfficiencyWarning, match="the weight of Conv2d is computed"):
        assert_same(ordinary, efficient)
    for network in (ordinary, efficient):
        network.net[1][2].forward.factor = 3
    assert_same(ordinary, efficient)


def test_a_block_whose_own_forward_was_replaced_is_left():
    block = Loop()
    block.forward = lambda x: Loop.forward(block, x)
    model = make_efficient(nn.Sequential(block, nn.Conv2d(18, 6, 1), Loop()))
    found = {entry.name: entry for entry in report(model).entries}
    assert (found["0"].now, found["2"].now) == ("", "shared buffer")
    assert "its forward was replaced for this one object" in found["0"].reason


# ---- shapes ----------------------------------------------------------------------------------------------------


def fewer_channels(network):
    """The first layer makes two channels only, and those behind it read two less."""
    first, second, third = network.net
    with torch.no_grad():
        first[2].weight.data = first[2].weight.data[:2].clone()
        for part, reads in ((second, 8), (third, 12)):
            norm, conv = part[0], part[2]
            for name in ("weight", "bias"):
                setattr(norm, name, nn.Parameter(getattr(norm, name)[:reads].clone()))
            norm.running_mean, norm.running_var = norm.running_mean[:reads].clone(), norm.running_var[:reads].clone()
            conv.weight = nn.Parameter(conv.weight[:, :reads].clone())


def test_channels_that_are_taken_out_afterwards():
    ordinary, efficient = twins(Loop())
    assert_same(ordinary, efficient)
    for network in (ordinary, efficient):
        fewer_channels(network)
    assert_same(ordinary, efficient)
    assert (report(efficient).adopted[0].now, report(efficient).adopted[0].channels) == ("shared buffer", "6 → 16")


@pytest.mark.filterwarnings("ignore::efficient_densenet.EfficiencyWarning")
def test_shapes_that_do_not_fit_are_the_ordinary_error():
    ordinary, efficient = twins(Loop())
    for network in (ordinary, efficient):
        network.net[1][2].weight = nn.Parameter(torch.randn(4, 9, 3, 3, dtype=torch.float64))
    messages = []
    for network in (ordinary, efficient):
        with pytest.raises(RuntimeError) as caught:
            network(x())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
