"""What is kept after a forward pass, by exact counts; and that the report tells it."""

from __future__ import annotations

import gc

import pytest
import torch
import torchvision
from others import monai_small, timm_small, torchvision_small

from efficient_densenet import DenseNet, make_efficient, report, restore
from efficient_densenet.execution import KEEP, pieces
from efficient_densenet.measure.memory import peak_bytes
from efficient_densenet.ops import layout

every_keep = pytest.mark.parametrize("keep", KEEP)


def alive_after(function):
    """Exact bytes of tensors that a call leaves alive, and what it returned."""
    gc.collect()  # checkpointing leaves cycles behind
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = function()
        gc.collect()
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]"), output


@every_keep
@pytest.mark.parametrize("build", [torchvision_small, timm_small], ids=["torchvision", "timm"])
def test_a_converted_model_keeps_what_ours_keeps(build, keep):
    growth, features = (4, 6) if build is torchvision_small else (8, 16)
    ours = DenseNet(3, features, growth, (2, 3), 0.5, 64, 2, num_classes=5, efficient=True, keep=keep)
    theirs, x = make_efficient(build(), keep), torch.randn(2, 3, 64, 64)
    # The head is not in one piece in theirs.
    expected, _ = alive_after(lambda: ours.features(x))
    actual, _ = alive_after(lambda: theirs.features(x))
    assert actual == expected


def places(model, x):
    """The input of each dense block."""
    found = {}
    hooks = [
        module.register_forward_pre_hook(lambda _m, inputs, name=name: found.update({name: inputs[0].detach()}))
        for name, module in model.named_modules()
        if "block" in name.rpartition(".")[2]
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


SHAPES = {
    "torchvision": (lambda: torchvision_small(block_config=(4, 5)), (3, 64, 64)),
    "torchvision, checkpointed": (lambda: torchvision_small(block_config=(4, 5), memory_efficient=True), (3, 64, 64)),
    "timm": (lambda: timm_small(block_config=(4, 5)), (3, 64, 64)),
    "MONAI 3D": (lambda: monai_small(3, block_config=(4, 5)), (3, 32, 32, 32)),
}


@every_keep
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.filterwarnings("ignore:.*use_reentrant.*")
def test_the_report_tells_what_blocks_keep_before_and_after(name, keep):
    build, shape = SHAPES[name]
    model, x = build(), torch.randn(2, *shape)
    inputs = places(model, x)
    told = {e.name: e for e in report(model, keep, shape).entries}
    for where, given in inputs.items():
        block = model.get_submodule(where)
        alive, output = alive_after(lambda block=block, given=given: block(given.clone().requires_grad_()))
        measured = alive - 4 * output.numel()  # which belongs to what lies behind
        if "checkpointed" in name:  # each keeps a state of the random number generator
            measured -= len(list(block.children())) * torch.get_rng_state().numel()
        else:  # concatenated anew for the first layer
            measured -= 4 * given.numel()
        assert 2 * told[where].bytes_before == pytest.approx(measured, rel=0.1)

    make_efficient(model, keep)
    assert {e.name: e for e in report(model, image=shape).entries} == told
    block, transition = model.features.denseblock1, model.features.transition1
    given = inputs["features.denseblock1"].requires_grad_()
    joined = make_efficient(torch.nn.Sequential(restore(block), restore(transition)), keep)
    alive, output = alive_after(lambda: joined(given))
    measured = alive - 4 * output.numel() + (4 * given.numel() if keep == "inputs" else 0)
    entry = told["features.denseblock1"]
    statistics = 4 * (2 * given.shape[1] + 8 * 4 * 8 + 1)
    assert 0 <= measured - 2 * entry.bytes_after <= 4 * statistics
    assert told["features.transition1"].bytes_after == 0


def test_the_stem_is_told_too():
    model, shape = torchvision.models.DenseNet(block_config=(2, 2)), (3, 64, 64)
    stem = report(model, "features", shape).entries[-1]
    features, x = model.features, torch.randn(2, *shape)
    alive, output = alive_after(lambda: features.pool0(features.relu0(features.norm0(features.conv0(x)))))
    measured = alive - 4 * output.numel()
    assert (stem.name, stem.channels) == ("features", "3 → 64")
    assert 2 * stem.bytes_before == pytest.approx(measured, rel=0.01)
    parts = make_efficient(torch.nn.Sequential(*list(features)[:6]), "features")
    pooled = alive_after(lambda: parts(x))
    joined = make_efficient(torch.nn.Sequential(*list(restore(parts))[4:]), "features")
    block = alive_after(lambda: joined(torch.zeros_like(output)))
    statistics = 4 * (2 * 64 + 1 + 3 * 64)
    assert 2 * stem.bytes_after == pooled[0] - block[0] - statistics == 0


@every_keep
def test_the_peak_that_is_told_is_the_peak_of_a_training_step(keep, monkeypatch):
    """Of live bytes per image, exact; with a scratch of one image, as it is for networks of a usual size.

    That of other networks is tested with `plan`, which it comes from.
    """
    monkeypatch.setitem(layout.SCRATCH, "cpu", 1)
    monkeypatch.setitem(pieces._MOST, "cpu", 1 << 15)
    monkeypatch.setitem(pieces._HELD, "cpu", 0)
    model, peaks = make_efficient(torchvision_small(block_config=(3, 3, 3)), keep), []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for n in (8, 16):
        x = torch.randn(n, 3, 96, 96)
        peaks.append(peak_bytes(lambda x=x: model(x).sum().backward()))
    assert report(model, image=(3, 96, 96)).peak[1] == pytest.approx((peaks[1] - peaks[0]) / 8, rel=0.1)


def test_the_table_can_be_read():
    """That of DenseNet-121 stands in the README, which is tested too."""
    found = report(torchvision_small(), "features", (3, 224, 224))
    first, _, head, *rows = str(found).splitlines()
    assert first == "Kept for the backward pass, before and after: MB per image of 3×224×224, float32."
    assert head.split() == ["module", "was", "now", "channels", "before", "after"]
    before, after = (
        [getattr(entry, name) / 1e6 for entry in found.entries] for name in ("bytes_before", "bytes_after")
    )
    assert rows[0].split("  ")[0] == "features.denseblock1"
    # Before, 6 + 6 + 8 + 8 channels of 56×56 for the first layer and 10 + 10 + 8 + 8 for the second; after, 14.
    assert rows[0].split()[-2:] == ["0.80", "0.18"]
    assert rows[-2].split() == ["together", f"{sum(before):.2f}", f"{sum(after):.2f}"]
    assert rows[-1].split() == ["peak", "of", "a", "training", "step", *(f"{peak / 1e6:.2f}" for peak in found.peak)]
    assert len({len(row) for row in [head, *rows]}) == 1
    assert "values per pixel" in str(report(torchvision_small()))
