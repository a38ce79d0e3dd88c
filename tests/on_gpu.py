"""What the tests that need a GPU share."""

from __future__ import annotations

import pytest
import torch

_no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def gpu(test):
    return pytest.mark.gpu(_no_gpu(test))


def close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e.double()).abs().max() <= tolerance * max(e.abs().max().item(), 1)
