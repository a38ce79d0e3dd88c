"""What evaluation runs in one native call is what the engine computes step by step; what it must leave, it leaves."""

from __future__ import annotations

import pytest
import torch
from operands import CONVOLVING
from torch import nn
from twins import BOTTLENECK, IMAGENET, PLAIN, images, norms, pair

from efficient_densenet.execution import ready, stage, stem
from efficient_densenet.ops.cpu import layers as native
from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.cpu import stem as native_stem

pytestmark = [
    pytest.mark.skipif(not CONVOLVING, reason="this processor has no kernels for whole convolutions"),
    pytest.mark.usefixtures("own_convolutions"),
]
KINDS = {"plain": PLAIN, "bottleneck": BOTTLENECK, "imagenet": IMAGENET, "no pool": BOTTLENECK | {"compression": 1.0}}


@pytest.fixture
def calls(monkeypatch):
    """What each native call has returned, blocks and stems."""
    found = []

    def counted(run):
        return lambda *arguments: (found.append(run(*arguments)), found[-1])[1]

    for module in (native, native_stem):
        monkeypatch.setattr(module, "evaluate", counted(module.evaluate))
    return found


@pytest.fixture
def step_by_step(monkeypatch):
    """Runs a network by the engine's own steps."""

    def run(network, x):
        with monkeypatch.context() as patched:
            patched.setattr(ready.stage, "evaluate", lambda x, block: stage.forward(x, block)[0])
            patched.setattr(ready.stem, "evaluate", lambda x, first: stem.forward(x, first)[0])
            return evaluated(network, x)

    return run


def evaluated(network, x):
    """The third evaluation: those before it leave things for it."""
    with torch.no_grad():
        return [network(x) for _ in range(3)][-1]


def channels_last(network):
    network.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [nn.Module.eval, channels_last], ids=["contiguous", "channels_last"])
def test_results_are_those_of_the_engine_step_by_step(calls, step_by_step, kind, dtype, change):
    if dtype not in library.load().convolves:
        pytest.skip("PyTorch runs these convolutions")
    ordinary, efficient = pair(KINDS[kind], training=False, change=change, dtype=dtype)
    for x in (images(1, 41, 38), images(3, 32, 33).to(memory_format=torch.channels_last), images(2)):
        found, expected = evaluated(efficient, x.to(dtype)), step_by_step(efficient, x.to(dtype))
        if kind == "imagenet" and dtype == torch.float32:  # step by step, the stem's convolution is PyTorch's
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found, ordinary(x.to(dtype)), rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(found, expected)
    assert calls and all(calls)


@pytest.mark.parametrize("level", CONVOLVING, ids=lambda level: level.option)
def test_every_level_of_instructions(calls, step_by_step, level):
    _, efficient = pair(BOTTLENECK, training=False, dtype=torch.float32)
    with library.held_to(level, ours=True):
        x = images(dtype=torch.float32)
        assert torch.equal(evaluated(efficient, x), step_by_step(efficient, x))
    assert calls and all(calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_read_where_they_are(calls, dtype):
    """In bfloat16, the kernels get copies of the norms."""
    if dtype not in library.load().convolves:
        pytest.skip("PyTorch runs these convolutions")
    networks = pair(BOTTLENECK, training=False, dtype=dtype)
    x = images(dtype=dtype)
    for _ in range(2):
        ordinary, efficient = (evaluated(network, x) for network in networks)
        torch.testing.assert_close(efficient, ordinary, rtol=1e-4 if dtype == torch.float32 else 0.1, atol=0.05)
        for network in networks:
            for norm in norms(network):
                norm.weight.data.mul_(1.5)
                norm.running_mean.add_(0.25)
    assert calls and all(calls)


@pytest.mark.parametrize("kind", ["plain", "bottleneck", "imagenet"])
@pytest.mark.parametrize("name", ["conv0", "denselayer2", "transition1", "norm"])
def test_values_that_are_not_finite(calls, step_by_step, kind, name):
    _, efficient = pair(KINDS[kind], training=False, dtype=torch.float32)
    with torch.no_grad():
        for key, tensor in efficient.named_parameters():
            if name in key and tensor.dim() > 1:
                tensor.view(-1)[1] = torch.inf
    x = images(dtype=torch.float32)
    found, expected = evaluated(efficient, x), step_by_step(efficient, x)
    assert torch.equal(found.isfinite(), expected.isfinite())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    if name == "denselayer2":
        assert not all(calls)


def test_what_is_no_plain_evaluation_runs_step_by_step(calls):
    """Statistics of the batch, and a profiler that wants to see each operation."""
    _, efficient = pair(BOTTLENECK, training=False, dtype=torch.float32)
    x = images(dtype=torch.float32)
    evaluated(efficient, x)
    calls.clear()
    with torch.profiler.profile() as profile, torch.no_grad():
        efficient(x)
    assert not any(calls) and "cpu.run_layers" in {event.key for event in profile.key_averages()}
    for norm in norms(efficient.features.denseblock1):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    calls.clear()
    evaluated(efficient, x)
    assert calls  # of the second block
    before = len(calls)
    efficient.train()
    evaluated(efficient, x)
    assert len(calls) == before
