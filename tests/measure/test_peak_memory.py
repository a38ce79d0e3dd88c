"""Byte counts are exact; and the recomputing way keeps to its memory."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from efficient_densenet import DenseNet, densenet121, densenet_cifar
from efficient_densenet.measure.memory import available_bytes, peak_bytes
from efficient_densenet.units import format_bytes, parse_bytes

FLOAT = 4


def test_counts_what_is_alive_at_one_time():
    before = [torch.empty(5000)]

    def step():
        a = torch.empty(1000)
        b = torch.empty(500)
        del a
        c = torch.empty(2000)
        del b, c
        torch.empty(100)

    assert peak_bytes(step) == (500 + 2000) * FLOAT
    assert peak_bytes(before.clear) == 0, "what was alive before does not count, even when it goes"
    assert peak_bytes(lambda: None) == 0


def test_counts_a_training_step():
    """A linear layer: a step adds its output, the gradient of it, and the gradient of the weight to be added up."""
    layer = nn.Linear(300, 200, bias=False)
    layer.weight.grad = torch.zeros_like(layer.weight)
    x = torch.randn(50, 300)

    def step():
        layer.zero_grad(set_to_none=False)
        layer(x).backward(torch.ones(50, 200))

    assert peak_bytes(step) == (2 * 50 * 200 + 300 * 200) * FLOAT


@pytest.mark.parametrize(
    ("build", "images", "bar"),
    [
        (DenseNet, (2, 3, 32, 32), 0.42),
        (partial(densenet_cifar, 100, 12, True), (2, 3, 32, 32), 0.42),
        (densenet121, (1, 3, 224, 224), 0.55),
    ],
    ids=["L40 k12", "BC100 k12", "DenseNet-121"],
)
def test_recompute_keeps_less(build, images, bar):
    def peak(efficient):
        network = build(efficient=efficient)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        x = torch.zeros(images)
        return peak_bytes(lambda: network(x).sum().backward())

    assert 0 < peak("recompute") <= bar * peak(False)


def test_resident_peak_sees_memory_that_is_written():
    code = (
        "from efficient_densenet.measure.memory import resident_peak_bytes as peak; import torch; "
        "print(peak()); torch.ones(50_000_000); print(peak())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, result.stdout.split())
    assert 50e6 < before < 1.5e9
    assert 190e6 < after - before < 230e6


def test_available_memory_is_what_the_machine_has_at_most():
    assert 0 < available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("12GB", 12_000_000_000), ("500MB", 500_000_000), ("1.5 GiB", 1_610_612_736), ("7b", 7), ("2kib", 2048)],
)
def test_reads_amounts_of_memory(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["12", "GB", "-1GB", "1XB", "1e9B", ""])
def test_refuses_what_is_no_amount(text):
    with pytest.raises(argparse.ArgumentTypeError, match="12GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("amount", "text"),
    [(12e6, "12.0 MB"), (123_456, "0.1 MB"), (1000, "1.0 kB"), (40, "40 B"), (0, "0.0 MB"), (11e9, "11.0 GB")],
)
def test_small_amounts_of_memory_are_not_shown_as_nothing(amount, text):
    assert format_bytes(amount) == text
