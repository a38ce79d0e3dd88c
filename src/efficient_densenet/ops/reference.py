"""The operations of `Backend`, as they are defined: plain PyTorch, on whole tensors, any device.

This is what tests, other backends and benchmarks compare with; so no other backend uses anything of it.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics, statistics_dtype

_CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def fold_norm(statistics: Statistics, weight: Tensor, bias: Tensor, eps: float, into: Affine) -> None:
    dtype = into.scale.dtype
    mean, variance, weight, bias = (t.to(dtype) for t in (*statistics, weight, bias))
    into.inverse.copy_(torch.rsqrt(variance + eps))
    into.scale.copy_(weight * into.inverse)
    into.shift.copy_(bias - mean * into.scale)


def norm_relu_conv(
    x: Tensor, norm: Affine, weight: Tensor, out: Tensor, pool: int = 1, into: Statistics | None = None
) -> None:
    out.copy_(_last(_convolve(_prologue(x, norm), weight, pool)))
    if into is not None:
        statistics(out, into)


def norm_relu_conv_backward(operands: BackwardOperands) -> tuple[Tensor | None, Tensor, Tensor]:
    grad_out, x, norm, weight, grad_x, accumulate, through, pool, need_weight = operands
    with torch.enable_grad():
        s = _prologue(x, norm).detach().requires_grad_()
        w = weight.detach().requires_grad_(need_weight)
        out = _convolve(s, w, pool)
        wanted = [s, w] if need_weight else [s]
        grads = torch.autograd.grad(out, wanted, _first(grad_out))
    g = _last(grads[0] * (s > 0))
    return grads[1] if need_weight else None, *_norm_backward(g, x, norm, grad_x, accumulate, through)


def norm_relu_max_pool(x: Tensor, norm: Affine, out: Tensor) -> None:
    out.copy_(_last(_MAX_POOL[x.dim() - 2](_prologue(x, norm), 3, 2, 1)))


def norm_relu_max_pool_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        s = _prologue(x, norm).detach().requires_grad_()
        (grad,) = torch.autograd.grad(_MAX_POOL[x.dim() - 2](s, 3, 2, 1), s, _first(grad_out))
    return _norm_backward(_last(grad * (s > 0)), x, norm, grad_x, False, through)


def norm_relu_mean(x: Tensor, norm: Affine, out: Tensor) -> None:
    out.copy_(_prologue(x, norm).flatten(2).mean(2))


def norm_relu_mean_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    s = _last(_prologue(x, norm))
    grad = grad_out.view(len(x), *[1] * (x.dim() - 2), x.shape[-1]) / prod(x.shape[1:-1])
    return _norm_backward(grad * (s > 0), x, norm, grad_x, False, through)


def statistics(x: Tensor, into: Statistics) -> None:
    rows = x.reshape(-1, x.shape[-1]).to(statistics_dtype(x.dtype))
    variance, mean = torch.var_mean(rows, 0, correction=0)
    into.mean.copy_(mean)
    into.variance.copy_(variance)


def finish(grad: Tensor, x: Tensor, mean: Tensor, through: Tensor, count: Tensor, out: Tensor) -> None:
    constant, slope = through / count
    out.copy_(grad - constant - slope * (x - mean))


def _prologue(x: Tensor, norm: Affine) -> Tensor:
    return _first(torch.relu(x * norm.scale + norm.shift).to(x.dtype))


def _convolve(s: Tensor, weight: Tensor, pool: int) -> Tensor:
    dims = s.dim() - 2
    if pool > 1:
        s = _AVERAGE_POOL[dims](s, pool)
    return _CONVOLUTION[dims](s, weight, padding=[k // 2 for k in weight.shape[2:]])


def _norm_backward(
    g: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, accumulate: bool, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    """From the gradient at the rectifier's input: write `grad_x`, add to `through`; gradients of weight and bias."""
    g = g.to(norm.scale.dtype)
    if not accumulate:
        grad_x.zero_()
    grad_x.copy_(grad_x + norm.scale * g)
    rows = tuple(range(x.dim() - 1))
    g_sum, g_centred = g.sum(rows), (g * (x - norm.mean)).sum(rows)
    if through is not None:
        through += torch.stack([norm.scale * g_sum, norm.scale * norm.inverse.square() * g_centred])
    return norm.inverse * g_centred, g_sum


def _first(x: Tensor) -> Tensor:
    """Channels first, as PyTorch's own operations want them: a view."""
    return x.movedim(-1, 1)


def _last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)
