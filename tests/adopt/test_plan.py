"""What is planned is what a training step needs, by exact counts of live bytes."""

from __future__ import annotations

import pytest
import torch
from others import monai_small, timm_small, torchvision_small, unet

from efficient_densenet import DenseNet, UserError, make_efficient, ops, plan, restore
from efficient_densenet.adopt import planner
from efficient_densenet.adopt.planner import ORDINARY, RECOMPUTE, WAYS
from efficient_densenet.adopt.step import step_memory
from efficient_densenet.cli import main
from efficient_densenet.measure.memory import peak_bytes
from efficient_densenet.ops import layout

USUAL, LITTLE = layout.SCRATCH["cpu"], 1 << 16  # bytes of a scratch tensor
# Each with a batch whose activations outweigh that of the scratch tensor.
NETWORKS = {
    "L=16": (lambda: DenseNet(3, 12, 12, (4, 4, 4), num_classes=2), (3, 32, 32), 12, LITTLE),
    "BC L=28": (lambda: DenseNet(3, 12, 12, (4, 4, 4), 0.5, bn_size=4, num_classes=2), (3, 32, 32), 12, LITTLE),
    "torchvision": (lambda: torchvision_small(block_config=(3, 3, 3)), (3, 96, 96), 4, LITTLE),
    "torchvision, wider": (lambda: torchvision_small(num_init_features=16), (3, 96, 96), 16, LITTLE),
    "timm, deep stem": (lambda: timm_small(block_config=(3, 3, 3), stem_type="deep"), (3, 96, 96), 4, LITTLE),
    "MONAI 3D": (lambda: monai_small(3, growth_rate=16, init_features=16), (3, 32, 32, 32), 16, USUAL),
    "U-Net": (lambda: unet(3), (3, 64, 64), 3, USUAL),
}


def run_as(model, way):
    if way == ORDINARY:
        restore(model)
    elif way == RECOMPUTE:
        make_efficient(model, way="recompute")
    else:
        make_efficient(model, way)


def measured(model, image, batch_size, autocast=None):
    """The peak of a step that runs."""
    x = torch.randn(batch_size, *image)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step():
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(x).float().square().sum()
        loss.backward()

    return peak_bytes(step)


# What oneDNN transposes in half precision is not counted, and outweighs the rest of the small network of torchvision.
@pytest.mark.parametrize(
    ("name", "autocast"),
    [*((name, None) for name in NETWORKS), *((name, torch.bfloat16) for name in NETWORKS if name != "torchvision")],
)
def test_the_planned_peak_is_the_peak(name, autocast, monkeypatch):
    build, image, batch_size, scratch = NETWORKS[name]
    monkeypatch.setitem(layout.SCRATCH, "cpu", scratch)
    model = build()
    for way in WAYS:
        run_as(model, way)
        planned = step_memory(model, image, batch_size, autocast).peak
        assert planned == pytest.approx(measured(model, image, batch_size, autocast), rel=0.1), way


@pytest.mark.parametrize("in_one_call", [True, False], ids=["in one call", "one after the other"])
def test_layers_are_counted_as_they_run(in_one_call, monkeypatch):
    build, image, batch_size, _ = NETWORKS["BC L=28"]
    model = make_efficient(build())
    if not in_one_call:
        monkeypatch.setattr(ops, "runs_layers", lambda *_: False)
    planned = step_memory(model, image, batch_size).peak
    assert planned == pytest.approx(measured(model, image, batch_size), rel=2e-4)


