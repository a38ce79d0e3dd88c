"""The stem's norm, relu and max pool. Backward gathers, by the argmax of each window: no atomics, no order."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (the compiler of the kernels knows the types of their arguments)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.ops.protocol import Affine
from efficient_densenet.ops.triton import launch, tiles
from efficient_densenet.ops.triton.moments import moments_of
from efficient_densenet.ops.triton.norms import norm_gradients
from efficient_densenet.ops.triton.rows import coordinates, inside, rectified, window


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def max_pool_kernel(
    x, x_stride, scale, shift, out, out_stride, argmax, rows, depth, height, width, channels,
    TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, WHERE: tl.constexpr,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``out = max_pool(relu(scale·x + shift))``, window 3, stride 2, padding 1; or (`WHERE`) which tap it was.

    Shapes: x ``(images·pixels, channels)``, out ``(rows, channels)``, argmax the same in bytes; of equal values the
    first tap counts, as in PyTorch. Bytes: x once (the taps overlap, in cache), out or argmax once.
    """
    x_stride, out_stride, channels = x_stride * VEC, out_stride * VEC, channels * VEC
    column_blocks = tl.cdiv(channels, COLUMNS)
    row = (tl.program_id(0) // column_blocks) * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, channel_mask = row < rows, channel < channels
    mask = row_mask[:, None] & channel_mask[None, :]
    a = tl.load(scale + channel, mask=channel_mask, other=0.0)[None, :]
    b = tl.load(shift + channel, mask=channel_mask, other=0.0)[None, :]
    # A missing direction has size 1, and (1 + 1) // 2 is 1: it needs no care.
    image, d, h, w = coordinates(row, (depth + 1) // 2, (height + 1) // 2, (width + 1) // 2)
    best = tl.full((ROWS, COLUMNS), -1.0, dtype=tl.float32)
    best_tap = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    for tap in range(TD * TH * TW):
        dd, dh, dw = window(tap, TD, TH, TW)
        valid = row_mask & inside(2 * d + dd, 2 * h + dh, 2 * w + dw, depth, height, width, TD, TH, TW)
        at = ((image * depth + 2 * d + dd) * height + 2 * h + dh) * width + 2 * w + dw
        value = tl.load(
            x + at.to(tl.int64)[:, None] * x_stride + channel[None, :],
            mask=valid[:, None] & channel_mask[None, :],
            other=0.0,
        )
        s = rectified(value, a, b, x.dtype.element_ty).to(tl.float32)
        better = valid[:, None] & ((s > best) | (s != s))
        best = tl.where(better, s, best)
        best_tap = tl.where(better, tap, best_tap)
    if WHERE:
        tl.store(argmax + row.to(tl.int64)[:, None] * channels + channel[None, :], best_tap.to(tl.uint8), mask=mask)
    else:
        target = out + row.to(tl.int64)[:, None] * out_stride + channel[None, :]
        tl.store(target, best.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def max_pool_backward_kernel(
    grad_out, grad_out_stride, argmax, x, x_stride, scale, shift, mean, grad_x, grad_x_stride, sums,
    rows, blocks, depth, height, width, channels,
    TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``g`` = the gradients of the windows whose maximum this pixel is, where it is above zero; ``grad_x = scale·g``.

    Each pixel looks at the windows that it lies in: those taps whose distance to it is even. `sums` gets ``Σ g`` and
    ``Σ g·(x − mean)`` of each block of `ROWS` rows.

    Shapes: x and grad_x ``(rows, channels)``, grad_out and argmax a row per window, sums ``(2, channels, blocks)``.
    Bytes: x and grad_x once, grad_out and argmax once (the windows overlap, in cache).
    """
    grad_out_stride, x_stride, grad_x_stride = grad_out_stride * VEC, x_stride * VEC, grad_x_stride * VEC
    channels = channels * VEC
    column_blocks = tl.cdiv(channels, COLUMNS)
    block = tl.program_id(0) // column_blocks
    row = block * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, channel_mask = row < rows, channel < channels
    mask = row_mask[:, None] & channel_mask[None, :]
    image, d, h, w = coordinates(row, depth, height, width)
    g = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tap in range(TD * TH * TW):
        # This pixel is 2·window + tap, so that the window is (pixel − tap) / 2, if that is whole and exists.
        dd, dh, dw = window(tap, TD, TH, TW)
        pd, ph, pw = (depth + 1) // 2, (height + 1) // 2, (width + 1) // 2
        even = ((w - dw) % 2 == 0) & (w >= dw) & ((w - dw) // 2 < pw)
        if TH > 1:
            even &= ((h - dh) % 2 == 0) & (h >= dh) & ((h - dh) // 2 < ph)
        if TD > 1:
            even &= ((d - dd) % 2 == 0) & (d >= dd) & ((d - dd) // 2 < pd)
        at = (((image * pd + (d - dd) // 2) * ph + (h - dh) // 2) * pw + (w - dw) // 2).to(tl.int64)[:, None]
        valid = (row_mask & even)[:, None] & channel_mask[None, :]
        taps = tl.load(argmax + at * channels + channel[None, :], mask=valid, other=255)
        # Loaded whole, for a mask value by value would make narrow loads.
        dy = tl.load(grad_out + at * grad_out_stride + channel[None, :], mask=valid, other=0.0).to(tl.float32)
        g += tl.where(taps.to(tl.int32) == tap, dy, 0.0)
    a = tl.load(scale + channel, mask=channel_mask, other=0.0)[None, :]
    b = tl.load(shift + channel, mask=channel_mask, other=0.0)[None, :]
    mu = tl.load(mean + channel, mask=channel_mask, other=0.0)[None, :]
    at = row.to(tl.int64)[:, None]
    value = tl.load(x + at * x_stride + channel[None, :], mask=mask, other=0.0)
    g = tl.where(mask & (rectified(value, a, b, x.dtype.element_ty).to(tl.float32) > 0), g, 0.0)
    tl.store(grad_x + at * grad_x_stride + channel[None, :], (a * g).to(grad_x.dtype.element_ty), mask=mask)
    tl.store(sums + channel.to(tl.int64) * blocks + block, tl.sum(g, 0), mask=channel_mask)
    g_centred = tl.sum(g * (value.to(tl.float32) - mu), 0)
    tl.store(sums + (channels + channel).to(tl.int64) * blocks + block, g_centred, mask=channel_mask)


def norm_relu_max_pool(x: Tensor, norm: Affine, out: Tensor) -> None:
    """One kernel."""
    _pool(x, norm, out, None)


def norm_relu_max_pool_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None, into: Sequence[Tensor]
) -> None:
    """Three kernels: where the maxima are (a byte per window), the gathering, the gradients of the norm."""
    argmax = torch.empty(grad_out.shape, dtype=torch.uint8, device=x.device)
    _pool(x, norm, None, argmax)
    (grad_out, grad_out_stride), (x, x_stride) = launch.matrix(grad_out.to(x.dtype)), launch.matrix(x)
    grad_x, grad_x_stride = launch.matrix(grad_x)
    channels = x.shape[-1]
    rows, tile = x.numel() // channels, tiles.elementwise(channels, 2048)
    sums = moments_of(x, launch.ceil_div(rows, tile.rows))
    vec = launch.common_divisor(x, x_stride, grad_x_stride, grad_out_stride, channels)
    launch.run(
        max_pool_backward_kernel, sums.shape[2] * launch.ceil_div(channels, tile.columns), tile,
        grad_out, grad_out_stride // vec, argmax, x, x_stride // vec, norm.scale, norm.shift, norm.mean,
        grad_x, grad_x_stride // vec, sums,
        rows, sums.shape[2], *launch.cube(x.shape[1:-1]), channels // vec, *_taps(x), vec,
    )  # fmt: skip
    norm_gradients(sums, norm, through, into)


def _pool(x: Tensor, norm: Affine, out: Tensor | None, argmax: Tensor | None) -> None:
    (x, x_stride), channels = launch.matrix(x), x.shape[-1]
    target, target_stride = (x, channels) if out is None else launch.matrix(out)
    result = out if argmax is None else argmax
    assert result is not None
    rows, tile = result.numel() // channels, tiles.elementwise(channels, 2048)
    vec = launch.common_divisor(x, x_stride, target_stride, channels)
    launch.run(
        max_pool_kernel, launch.ceil_div(rows, tile.rows) * launch.ceil_div(channels, tile.columns), tile,
        x, x_stride // vec, norm.scale, norm.shift, target, target_stride // vec, result,
        rows, *launch.cube(x.shape[1:-1]), channels // vec, *_taps(x), argmax is not None, vec,
    )  # fmt: skip


def _taps(x: Tensor) -> tuple[int, ...]:
    return launch.cube([3] * (x.dim() - 2))
