"""`check-gradients` passes where it should, and above all: fails where it should."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from efficient_densenet import DenseNet
from efficient_densenet.adopt import run
from efficient_densenet.cli import main
from efficient_densenet.execution import shared
from efficient_densenet.measure import gradients
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.gradients import WHOLE, Difference, strain, whole_gradient
from efficient_densenet.measure.kinks import move_zeros_into_gaps
from efficient_densenet.models import DenseLayer

SMALL = ["check-gradients", "--num-init-features", "6", "--block-config", "2,2", "--input-size", "12", "--seed", "3"]
WIDTH = 9  # channels that the second layer of the first block reads, and no other layer
WAYS = ["recompute", "true"]


class Spoil(torch.autograd.Function):
    """The identity, with the gradient multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def break_way(monkeypatch, way, spoil_weight=lambda weight: weight, spoil_norm=lambda norm: None):
    """In networks that run this way, break the second layer: its convolution's weight, or its norm after use."""
    run_block, run_layer, recomputing = shared.run, DenseLayer.forward, run.recomputing
    running = []

    def broken_block(x, plan, modules, *rest):
        norm, convolution = plan.norms[1], plan.convolutions[1]
        if norm.source != (0, WIDTH):
            return run_block(x, plan, modules, *rest)
        modules = list(modules)
        conv = modules[convolution.part]
        modules[convolution.part] = SimpleNamespace(
            weight=spoil_weight(conv.weight), bias=None, _parameters={}, _buffers={}
        )
        result = run_block(x, plan, modules, *rest)
        spoil_norm(modules[norm.part])
        return result

    @contextmanager
    def noted():
        running.append(True)
        with recomputing():
            yield
        running.pop()

    def broken_layer(layer, features):
        # Not where the forward is looked at, which is without gradients.
        chosen = bool(running) == (way == "recompute") and torch.is_grad_enabled()
        if not chosen or layer.norm1.num_features != WIDTH:
            return run_layer(layer, features)
        x = layer.relu1(layer.norm1(torch.cat(list(features), 1)))
        result = F.conv2d(x, spoil_weight(layer.conv1.weight), padding=1)
        spoil_norm(layer.norm1)
        return result

    if way == "true":
        monkeypatch.setattr(shared, "run", broken_block)
    else:
        monkeypatch.setattr(run, "recomputing", noted)
        monkeypatch.setattr(DenseLayer, "forward", broken_layer)


@pytest.mark.parametrize(
    "options",
    [
        ["--efficient", "recompute"],
        ["--efficient", "recompute", "--evaluation"],
        ["--efficient", "recompute", "--bottleneck", "--compression", "0.5", "--dtype", "float64"],
        ["--efficient", "recompute", "--dtype", "bfloat16"],
        ["--efficient", "recompute", "--drop-rate", "0.4", "--training"],
        [],
        ["--keep", "inputs", "--evaluation"],
        ["--keep", "features", "--bottleneck", "--compression", "0.5", "--dtype", "float64"],
        ["--keep", "inputs", "--bottleneck"],
        ["--dtype", "bfloat16"],
        ["--keep", "features", "--drop-rate", "0.4", "--training"],
        ["--input-size", "40"],
    ],
    ids=" ".join,
)
def test_equal(options, capsys):
    assert main([*SMALL, *options]) == 0
    printed = capsys.readouterr().out
    recompute = "recompute" in options
    assert f"efficient={'recompute' if recompute else True!r}" in printed
    assert ("equal bit for bit" if recompute else "equal up to rounding") in printed
    assert "1 output, 1 loss, 1 input gradient" in printed
    if "--input-size" not in options:
        norms, convs = (10, 10) if "--bottleneck" in options else (6, 6)
        assert f"{2 * norms + convs + 2} parameter gradients, {3 * norms} buffers" in printed


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("way", WAYS)
def test_equal_on_two_devices(way, capsys):
    assert main([*SMALL, "--num-devices", "2", "--batch-size", "5", "--efficient", way]) == 0
    printed = capsys.readouterr().out
    assert "verdict   equal" in printed and "buffers on each device" in printed


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("way", WAYS)
def test_names_a_broken_gradient(way, dtype, monkeypatch, capsys):
    """One per cent, in the gradient of one weight."""
    break_way(monkeypatch, way, lambda weight: Spoil.apply(weight, 1.01))
    assert main([*SMALL, "--efficient", way, "--dtype", dtype]) == 1
    printed = capsys.readouterr().out
    assert "parameter gradient features.denseblock1.denselayer2.conv1.weight: off by 0.01 of its norm" in printed
    assert printed.count("parameter gradient features") == 1, "no other tensor is wrong"
    assert "verdict   DIFFERENT" in printed


