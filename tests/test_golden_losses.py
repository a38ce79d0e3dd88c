"""A short run has the losses that are kept in the repository, at every step, whatever way it runs."""

from __future__ import annotations

import json
from functools import partial

import golden_losses
import pytest
import torch
from golden_losses import NETWORKS, TYPES, WAYS, losses

GOLDEN = json.loads(golden_losses.FILE.read_text())
# Relative. In float64, one processor held to four levels of instructions, one and two threads, and PyTorch 2.11 and
# 2.14 were 4e-16 apart. 1e-12 leaves room for other orders of summation, and none for another formula. In float32 they
# were 2e-7 apart, or 2e-4 where a value within rounding error of zero, or of its neighbour in a max pool, fell on the
# other side; both are right.
TOLERANCE = {"float64": 1e-12, "float32": 1e-3}


def furthest(found, golden):
    """The largest relative difference of all losses."""
    found, golden = torch.tensor(found, dtype=torch.float64), torch.tensor(golden, dtype=torch.float64)
    return ((found - golden).abs() / golden).max().item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_losses_are_those_that_are_kept(network, dtype, way):
    assert furthest(losses(network, dtype, way), GOLDEN[network][dtype][way]) <= TOLERANCE[dtype]


def test_every_run_is_kept_and_learns():
    assert {n: {t: set(ways) for t, ways in types.items()} for n, types in GOLDEN.items()} == {
        network: {dtype: set(WAYS) for dtype in TYPES} for network in NETWORKS
    }
    for types in GOLDEN.values():
        for ways in types.values():
            assert all(run[-1][0] < 0.9 * run[0][0] and run[-1][1] < run[0][1] for run in ways.values())


@pytest.mark.parametrize("dtype", TYPES)
def test_steps_that_are_two_percent_too_long_are_noticed(dtype, monkeypatch):
    plain = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda parameters, lr, **rest: plain(parameters, 1.02 * lr, **rest))
    network = "bottleneck, ImageNet stem"
    assert furthest(losses(network, dtype, "features"), GOLDEN[network][dtype]["features"]) > 2 * TOLERANCE[dtype]


def test_running_statistics_that_move_twice_are_noticed(monkeypatch):
    twice = partial(torch.nn.BatchNorm2d, momentum=1 - 0.9**2)
    monkeypatch.setattr(torch.nn, "BatchNorm2d", twice)
    network = "bottleneck, ImageNet stem"
    assert furthest(losses(network, "float32", "inputs"), GOLDEN[network]["float32"]["inputs"]) > 1e-2
