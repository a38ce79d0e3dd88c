"""What a block by itself hands out belongs to whoever gets it, though backward reads the same memory."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from comparison import assert_close, gradients, weighted_sum
from look_alikes import bottleneck_parts
from torch import nn

from efficient_densenet import dense_block
from efficient_densenet.execution import KEEP
from efficient_densenet.measure.memory import peak_bytes
from efficient_densenet.ops import layout

READS, MAKES, WIDE, LAYERS = 5, 2, 12, 3  # channels: of the input, of each layer and of its bottleneck output
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

every_keep = pytest.mark.parametrize("keep", KEEP)
every_format = pytest.mark.parametrize("layout", FORMATS)


@pytest.fixture(autouse=True)
def pieces_of_one_image(monkeypatch):
    monkeypatch.setitem(layout.SCRATCH, "cpu", 1)


@cache  # it is looked at once
def layers_of_a_block(dtype=torch.float64):
    torch.manual_seed(0)
    widths = [READS + i * MAKES for i in range(LAYERS)]
    return nn.ModuleList(nn.Sequential(bottleneck_parts(width, MAKES, WIDE)) for width in widths).to(dtype)


def concatenated(x, layers, _keep):
    for layer in layers:
        x = torch.cat([x, layer(x)], 1)
    return x


def images(layout, n=3, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(n, READS, 6, 7, dtype=dtype).to(memory_format=FORMATS[layout]).requires_grad_()


def in_place(out):
    return weighted_sum(out.relu_())


def partly_in_place(out):
    out[:, 2:7].mul_(2)
    return weighted_sum(out)


def read_and_then_changed(out):
    read = out * 2
    out += 1
    return weighted_sum(read) + weighted_sum(out.cos())


def used_twice(out):
    return weighted_sum(out.sin()) + weighted_sum(out[:, READS:].cos())


def the_new_alone(out):
    return weighted_sum(out[:, READS:])


def overwritten_behind_autograd(out):
    loss = weighted_sum(out)
    out.data.zero_()
    return loss


def overwritten_by_numpy(out):
    loss = weighted_sum(out)
    out.detach().numpy()[:] = 0
    return loss


def through_a_norm_in_place(out):
    return weighted_sum(nn.functional.batch_norm(out, None, None, training=True).relu_())


USES = [in_place, partly_in_place, read_and_then_changed, used_twice, the_new_alone, overwritten_behind_autograd]
USES += [overwritten_by_numpy, through_a_norm_in_place, torch.sum]


@every_format
@every_keep
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_it_may_be_used_in_any_way(use, keep, layout):
    found, layers = [], layers_of_a_block()
    for block in (dense_block, concatenated):
        layers.zero_grad()
        x = images(layout)
        out = block(x, layers, keep)
        assert out.is_contiguous(memory_format=FORMATS[layout])
        use(out).backward()
        found.append({"output": out.detach(), "input gradient": x.grad, **gradients(layers)})
    assert_close(*found)


@every_format
@every_keep
def test_gradients_that_others_have_stay_as_they_are(keep, layout):
    """Backward works in the memory of the gradient that it gets, if nobody else has it: a hook, `grad`, the caller."""
    found, layers = [], layers_of_a_block()
    for block in (dense_block, concatenated):
        layers.zero_grad()
        x, hooked = images(layout), []
        out = block(x, layers, keep)
        given = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).clone(memory_format=FORMATS[layout])
        before = given.clone()
        out.retain_grad()
        out.register_hook(hooked.append)
        out.backward(given, retain_graph=True)
        out.backward(torch.from_numpy(given.numpy()))  # memory that belongs to somebody else
        assert torch.equal(given, before)
        assert all(torch.equal(grad, before) for grad in hooked) and torch.equal(out.grad, 2 * before)
        found.append({"output": out.detach(), "input gradient": x.grad, **gradients(layers)})
    assert_close(*found)


def bytes_of(values, n):
    return 4 * values * n * 6 * 7


@every_format
@every_keep
def test_bytes_kept_by_a_block_by_itself(keep, layout):
    """Of each image X and the bottleneck outputs, if they are kept: what is handed out takes nothing more."""
    alive = []
    for n in (8, 16):
        x = images(layout, n, torch.float32)
        dense_block(x, layers_of_a_block(torch.float32), keep)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            out = dense_block(x, layers_of_a_block(torch.float32), keep)
        events = profile.profiler.kineto_results.events()
        alive.append(sum(event.nbytes() for event in events if event.name() == "[memory]"))
        del out
    bottlenecks = LAYERS * WIDE if keep == "bottleneck" else 0
    assert alive[1] - alive[0] == bytes_of(READS + LAYERS * MAKES + bottlenecks, 8)


@every_format
def test_bytes_of_a_step_through_a_block_by_itself(layout):
    """Of each image the features, what the loss keeps of their size, the gradient that comes in, which becomes D, and
    one bottleneck output with its gradient."""
    layers, peaks = layers_of_a_block(torch.float32), []
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    features = READS + LAYERS * MAKES
    for n in (8, 16):
        x, factor = images(layout, n, torch.float32), torch.randn(n, features, 6, 7)
        x.grad = torch.zeros_like(x)
        factor = factor.to(memory_format=FORMATS[layout])

        def step(x=x, factor=factor):
            (dense_block(x, layers, "features") * factor).sum().backward()

        peaks.append(peak_bytes(step))
    copied = features if torch.__version__ < (2, 12) else 0  # it holds the gradient that comes in
    assert peaks[1] - peaks[0] == bytes_of(2 * features + copied + 2 * WIDE, 8)