@pytest.mark.parametrize("way", WAYS)
def test_names_a_broken_buffer(way, monkeypatch, capsys):
    def spoil(norm):
        norm.running_var.data *= 1.01  # behind autograd's back, which would refuse it

    break_way(monkeypatch, way, spoil_norm=spoil)
    assert main([*SMALL, "--efficient", way]) == 1
    printed = capsys.readouterr().out
    assert "worst     buffer features.denseblock1.denselayer2.norm1.running_var: off by 0.01 of its norm" in printed
    assert "DIFFERENT: 1 of" in printed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_equal_nonsense_does_not_pass(factor, way, monkeypatch, capsys):
    for each in ("ordinary", way):
        break_way(monkeypatch, each, lambda weight: Spoil.apply(weight, factor))
    assert main([*SMALL, "--efficient", way]) == 1
    assert "denselayer2.conv1.weight: off by inf" in capsys.readouterr().out


@pytest.mark.parametrize("way", WAYS)
def test_a_missing_gradient_does_not_pass(way, monkeypatch, capsys):
    break_way(monkeypatch, way, lambda weight: weight.detach())
    assert main([*SMALL, "--efficient", way]) == 1
    assert "denselayer2.conv1.weight: off by inf" in capsys.readouterr().out


def test_the_ordinary_error_is_allowed_and_twice_that_for_a_single_tensor():
    def strain_of(error, ordinary_error, size=1.0, kind="buffer", dtype="float32"):
        return strain(Difference(kind, "x", size, error, ordinary_error, False), dtype)

    assert strain_of(1.9, 1.0) < 1 < strain_of(2.1, 1.0)
    assert strain_of(0.99, 1.0, kind=WHOLE) < 1 < strain_of(1.01, 1.0, kind=WHOLE)
    assert strain_of(1e-5, 0.0) < 1 < strain_of(1e-3, 0.0), "a floor for what rounding does by chance"
    assert strain_of(1e-5, 0.0, kind=WHOLE) > 1 and strain_of(1e-9, 0.0, dtype="float64") > 1
    assert strain_of(0.0, 0.0, size=0.0) == 0 and strain_of(1e-30, 0.0, size=0.0) > 1
    for nonsense in (float("nan"), float("inf")):
        assert strain_of(nonsense, 1.0) > 1 and strain_of(nonsense, nonsense) > 1 and strain_of(1.0, nonsense) > 1


def test_the_whole_gradient_is_one_long_vector():
    parts = [Difference("parameter gradient", n, 3.0 * s, 6.0 * s, 0.3 * s, False) for n, s in (("a", 1), ("b", 4 / 3))]
    other = Difference("buffer", "c", 100.0, 100.0, 100.0, True)
    (whole,) = whole_gradient([*parts, other])
    assert (whole.size, whole.error, whole.ordinary_error) == pytest.approx((5, 10, 0.5))


@pytest.mark.parametrize("drop_rate", [0.0, 0.4])
def test_no_activation_is_near_zero(drop_rate):
    torch.manual_seed(0)
    network = DenseNet(num_init_features=6, block_config=(2, 2), input_size=12, drop_rate=drop_rate).double()
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    nearest = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, y, name=name: nearest.update({name: y.abs().min().item()}))

    def run():
        torch.manual_seed(1)
        network(images)
        return min(nearest.values())

    before = run()
    torch.manual_seed(1)
    move_zeros_into_gaps(network, images, Place("cpu"))
    assert run() > max(1e-4, 10 * before)
    assert len(nearest) == 6


def test_rounding_is_judged_in_float64():
    """The ordinary network has errors too; were it its own reference, the verdict would allow nothing."""
    network = gradients.Network(None, {"num_init_features": 4, "block_config": [2]}, 8, 100)
    case = gradients.Case(network, True, "bottleneck", True, "float32", 3, seed=0)
    (whole,) = whole_gradient(gradients.compare(case, Place("cpu")))
    assert 1e-8 < whole.share(whole.ordinary_error) < 1e-5


@pytest.mark.parametrize("spoilt", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_better_of_the_ordinary_forms_is_the_measure(spoilt, monkeypatch):
    step, formats = gradients._step, []

    def spoil(case, place, network, memory_format=torch.contiguous_format):
        results = step(case, place, network, memory_format)
        ordinary = network.efficient is False and next(network.parameters()).dtype == torch.float32
        if ordinary and memory_format == spoilt:
            formats.append(memory_format)
            results = {key: value * 1.01 for key, value in results.items()}
        return results

    monkeypatch.setattr(gradients, "_step", spoil)
    network = gradients.Network(None, {"num_init_features": 4, "block_config": [2]}, 8, 100)
    case = gradients.Case(network, True, "bottleneck", True, "float32", 3, seed=0)
    (whole,) = whole_gradient(gradients.compare(case, Place("cpu")))
    assert formats == [spoilt] and whole.share(whole.ordinary_error) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-devices", "5"], "batch of 4"),
        (["--input-size", "2", "--batch-size", "1"], "more images"),
        pytest.param(
            ["--device", "cuda"],
            "CUDA devices",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_refuses_what_cannot_run(options, message, capsys):
    assert main([*SMALL, *options]) == 2
    assert message in capsys.readouterr().err
