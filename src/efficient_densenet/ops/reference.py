"""The operations that a dense block is made of, as they are defined: plain PyTorch, on whole tensors, any device.

This is what tests, other backends and benchmarks compare with. The mathematics is derived in docs/algorithm.md.

Layout: activations are channels-last matrices ``(N, *spatial, C)`` with 1, 2 or 3 spatial dimensions. An activation may
be a slice of the channels of a larger tensor (its rows are then further apart than ``C``); weights are PyTorch's
``(out channels, in channels, *kernel)``, stride 1, padded by half the kernel, so that the resolution stays. What there
is one of per channel, statistics and sums, has shape ``(C,)``, in float32 or, for float64 activations, in float64.

The rectified prefix ``s = relu(scale·x + shift)`` is the prologue of every operation, and is never stored: backward
computes it again from `x`.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class Statistics(NamedTuple):
    """Mean and biased variance of each channel, ``(C,)`` each."""

    mean: Tensor
    variance: Tensor


class Affine(NamedTuple):
    """A batch norm of given statistics, ``norm(x) = scale·x + shift``, and what it was made of: ``(C,)`` each."""

    mean: Tensor
    inverse: Tensor  # 1/√(σ² + eps)
    scale: Tensor
    shift: Tensor


def fold_norm(statistics: Statistics, weight: Tensor, bias: Tensor, eps: float, into: Affine) -> None:
    """``inverse = 1/√(σ² + eps)``, ``scale = weight·inverse``, ``shift = bias − μ·scale``.

    Args:
        statistics, weight, bias: ``(C,)`` each, of any floating types.
        into: `inverse`, `scale` and `shift` are overwritten.
    """
    dtype = into.scale.dtype
    mean, variance, weight, bias = (t.to(dtype) for t in (*statistics, weight, bias))
    into.inverse.copy_(torch.rsqrt(variance + eps))
    into.scale.copy_(weight * into.inverse)
    into.shift.copy_(bias - mean * into.scale)


def norm_relu_conv(
    x: Tensor, norm: Affine, weight: Tensor, out: Tensor, pool: int = 1, into: Statistics | None = None
) -> None:
    """``out = conv(average_pool(relu(scale·x + shift)))``.

    A 1×1 convolution and an average pool commute; pooling first spares three quarters of the multiplications.

    Args:
        x: ``(N, *spatial, C)``.
        norm: ``(C,)`` each.
        weight: ``(O, C, *kernel)``.
        out: ``(N, *spatial // pool, O)``, is overwritten.
        pool: window and stride of the average pool; 1: none.
        into: is overwritten by the statistics of `out`, if given.
    """
    out.copy_(_last(_convolve(_prologue(x, norm), weight, pool)))
    if into is not None:
        statistics(out, into)


def norm_relu_conv_backward(
    grad_out: Tensor,
    x: Tensor,
    norm: Affine,
    weight: Tensor,
    grad_x: Tensor,
    accumulate: bool,
    through: Tensor | None,
    pool: int = 1,
    need_weight: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The backward pass of `norm_relu_conv`, short of what flows through the batch statistics: see `finish`.

    With ``g`` the gradient at the rectifier's input (zero where it cut off): ``grad_x += scale·g`` (or ``=``).

    Args:
        through: ``(2, C)``; to it ``scale·Σ g`` and ``scale·inverse²·Σ g·(x − mean)`` are added, if given.

    Returns:
        The gradients of the convolution's weight (None if not needed), and of the norm's weight and bias:
        ``inverse·Σ g·(x − mean)`` and ``Σ g``.
    """
    with torch.enable_grad():
        s = _prologue(x, norm).detach().requires_grad_()
        w = weight.detach().requires_grad_(need_weight)
        out = _convolve(s, w, pool)
        wanted = [s, w] if need_weight else [s]
        grads = torch.autograd.grad(out, wanted, _first(grad_out))
    g = _last(grads[0] * (s > 0))
    return grads[1] if need_weight else None, *_norm_backward(g, x, norm, grad_x, accumulate, through)


def norm_relu_max_pool(x: Tensor, norm: Affine, out: Tensor) -> None:
    """``out = max_pool(relu(scale·x + shift))`` with window 3, stride 2, padding 1: the stem of an ImageNet network.

    Args:
        x: ``(N, *spatial, C)``.
        out: ``(N, *⌈spatial/2⌉, C)``, is overwritten.
    """
    out.copy_(_last(MAX_POOL[x.dim() - 2](_prologue(x, norm), 3, 2, 1)))


def norm_relu_max_pool_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The backward pass of `norm_relu_max_pool`, as `norm_relu_conv_backward` is: ``grad_x = scale·g``."""
    with torch.enable_grad():
        s = _prologue(x, norm).detach().requires_grad_()
        (grad,) = torch.autograd.grad(MAX_POOL[x.dim() - 2](s, 3, 2, 1), s, _first(grad_out))
    return _norm_backward(_last(grad * (s > 0)), x, norm, grad_x, False, through)


def norm_relu_mean(x: Tensor, norm: Affine, out: Tensor) -> None:
    """``out = mean over all pixels of relu(scale·x + shift)``: the head of a network, before its classifier.

    Args:
        x: ``(N, *spatial, C)``.
        out: ``(N, C)``, is overwritten.
    """
    out.copy_(_prologue(x, norm).flatten(2).mean(2))


def norm_relu_mean_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The backward pass of `norm_relu_mean`, as `norm_relu_conv_backward` is: ``grad_x = scale·g``."""
    s = _last(_prologue(x, norm))
    grad = grad_out.view(len(x), *[1] * (x.dim() - 2), x.shape[-1]) / prod(x.shape[1:-1])
    return _norm_backward(grad * (s > 0), x, norm, grad_x, False, through)


def statistics(x: Tensor, into: Statistics) -> None:
    """Mean and biased variance of each channel of ``x: (N, *spatial, C)``, which overwrite `into`."""
    rows = x.reshape(-1, x.shape[-1]).to(statistics_dtype(x.dtype))
    variance, mean = torch.var_mean(rows, 0, correction=0)
    into.mean.copy_(mean)
    into.variance.copy_(variance)


def merge(means: Tensor, variances: Tensor, counts: Tensor) -> Statistics:
    """The statistics of several parts taken together, from those of the parts (Chan, Golub, LeVeque, 1979).

    Squares of differences alone are summed, so nothing cancels.

    Args:
        means, variances: ``(parts, C)``.
        counts: ``(parts,)``, values per channel of each part.
    """
    share = (counts / counts.sum()).unsqueeze(1)
    mean = (share * means).sum(0)
    return Statistics(mean, (share * (variances + (means - mean).square())).sum(0))


def finish(grad: Tensor, x: Tensor, mean: Tensor, through: Tensor, count: Tensor, out: Tensor) -> None:
    """Subtract what flows through the batch statistics of some channels: ``grad − A − B·(x − mean)``.

    ``A = Σ scale·Σg / M`` and ``B = Σ scale·inverse²·Σg·(x − mean) / M``, over all norms that read these channels.

    Args:
        grad, x: ``(N, *spatial, C)``.
        mean: ``(C,)``.
        through: ``(2, C)``, what all readers have added up: ``A·M`` and ``B·M``.
        count: the number of values M that each channel's statistics are of, a tensor of one number.
        out: of the shape of `grad`, is overwritten; it may be `grad` itself.
    """
    constant, slope = through / count
    out.copy_(grad - constant - slope * (x - mean))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics and sums of activations of this type are held."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_gradients(norm: Affine, sums: Tensor, through: Tensor | None) -> tuple[Tensor, Tensor]:
    """From ``Σ g`` and ``Σ g·(x − mean)``, ``(2, C)``: add to `through`; the gradients of weight and bias."""
    g, g_centred = sums.to(norm.scale.dtype)
    if through is not None:
        through[0].addcmul_(norm.scale, g)
        through[1].addcmul_(norm.scale * norm.inverse.square(), g_centred)
    return norm.inverse * g_centred, g


def _prologue(x: Tensor, norm: Affine) -> Tensor:
    return _first(torch.relu(x * norm.scale + norm.shift).to(x.dtype))


def _convolve(s: Tensor, weight: Tensor, pool: int) -> Tensor:
    dims = s.dim() - 2
    if pool > 1:
        s = AVERAGE_POOL[dims](s, pool)
    return _CONVOLUTION[dims](s, weight, padding=[k // 2 for k in weight.shape[2:]])


def _norm_backward(
    g: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, accumulate: bool, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    g = g.to(norm.scale.dtype)
    if not accumulate:
        grad_x.zero_()
    grad_x.copy_(grad_x + norm.scale * g)
    rows = tuple(range(x.dim() - 1))
    return norm_gradients(norm, torch.stack([g.sum(rows), (g * (x - norm.mean)).sum(rows)]), through)


def _first(x: Tensor) -> Tensor:
    """Channels first, as PyTorch's own operations want them: a view."""
    return x.movedim(-1, 1)


def _last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)
