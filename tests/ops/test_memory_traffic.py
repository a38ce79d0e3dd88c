"""What the ways to run a layer move through memory where plain PyTorch runs them: counted, operation by operation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from efficient_densenet import ops
from efficient_densenet.ops import eager
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics

CHANNELS, OUTPUTS, SIZE = 256, 12, (8, 16, 16)


class Moved(TorchDispatchMode):
    """Bytes that operations read and write; views move nothing."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        written = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage()._cdata for t in read}
        view = not function._schema.is_mutable and all(t.untyped_storage()._cdata in storages for t in written)
        if not view and "empty" not in str(function):
            self.total += sum(t.numel() * t.element_size() for t in [*read, *written])
        return result


def moved(attempt, dtype):
    """In bytes of a prefix."""
    with Moved() as found:
        attempt()
    return found.total / (CHANNELS * 8 * 16 * 16 * dtype.itemsize)


def on_the_buffer(dtype, kernel):
    x, grad_x = (torch.randn(*SIZE, 2 * CHANNELS).to(dtype)[..., :CHANNELS] for _ in range(2))
    norm, weight = Affine(*torch.rand(4, CHANNELS)), torch.randn(OUTPUTS, CHANNELS, kernel, kernel).to(dtype)
    out, found, through = torch.zeros(*SIZE, OUTPUTS, dtype=dtype), torch.zeros(2, OUTPUTS), torch.zeros(2, CHANNELS)

    def layer():
        eager.norm_relu_conv(x, norm, weight, out, 1, Statistics(*found))
        eager.norm_relu_conv_backward(BackwardOperands(out, x, norm, weight, grad_x, True, through))

    return moved(layer, dtype)


def ordinary_and_recomputing(dtype, kernel):
    n, *size = SIZE
    features = [torch.randn(n, 16, *size).to(dtype).requires_grad_() for _ in range(CHANNELS // 16)]
    norm, conv = nn.BatchNorm2d(CHANNELS), nn.Conv2d(CHANNELS, OUTPUTS, kernel, padding=kernel // 2).to(dtype)
    prologue = lambda: torch.relu_(norm(torch.cat(features, 1)))  # noqa: E731
    ordinary = moved(lambda: conv(prologue()).sum().backward(), dtype)
    return ordinary, ordinary + moved(prologue, dtype)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recomputing_moves_less_than_plain_pytorch_on_the_buffer(dtype, kernel):
    ordinary, recomputing = ordinary_and_recomputing(dtype, kernel)
    assert ordinary < recomputing < on_the_buffer(dtype, kernel)


@pytest.mark.parametrize(
    ("is_cuda", "supported", "slower"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_gpu_without_kernels_is_better_off_recomputing(is_cuda, supported, slower, monkeypatch):
    monkeypatch.setattr(ops.triton, "supports", lambda x: supported)
    monkeypatch.setattr(ops.cpu, "supports", lambda x: False)
    x = SimpleNamespace(is_cuda=is_cuda, numel=lambda: 1)
    assert (ops.slower_than_recomputing(x) is not None) == slower
    with ops.plain_pytorch():  # asked for, to compare with
        assert ops.slower_than_recomputing(x) is None
