"""`check-gradients` passes where it should, and above all: fails where it should."""

from __future__ import annotations

import re

import pytest
import torch

from efficient_densenet.cli import main
from efficient_densenet.models import layers

SMALL = ["check-gradients", "--num-init-features", "6", "--block-config", "2,2", "--input-size", "12", "--seed", "3"]


class Spoil(torch.autograd.Function):
    """The identity, with the gradient multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def break_way(monkeypatch, efficient, spoil, layer=2):
    """Have the network that runs as `efficient` pass what its `layer`-th layer made through ``spoil(result, norm)``."""
    norm_relu_conv = layers.norm_relu_conv
    calls = []

    def broken(inputs, norm, relu, conv, way):
        result = norm_relu_conv(inputs, norm, relu, conv, way)
        if way != efficient:
            return result
        calls.append(conv)
        return spoil(result, norm) if len(calls) == layer else result

    monkeypatch.setattr(layers, "norm_relu_conv", broken)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--evaluation"],
        ["--bottleneck", "--compression", "0.5", "--dtype", "float64"],
        ["--dtype", "bfloat16"],
        ["--drop-rate", "0.4", "--training"],
    ],
    ids=" ".join,
)
def test_equal(options, capsys):
    assert main([*SMALL, *options]) == 0
    printed = capsys.readouterr().out
    assert "equal bit for bit" in printed
    assert "1 output, 1 loss, 1 input gradient" in printed
    norms, convs = (10, 10) if "--bottleneck" in options else (6, 6)
    assert f"{2 * norms + convs + 2} parameter gradients, {3 * norms} buffers" in printed


def test_equal_on_two_devices(capsys):
    assert main([*SMALL, "--num-devices", "2", "--batch-size", "5"]) == 0
    printed = capsys.readouterr().out
    assert "equal bit for bit" in printed and "buffers on each device" in printed


def test_names_a_broken_gradient(monkeypatch, capsys):
    break_way(monkeypatch, "recompute", lambda x, norm: Spoil.apply(x, 1.01))
    assert main(SMALL) == 1
    printed = capsys.readouterr().out
    assert "verdict   DIFFERENT" in printed
    assert "parameter gradient features.denseblock1.denselayer2.conv1.weight" in printed
    assert "worst     none" not in printed and "denseblock2" not in printed
    share = [float(d) / float(s) for d, s in re.findall(r"denselayer2.*off by (\S+), .* is (\S+)", printed)]
    assert share == pytest.approx([0.01] * len(share), rel=0.02)


def test_names_a_broken_buffer(monkeypatch, capsys):
    def spoil(result, norm):
        norm.running_mean.data += 1e-3  # behind autograd's back, which would refuse it
        return result

    break_way(monkeypatch, "recompute", spoil)
    assert main(SMALL) == 1
    printed = capsys.readouterr().out
    assert "worst     buffer features.denseblock1.denselayer2.norm1.running_mean: off by 0.001" in printed
    assert "DIFFERENT: 1 of" in printed


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_equal_nonsense_does_not_pass(factor, monkeypatch, capsys):
    for efficient in (False, "recompute"):
        break_way(monkeypatch, efficient, lambda x, norm: Spoil.apply(x, factor))
    assert main(SMALL) == 1
    assert "denselayer2.conv1.weight: off by nan" in capsys.readouterr().out


def test_a_missing_gradient_does_not_pass(monkeypatch, capsys):
    break_way(monkeypatch, "recompute", lambda x, norm: x.detach())
    assert main(SMALL) == 1
    assert "denselayer2.conv1.weight: off by inf" in capsys.readouterr().out


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