def test_nothing_runs_and_nothing_changes():
    model = DenseNet(3, 12, 12, (2, 2), 0.5, bn_size=4, num_classes=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = plan(model, (3, 32, 32), batch_size=8)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.gradients == found.state == 4 * sum(p.numel() for p in model.parameters())
    assert [way.name for way in found.ways] == list(WAYS)
    assert "features.denseblock1" in found.ways[0].parts
    kept = [way.step.kept for way in found.ways]
    assert kept[0] > max(kept[1:3]) and kept[4] > kept[3] > max(kept[1:3])
    for way in found.ways:
        assert way.step.kept <= max(way.step.trace[: way.step.forward]) <= max(way.step.trace) <= way.step.peak


def test_parts_are_what_is_kept():
    """With what the last norm reads, which lies behind all parts, and is the larger the fewer layers there are."""
    model, n = torchvision_small(block_config=(4, 4, 4), growth_rate=8), 32
    for way in plan(model, (3, 96, 96), batch_size=n).ways:
        last = 4 * n * 3 * 3 * model.classifier.in_features
        assert sum(way.parts.values()) + last == pytest.approx(way.step.kept, rel=0.1), way.name


def test_the_fastest_that_fits_is_recommended():
    model, image, batch_size = DenseNet(3, 12, 12, (3,), bn_size=4, num_classes=2), (3, 32, 32), 37
    for way in plan(model, image, batch_size=batch_size).ways[1:2]:
        found = plan(model, image, batch_size=30, memory=way.needed)
        assert found.recommended == way.name
        assert {w.name: w.largest_batch for w in found.ways}[way.name] == batch_size
    nothing = plan(model, image, memory="100kB")
    assert nothing.recommended is None and "32 images do not fit into 0.1 MB; 0 do" in str(nothing)


def test_large_batches_lie_on_a_line(monkeypatch):
    build, image, batch_size, scratch = NETWORKS["BC L=28"]
    monkeypatch.setitem(layout.SCRATCH, "cpu", scratch)
    counted = plan(build(), image, batch_size=5 * batch_size)
    monkeypatch.setattr(planner, "_MOST_COUNTED", 4 * batch_size)
    for one, other in zip(plan(build(), image, batch_size=5 * batch_size).ways, counted.ways, strict=True):
        assert one.needed == pytest.approx(other.needed, rel=0.01) and one.step.where == other.step.where
    assert plan(build(), image, memory="999999TB").ways[0].largest_batch > 10**9


@pytest.mark.parametrize(
    "arguments", [{"optimizer": "adagrad"}, {"batch_size": 0}, {"memory": -1}], ids=lambda a: next(iter(a))
)
def test_what_is_not_supported(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        plan(DenseNet(block_config=(1, 1)), (3, 32, 32), **arguments)


@pytest.mark.parametrize("model", [torch.nn.ReLU(), "densenet121"], ids=["no parameters", "no module"])
def test_what_is_no_network(model):
    with pytest.raises(UserError, match="with parameters"):
        plan(model, (3, 32, 32))


@pytest.mark.parametrize("batch", [(), (3, 32), (0, 3, 32, 32)], ids=str)
def test_a_batch_that_is_none(batch):
    with pytest.raises(UserError, match="batch"):
        make_efficient(DenseNet(block_config=(1, 1)), "auto", memory="1GB", batch=batch)


def test_a_model_that_cannot_be_planned():
    with pytest.raises(UserError, match="image"):
        plan(DenseNet(block_config=(1, 1)), (5, 32, 32))
    with pytest.raises(UserError, match="cannot be planned: nothing that it returns needs a gradient"):
        plan(DenseNet(block_config=(1, 1)).requires_grad_(False), (3, 32, 32))


def test_a_model_without_memory_is_planned_as_on_a_cpu():
    with torch.device("meta"):
        model = DenseNet(block_config=(1, 1))
    assert plan(model, (3, 32, 32)) == plan(DenseNet(block_config=(1, 1)), (3, 32, 32))


def test_the_command(capsys):
    options = ["--image", "3,64,64", "--batch-size", "8", "--memory", "200MB", "--dtype", "amp-bf16"]
    small = ["--set", "block_config=(2, 2)", "growth_rate=8"]
    assert main(["plan", "torchvision:DenseNet", *options, *small]) == 0
    text = capsys.readouterr().out
    assert "largest batch" in text and "Recommended: bottleneck, the fastest" in text
    assert main(["plan", "torchvision:no_such", "--image", "3,64,64"]) == 2
