"""`keep="auto"`: the memory decides what is kept for backward."""

from __future__ import annotations

import logging

import pytest
import torch
from comparison import assert_close, training_step

from efficient_densenet import DenseNet, UserError, make_efficient, plan, report
from efficient_densenet.execution import KEEP

SMALL = {"block_config": (3, 3), "bn_size": 4, "growth_rate": 8, "num_classes": 3, "compression": 0.5}
BATCH = (20, 3, 32, 32)


def kept(network):
    return {entry.keep for entry in report(network).entries} - {""}


@pytest.fixture(scope="module")
def needed():
    """Bytes of a step, by what is kept."""
    ways = plan(DenseNet(**SMALL), BATCH[1:], batch_size=BATCH[0]).ways
    return {way.name: way.needed for way in ways}


@pytest.mark.parametrize("fits", KEEP[:2])
def test_the_fastest_that_fits(needed, fits, caplog):
    with caplog.at_level(logging.INFO, "efficient_densenet"):
        network = make_efficient(DenseNet(**SMALL), "auto", memory=needed[fits], batch=BATCH)
    assert kept(network) == {fits}
    assert f'keep="{fits}"' in caplog.text and "a step of 20 images needs" in caplog.text
    assert ("with 'bottleneck'" in caplog.text) == (fits != "bottleneck")
    built = DenseNet(**SMALL, efficient=True, keep="auto", memory=needed[fits], batch=BATCH)
    assert kept(built) == {fits}


def test_it_is_the_ordinary_network_still(needed):
    torch.manual_seed(0)
    ordinary = DenseNet(**SMALL).double()
    network = DenseNet(**SMALL, efficient=True, keep="auto", memory="1GB", batch=BATCH).double()
    network.load_state_dict(ordinary.state_dict())
    x = torch.randn(BATCH, dtype=torch.float64)
    assert_close(training_step(network, x), training_step(ordinary, x))


def test_nothing_fits(needed):
    limit = needed["inputs"] * 3 // 4
    network = DenseNet(**SMALL)
    with pytest.raises(UserError, match=r"a batch of at most 1\d$"):
        make_efficient(network, "auto", memory=limit, batch=BATCH)
    assert report(network) == report(DenseNet(**SMALL))  # which is left as it was
    with pytest.raises(UserError, match="smaller images, or more memory"):
        DenseNet(**SMALL, efficient=True, keep="auto", memory=1000, batch=BATCH)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": "auto"}, "needs memory"),
        ({"keep": "auto", "memory": "1GB"}, "batch"),
        ({"keep": "auto", "memory": "much", "batch": BATCH}, "12GB"),
        ({"keep": "features", "memory": "1GB"}, "leave them out"),
        ({"keep": "auto", "way": "recompute", "memory": "1GB", "batch": BATCH}, "shared buffer"),
        ({"keep": "most"}, "'auto'"),
    ],
    ids=["nothing", "no batch", "no amount", "not auto", "recompute", "no such word"],
)
def test_what_does_not_go_together(arguments, message):
    with pytest.raises(UserError, match=message):
        make_efficient(DenseNet(**SMALL), **arguments)
