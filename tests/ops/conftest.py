"""Fixtures of the tests that need a GPU."""

from __future__ import annotations

import pytest
import torch

from efficient_densenet.ops.triton import trust


@pytest.fixture
def unchecked(monkeypatch):
    """What is tested here must not be replaced by plain PyTorch, nor be checked before by each process."""
    monkeypatch.setenv(trust.VARIABLE, "trust")


@pytest.fixture
def multiply():
    """Sets how float32 is multiplied, until the end of the test. (`monkeypatch` cannot set it back.)"""
    kinds = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [kind.fp32_precision for kind in kinds]

    def by(precision):
        for kind in kinds:
            kind.fp32_precision = precision

    yield by
    for kind, precision in zip(kinds, before, strict=True):
        kind.fp32_precision = precision


@pytest.fixture
def precise(multiply):
    multiply("ieee")


@pytest.fixture
def deterministic(monkeypatch):
    """cuDNN, which has the network's first convolution, may add up in any order otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
