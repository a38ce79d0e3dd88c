"""The operations of `Backend` in plain PyTorch, a few images at a time: the backend that runs everywhere.

The rectified prefix lives in a scratch tensor that is filled and consumed a few images at a time. On a CPU the scratch
stays in the cache, and the passes over it cost little compared with the convolutions; on other devices it bounds the
memory.

Facts this rests on (measured on two cores of an x86 processor): a column sum of a tall channels-last matrix is slow as
``sum(0)`` or ``var_mean(0)``, by an order of magnitude; the kernels of batch norm do the same sums at the speed of the
memory, so they are used for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_densenet.ops.convolution import convolve, convolve_backward, convolve_pooled
from efficient_densenet.ops.layout import channels_first, channels_last, pieces
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics, statistics_dtype

_aten = torch.ops.aten
_AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
# As `_cube`, for one dimension as the second of two.
_LINE = ([1, 3], [1, 2], [0, 1], [1, 1], False)
# Values: two such rows of sums fit into the first-level cache together with what is added to them.
_WIDEST_ROW = 4096
# Rows that a CPU adds up one by one in single precision, before their sums are added up in double precision; other
# devices add them up in a tree, which loses little, and want few and large operations.
_ROWS_PER_SUM = 64


def fold_norm(statistics: Statistics, weight: Tensor, bias: Tensor, eps: float, into: Affine) -> None:
    # In double precision, for an error in these is one of a whole channel, which no sum makes smaller.
    dtype = _double(weight)
    mean, variance, weight, bias = (t.to(dtype) for t in (*statistics, weight, bias))
    inverse = torch.rsqrt(variance + eps)
    into.inverse.copy_(inverse)
    into.scale.copy_(weight * inverse)
    into.shift.copy_(bias - mean * into.scale)


def norm_relu_conv(
    x: Tensor, norm: Affine, weight: Tensor, out: Tensor, pool: int = 1, into: Statistics | None = None
) -> None:
    moments = _Moments()
    for images, scratch in pieces(x):
        s = _prologue(x[images], norm, scratch)
        y = (
            convolve_pooled(channels_last(_average_pool(s, pool)), weight)
            if pool > 1
            else convolve(channels_last(s), weight)
        )
        out[images].copy_(y)
        if into:
            moments.add(y)
    if into:
        moments.merge(into)


def norm_relu_conv_backward(operands: BackwardOperands) -> tuple[Tensor | None, Tensor, Tensor]:
    grad_out, x, norm, weight, grad_x, accumulate, through, pool, need_weight = operands
    grad_weight = torch.zeros_like(weight, dtype=norm.scale.dtype) if need_weight else None
    sums = _Sums(norm)
    for images, scratch in pieces(x):
        piece = x[images]
        s = _prologue(piece, norm, scratch)
        pooled = _average_pool(s, pool) if pool > 1 else s
        g, gw = convolve_backward(grad_out[images], channels_last(pooled), weight, need_weight)
        g = channels_first(g)
        if pool > 1:
            g = _average_pool_backward(g, s, pool)
        if grad_weight is not None:
            grad_weight += gw
        sums.add(_rectify_backward(g, s), piece, grad_x[images], accumulate, scratch)
    return None if grad_weight is None else grad_weight.to(weight.dtype), *norm_gradients(norm, sums.total, through)


def norm_relu_max_pool(x: Tensor, norm: Affine, out: Tensor) -> None:
    for images, scratch in pieces(x):
        pooled, _ = _max_pool(_prologue(x[images], norm, scratch))
        out[images].copy_(channels_last(pooled))


def norm_relu_max_pool_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    sums = _Sums(norm)
    for images, scratch in pieces(x):
        s = _prologue(x[images], norm, scratch)
        _, indices = _max_pool(s)
        g = _max_pool_backward(channels_first(grad_out[images]), s, indices)
        sums.add(_rectify_backward(g, s), x[images], grad_x[images], False, scratch)
    return norm_gradients(norm, sums.total, through)


def norm_relu_mean(x: Tensor, norm: Affine, out: Tensor) -> None:
    for images, scratch in pieces(x):
        s = channels_last(_prologue(x[images], norm, scratch)).flatten(1, -2)
        out[images].copy_(s.mean(1, dtype=statistics_dtype(x.dtype)))


def norm_relu_mean_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    # All pixels of an image get the same gradient, so that its sum in single precision would round in the same
    # direction again and again: pixels are counted instead, and multiplied by the gradient in double precision.
    total = norm.mean.new_zeros((2, len(norm.mean)), dtype=_double(norm.mean))
    share = grad_out.to(norm.scale.dtype) / prod(x.shape[1:-1])
    for images, scratch in pieces(x):
        passes = (channels_last(_prologue(x[images], norm, scratch)) <= 0).logical_not_()
        moved = (norm.scale * share[images]).view(len(passes), *[1] * (x.dim() - 2), -1)
        grad_x[images].copy_(torch.where(passes, moved, 0))
        centred = torch.where(passes, x[images] - norm.mean, 0).flatten(1, -2)
        sums = torch.stack([passes.flatten(1, -2).sum(1), centred.sum(1, dtype=total.dtype)])
        total += torch.where(sums[0] > 0, sums * share[images], 0).sum(1)
    return norm_gradients(norm, total, through)


def statistics(x: Tensor, into: Statistics) -> None:
    moments = _Moments()
    for images, scratch in pieces(x):
        moments.add(scratch.copy_(x[images]))
    moments.merge(into)


def finish(grad: Tensor, x: Tensor, mean: Tensor, through: Tensor, count: Tensor, out: Tensor) -> None:
    constant, slope = through / count
    for images, _ in pieces(x):
        centred = x[images] - mean
        out[images].copy_(torch.addcmul(grad[images], centred, slope, value=-1).sub_(constant))


def norm_gradients(norm: Affine, sums: Tensor, through: Tensor | None) -> tuple[Tensor, Tensor]:
    """From ``Σ g`` and ``Σ g·(x − mean)``, ``(2, C)``: add to `through`; the gradients of weight and bias."""
    g, g_centred = sums.to(norm.scale.dtype)
    if through is not None:
        through[0].addcmul_(norm.scale, g)
        through[1].addcmul_(norm.scale * norm.inverse.square(), g_centred)
    return norm.inverse * g_centred, g


class _Moments:
    """Mean and variance of each piece, merged as Chan et al. do it, so that nothing cancels."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []

    def add(self, piece: Tensor) -> None:
        """Add a contiguous ``(n, *spatial, C)``."""
        channels = piece.shape[-1]
        piece = piece.to(statistics_dtype(piece.dtype))
        # Less the value of some pixel, a channel's values are no larger than its deviations: the mean is not rounded.
        some = piece.flatten(0, -2)[0].clone()
        for rows in _runs(_wide_rows(piece - some)):
            if piece.device.type in ("cpu", "cuda"):
                mean, variance = torch.batch_norm_update_stats(rows, None, None, 0.0)
            else:
                variance, mean = torch.var_mean(rows, 0, correction=0)
            self.counts += [len(rows)] * (rows.shape[1] // channels)
            self.means.append(mean.view(-1, channels).to(_double(piece)) + some)
            self.variances.append(variance.view(-1, channels).to(_double(piece)))

    def merge(self, into: Statistics) -> None:
        if not self.means:  # without images
            into.mean.zero_()
            into.variance.zero_()
            return
        means = torch.cat(self.means)
        counts = torch.tensor(self.counts, dtype=means.dtype, device=means.device)
        found = Statistics.merged(means, torch.cat(self.variances), counts)
        into.mean.copy_(found.mean)
        into.variance.copy_(found.variance)


class _Sums:
    """``Σ g`` and ``Σ g·(x − mean)`` per channel, gathered piece by piece while ``grad_x += scale·g``."""

    def __init__(self, norm: Affine) -> None:
        self.norm = norm
        self.total = norm.mean.new_zeros((2, len(norm.mean)), dtype=_double(norm.mean))

    def add(self, g: Tensor, x: Tensor, grad_x: Tensor, accumulate: bool, scratch: Tensor) -> None:
        """Add ``g: (n, C, *spatial)``; `scratch` is overwritten."""
        scale, channels = self.norm.scale, x.shape[-1]
        g = channels_last(g).contiguous()
        g_rows, x_rows = _wide_rows(g), _wide_rows(x if x.is_contiguous() else scratch.copy_(x))
        mean = self.norm.mean.repeat(g_rows.shape[1] // channels)
        one = torch.ones_like(mean)
        for g_some, x_some in zip(_runs(g_rows), _runs(x_rows), strict=True):
            # The parameter gradients of a batch norm in evaluation, with variance 1 and eps 0, are just these sums.
            _, g_centred, g_sum = _aten.native_batch_norm_backward(
                g_some, x_some, None, mean, one, None, None, False, 0.0, [False, True, True]
            )
            self.total += torch.stack([g_sum, g_centred]).view(2, -1, channels).sum(1, dtype=self.total.dtype)
        if accumulate:
            grad_x.addcmul_(g, scale)
        else:
            torch.mul(g, scale, out=grad_x)


def _wide_rows(x: Tensor) -> Tensor:
    """A contiguous ``(n, *spatial, C)`` as a matrix whose rows hold r pixels, r·C values.

    The column sums of the batch-norm kernels add up rows one by one, in single precision, and lose most of their
    speed in a remainder of a row that does not fill a vector. Wide rows make r sums of fewer terms, which are then
    added up in double precision, and whole vectors; see also `_runs`.
    """
    channels = x.shape[-1]
    pixels = x.numel() // channels
    r = 1
    while pixels % (2 * r) == 0 and 2 * r * channels <= _WIDEST_ROW:
        r *= 2
    return x.view(-1, channels * r)


def _runs(rows: Tensor) -> Sequence[Tensor]:
    """The rows, in runs that are summed up in single precision."""
    return rows.split(_ROWS_PER_SUM) if rows.device.type == "cpu" else (rows,)


def _double(x: Tensor) -> torch.dtype:
    """The type in which partial sums are added up: double precision, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _prologue(x: Tensor, norm: Affine, scratch: Tensor) -> Tensor:
    """``relu(scale·x + shift)`` in the scratch tensor, channels first."""
    scale, shift = norm.scale, norm.shift
    if x.dtype == scale.dtype:
        torch.addcmul(shift, x, scale, out=scratch)
    else:  # half precision is computed in single precision
        scratch.copy_(torch.addcmul(shift, x.to(scale.dtype), scale))
    return channels_first(scratch.relu_())


def _rectify_backward(g: Tensor, s: Tensor) -> Tensor:
    """Zero where the rectifier cut off, in place."""
    return _aten.threshold_backward.grad_input(g, s, 0, grad_input=g)


def _average_pool(s: Tensor, pool: int) -> Tensor:
    if s.dim() == 5 and s.device.type == "cpu":  # where it does not exist in half precision
        return F.avg_pool3d(s.to(statistics_dtype(s.dtype)), pool).to(s.dtype)
    return _AVERAGE_POOL[s.dim() - 2](s, pool)


def _average_pool_backward(grad: Tensor, s: Tensor, pool: int) -> Tensor:
    """Each pixel's gradient, shared out evenly over its window; pixels beyond the last whole window get none."""
    grad = channels_last(grad) / pool ** (s.dim() - 2)
    for d in range(grad.dim() - 2, 0, -1):
        grad = grad.unsqueeze(d + 1).expand(*[-1] * (d + 1), pool, *[-1] * (grad.dim() - d - 1)).flatten(d, d + 1)
    if grad.shape == channels_last(s).shape:
        # A copy, where the pool left a single line: what is made of it by `expand` is still one place in memory.
        return channels_first(grad.contiguous())
    return channels_first(F.pad(grad, [0, 0, *(r for n in reversed(s.shape[2:]) for r in (0, n % pool))]))


def _max_pool(s: Tensor) -> tuple[Tensor, Tensor]:
    """Window 3, stride 2, padding 1; and the argmax of each window."""
    if s.dim() == 3:
        pooled, indices = _aten.max_pool2d_with_indices(s.unsqueeze(2), *_LINE)
        return pooled.squeeze(2), indices.squeeze(2)
    pool = _aten.max_pool2d_with_indices if s.dim() == 4 else _aten.max_pool3d_with_indices
    return pool(s, *_cube(s))


def _max_pool_backward(grad: Tensor, s: Tensor, indices: Tensor) -> Tensor:
    if s.dim() == 3:
        grad, s, indices = (t.unsqueeze(2) for t in (grad, s, indices))
        return _aten.max_pool2d_with_indices_backward(grad, s, *_LINE, indices).squeeze(2)
    pool = _aten.max_pool2d_with_indices_backward if s.dim() == 4 else _aten.max_pool3d_with_indices_backward
    return pool(grad, s, *_cube(s), indices)


def _cube(s: Tensor) -> tuple:
    """The max pool's window, stride, padding, dilation and rounding up."""
    return *([size] * (s.dim() - 2) for size in (3, 2, 1, 1)), False
