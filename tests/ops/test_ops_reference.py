"""The reference operations are what PyTorch's own batch norm, ReLU, convolution and pools compute, by its autograd."""

from __future__ import annotations

import pytest
import torch
from operands import SHAPES, Operands, empty_statistics, measured, weight_for
from torch.nn import functional as F

from efficient_densenet.ops import reference
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics

CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
EPS = 1e-5

every_shape = pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] != (1, 1)], ids=str)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def folded(x, norm_weight, bias):
    norm = Affine(*torch.full((4, len(norm_weight)), torch.nan, dtype=x.dtype))
    reference.statistics(x, found := empty_statistics(x))
    reference.fold_norm(found, norm_weight, bias, EPS, norm)
    return norm._replace(mean=found.mean)


def count(x):
    """Values of each channel."""
    return torch.tensor(x.numel() / x.shape[-1], dtype=x.dtype)


@every_shape
@pytest.mark.parametrize(("kernel", "pool"), [(1, 1), (3, 1), (1, 2)])
def test_norm_relu_conv_is_pytorchs(shape, kernel, pool):
    """Forward and, together with `finish`, backward through the batch statistics."""
    x, (_, _, norm_weight, bias) = Operands.random(shape)
    if pool > min(shape[1]):
        pytest.skip("no whole window")
    weight, dims = weight_for(x, 3, kernel), x.dim() - 2
    leaves = [t.detach().clone().requires_grad_() for t in (x, norm_weight, bias, weight)]
    normed = F.batch_norm(leaves[0].movedim(-1, 1), None, None, leaves[1], leaves[2], True, 0.0, EPS)
    expected = CONVOLUTION[dims](F.relu(normed), leaves[3], padding=kernel // 2)
    if pool > 1:  # behind the convolution, where the operation has it before
        expected = AVERAGE_POOL[dims](expected, pool)
    expected = expected.movedim(1, -1)
    grad_out = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, leaves, grad_out)

    norm, out, found = folded(x, norm_weight, bias), torch.full_like(expected, torch.nan), empty_statistics(x, 3)
    reference.norm_relu_conv(x, norm, weight, out, pool, found)
    close(out, expected.detach())
    close(tuple(found), (out.flatten(0, -2).mean(0), out.flatten(0, -2).var(0, correction=0)))
    grad_x, through = torch.full_like(x, torch.nan), x.new_zeros(2, len(norm_weight))
    grad_weight, *of_norm = reference.norm_relu_conv_backward(
        BackwardOperands(grad_out, x, norm, weight, grad_x, accumulate=False, through=through, pool=pool)
    )
    reference.finish(grad_x, x, norm.mean, through, count(x), grad_x)
    close([grad_x, *of_norm, grad_weight], [g.detach() for g in grads])


@every_shape
def test_norm_relu_mean_is_pytorchs(shape):
    x, (_, _, norm_weight, bias) = Operands.random(shape)
    leaves = [t.detach().clone().requires_grad_() for t in (x, norm_weight, bias)]
    normed = F.batch_norm(leaves[0].movedim(-1, 1), None, None, leaves[1], leaves[2], True, 0.0, EPS)
    expected = F.relu(normed).flatten(2).mean(2)
    grad_out = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, leaves, grad_out)

    norm, out = folded(x, norm_weight, bias), torch.full_like(expected, torch.nan)
    reference.norm_relu_mean(x, norm, out)
    close(out, expected.detach())
    grad_x, through = torch.full_like(x, torch.nan), x.new_zeros(2, len(norm_weight))
    of_norm = reference.norm_relu_mean_backward(grad_out, x, norm, grad_x, through)
    reference.finish(grad_x, x, norm.mean, through, count(x), grad_x)
    close([grad_x, *of_norm], [g.detach() for g in grads])


def test_what_flows_through_the_statistics_is_added_up_over_readers():
    """Of two convolutions that read the same channels through norms of their own."""
    x, (_, _, norm_weight, bias) = Operands.random((3, (5, 7), 4))
    weights = [weight_for(x, outputs, 3) for outputs in (2, 5)]
    leaf = x.clone().requires_grad_()
    outs = []
    for weight, sign in zip(weights, (1, -1), strict=True):
        normed = F.batch_norm(leaf.movedim(-1, 1), None, None, sign * norm_weight, bias, True, 0.0, EPS)
        outs.append(F.conv2d(F.relu(normed), weight, padding=1).movedim(1, -1))
    grad_outs = [torch.randn_like(out) for out in outs]
    (expected,) = torch.autograd.grad(outs, leaf, grad_outs)

    grad_x, through = torch.zeros_like(x), x.new_zeros(2, 4)
    for weight, sign, grad_out in zip(weights, (1, -1), grad_outs, strict=True):
        norm = folded(x, sign * norm_weight, bias)
        reference.norm_relu_conv_backward(
            BackwardOperands(grad_out, x, norm, weight, grad_x, True, through, need_weight=False)
        )
    reference.finish(grad_x, x, norm.mean, through, count(x), grad_x)
    close(grad_x, expected)


@pytest.mark.parametrize("size", [(5, 7), (8, 6), (1, 9), (1, 1), (9,), (3, 4, 5)], ids=str)
def test_norm_relu_max_pool_is_pytorchs(size):
    x, norm = Operands.random((2, size, 3))
    leaves = [t.detach().clone().requires_grad_() for t in (x, norm.scale, norm.shift)]
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(size)]
    expected = pool(F.relu(leaves[0] * leaves[1] + leaves[2]).movedim(-1, 1), 3, 2, 1).movedim(1, -1)
    grad_out = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, leaves, grad_out)

    out, grad_x = torch.full_like(expected, torch.nan), torch.full_like(x, torch.nan)
    reference.norm_relu_max_pool(x, norm, out)
    close(out, expected.detach())
    grad_norm_weight, g = reference.norm_relu_max_pool_backward(grad_out, x, norm, grad_x, None)
    # With scale and shift as leaves, their gradients are Σ g·x and Σ g.
    close([grad_x, grad_norm_weight / norm.inverse + norm.mean * g, g], [g.detach() for g in grads])


@pytest.mark.parametrize("parts", [[24], [1, 5, 18], [7, 0, 17]], ids=str)
def test_merged_statistics_are_those_of_the_whole(parts):
    x, *_ = Operands.random((24, (1, 1), 5))
    pieces = list(x.split(parts))
    found = [measured(reference, p) if len(p) else (torch.zeros(5).double(),) * 2 for p in pieces]
    means, variances = (torch.stack(some) for some in zip(*found, strict=True))
    close(Statistics.merged(means, variances, torch.tensor(parts).double()), measured(reference, x))


def test_merging_does_not_cancel():
    """In single precision, where the mean is ten thousand times the standard deviation."""
    torch.manual_seed(0)
    x = torch.randn(64, 1, 1, 3) + 1e4
    means, variances = (torch.stack(s) for s in zip(*(measured(reference, part) for part in x.split(16)), strict=True))
    _, variance = Statistics.merged(means, variances, torch.full((4,), 16.0))
    torch.testing.assert_close(variance.double(), measured(reference, x.double())[1], rtol=1e-4, atol=0)
