"""The reference operations are what PyTorch's own batch norm, ReLU, convolution and pools compute, by its autograd."""

from __future__ import annotations

import pytest
import torch
from operands import SHAPES, Operands, weight_for
from torch.nn import functional as F

from efficient_densenet.ops import reference

CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
EPS = 1e-5

every_shape = pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] != (1, 1)], ids=str)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def affine(x, gain, bias):
    mean, variance = reference.statistics(x)
    inverse = torch.rsqrt(variance + EPS)
    return mean, inverse, gain * inverse, bias - mean * gain * inverse


@every_shape
@pytest.mark.parametrize(("kernel", "pool"), [(1, 1), (3, 1), (1, 2)])
def test_norm_relu_conv_is_pytorchs(shape, kernel, pool):
    """Forward and, together with `finish`, backward through the batch statistics."""
    x, gain, bias, _ = Operands.random(shape)
    if pool > min(shape[1]):
        pytest.skip("no whole window")
    weight, dims = weight_for(x, 3, kernel), x.dim() - 2
    leaves = [t.detach().clone().requires_grad_() for t in (x, gain, bias, weight)]
    normed = F.batch_norm(leaves[0].movedim(-1, 1), None, None, leaves[1], leaves[2], True, 0.0, EPS)
    expected = CONVOLUTION[dims](F.relu(normed), leaves[3], padding=kernel // 2)
    if pool > 1:  # behind the convolution, where the operation has it before
        expected = reference.AVERAGE_POOL[dims](expected, pool)
    expected = expected.movedim(1, -1)
    grad_out = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, leaves, grad_out)

    mean, inverse, scale, shift = affine(x, gain, bias)
    out = torch.full_like(expected, torch.nan)
    found = reference.norm_relu_conv(x, scale, shift, weight, out, pool, want_statistics=True)
    close(out, expected.detach())
    close(found, (out.flatten(0, -2).mean(0), out.flatten(0, -2).var(0, correction=0)))
    grad_x = torch.full_like(x, torch.nan)
    grad_weight, g, g_centred = reference.norm_relu_conv_backward(
        grad_out, x, scale, shift, mean, weight, grad_x, accumulate=False, pool=pool
    )
    count = x.numel() / x.shape[-1]
    reference.finish(grad_x, x, mean, scale * g / count, scale * inverse.square() * g_centred / count, grad_x)
    close([grad_x, inverse * g_centred, g, grad_weight], [g.detach() for g in grads])


@pytest.mark.parametrize("size", [(5, 7), (8, 6), (1, 9), (1, 1), (9,), (3, 4, 5)], ids=str)
def test_norm_relu_max_pool_is_pytorchs(size):
    x, gain, bias, mean = Operands.random((2, size, 3))
    leaves = [t.detach().clone().requires_grad_() for t in (x, gain, bias)]
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(size)]
    expected = pool(F.relu(leaves[0] * leaves[1] + leaves[2]).movedim(-1, 1), 3, 2, 1).movedim(1, -1)
    grad_out = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, leaves, grad_out)

    out, grad_x = torch.full_like(expected, torch.nan), torch.full_like(x, torch.nan)
    reference.norm_relu_max_pool(x, gain, bias, out)
    close(out, expected.detach())
    g, g_centred = reference.norm_relu_max_pool_backward(grad_out, x, gain, bias, mean, grad_x)
    # With scale and shift as leaves, their gradients are Σ g·x and Σ g.
    close([grad_x, g_centred + mean * g, g], [g.detach() for g in grads])


@pytest.mark.parametrize("parts", [[24], [1, 5, 18], [7, 0, 17]], ids=str)
def test_merged_statistics_are_those_of_the_whole(parts):
    x, *_ = Operands.random((24, (1, 1), 5))
    pieces = list(x.split(parts))
    found = [reference.statistics(p) if len(p) else (torch.zeros(5).double(),) * 2 for p in pieces]
    means, variances = (torch.stack(some) for some in zip(*found, strict=True))
    close(reference.merge(means, variances, torch.tensor(parts).double()), reference.statistics(x))


def test_merging_does_not_cancel():
    """In single precision, where the mean is ten thousand times the standard deviation."""
    torch.manual_seed(0)
    x = torch.randn(64, 1, 1, 3) + 1e4
    means, variances = (torch.stack(s) for s in zip(*map(reference.statistics, x.split(16)), strict=True))
    _, variance = reference.merge(means, variances, torch.full((4,), 16.0))
    torch.testing.assert_close(variance.double(), reference.statistics(x.double())[1], rtol=1e-4, atol=0)
