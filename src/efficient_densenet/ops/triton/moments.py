"""Means and variances per channel, merged of those of blocks of rows without atomics; and finishing."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (the compiler of the kernels knows the types of their arguments)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.ops.protocol import Statistics
from efficient_densenet.ops.triton import launch, tiles


@triton.jit
def block_moments(y, row_mask, count):
    """Mean and centred sum of squares of each column of a tile, of the rows in the mask, `count` in number.

    The mean is computed twice: what the first one missed is the mean of the deviations from it.
    """
    y = tl.where(row_mask[:, None], y, 0.0)
    mean = tl.sum(y, 0) / count
    deviation = tl.where(row_mask[:, None], y - mean[None, :], 0.0)
    missed = tl.sum(deviation, 0) / count
    return mean + missed, tl.sum(deviation * deviation, 0) - count * missed * missed


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def moments_kernel(
    x, x_stride, moments, rows, blocks, channels,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean and centred sum of squares of each channel in each block of `ROWS` rows.

    Shapes: x ``(rows, channels)``, moments ``(2, channels, blocks)``. Bytes: x once.
    """
    x_stride, channels = x_stride * VEC, channels * VEC
    column_blocks = tl.cdiv(channels, COLUMNS)
    block = tl.program_id(0) // column_blocks
    row = block * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, channel_mask = row < rows, channel < channels
    values = tl.load(
        x + row.to(tl.int64)[:, None] * x_stride + channel[None, :],
        mask=row_mask[:, None] & channel_mask[None, :],
        other=0.0,
    ).to(tl.float32)
    mean, squares = block_moments(values, row_mask, tl.minimum(rows - block * ROWS, ROWS))
    tl.store(moments + channel.to(tl.int64) * blocks + block, mean, mask=channel_mask)
    tl.store(moments + (channels + channel).to(tl.int64) * blocks + block, squares, mask=channel_mask)


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def merge_kernel(moments, mean_out, variance_out, rows, rows_per_block, blocks, channels, COLUMNS: tl.constexpr):
    """The moments of all blocks together (Chan, Golub, LeVeque, 1979), a channel per program.

    ``μ = μ₀ + Σ n_b·(μ_b − μ₀)/n`` with the first block's mean μ₀, ``σ² = Σ (m_b + n_b·(μ_b − μ)²)/n``.

    Shapes: moments ``(2, channels, blocks)``, mean and biased variance ``(channels,)``. Bytes: moments once, and the
    means once more, in cache.
    """
    channel = tl.program_id(0)
    means = moments + channel.to(tl.int64) * blocks
    squares = moments + (channels + channel).to(tl.int64) * blocks
    origin = tl.load(means)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, blocks, COLUMNS):
        block = start + tl.arange(0, COLUMNS)
        count = tl.minimum(rows - block * rows_per_block, rows_per_block).to(tl.float32)
        difference = tl.load(means + block, mask=block < blocks, other=0.0) - origin
        total += tl.where(block < blocks, count * difference, 0.0)
    mean = origin + tl.sum(total, 0) / rows
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, blocks, COLUMNS):
        block = start + tl.arange(0, COLUMNS)
        count = tl.minimum(rows - block * rows_per_block, rows_per_block).to(tl.float32)
        difference = tl.load(means + block, mask=block < blocks, other=0.0) - mean
        square = tl.load(squares + block, mask=block < blocks, other=0.0)
        total += tl.where(block < blocks, square + count * difference * difference, 0.0)
    tl.store(mean_out + channel, mean)
    tl.store(variance_out + channel, tl.sum(total, 0) / rows)


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def finish_kernel(
    grad, grad_stride, x, x_stride, mean, through, through_stride, count, out, out_stride, rows, channels,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``out = grad − through[0]/count − through[1]/count·(x − mean)``. Bytes: grad, x and out once."""
    grad_stride, x_stride, out_stride, channels = grad_stride * VEC, x_stride * VEC, out_stride * VEC, channels * VEC
    column_blocks = tl.cdiv(channels, COLUMNS)
    row = (tl.program_id(0) // column_blocks) * ROWS + tl.arange(0, ROWS)
    channel = ((tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    known, row_mask, at = channel < channels, (row < rows)[:, None], row.to(tl.int64)[:, None]
    g = tl.load(grad + at * grad_stride + channel, mask=row_mask & known, other=0.0).to(tl.float32)
    centred = tl.load(x + at * x_stride + channel, mask=row_mask & known, other=0.0).to(tl.float32)
    centred -= tl.load(mean + channel, mask=known, other=0.0)
    number = tl.load(count)
    constant = tl.load(through + channel, mask=known, other=0.0) / number
    slope = tl.load(through + through_stride + channel, mask=known, other=0.0) / number
    value = g - constant - slope * centred
    tl.store(out + at * out_stride + channel, value.to(out.dtype.element_ty), mask=row_mask & known)


def moments_of(x: Tensor, blocks: int) -> Tensor:
    """An empty tensor for two numbers per channel of `x` and block of its rows."""
    return torch.empty((2, x.shape[-1], blocks), dtype=torch.float32, device=x.device)


def merge(moments: Tensor, rows: int, rows_per_block: int, into: Statistics) -> None:
    """Mean and biased variance, of the moments of blocks."""
    _, channels, blocks = moments.shape
    launch.run(merge_kernel, channels, tiles.ALONG, moments, *into, rows, rows_per_block, blocks, channels)


def statistics(x: Tensor, into: Statistics) -> None:
    """Two kernels: moments of blocks, and their merging."""
    x, stride = launch.matrix(x)
    channels = x.shape[-1]
    # An odd number of channels is loaded value by value, which takes more registers.
    rows, tile = x.numel() // channels, tiles.elementwise(channels, 2048 if channels % 2 else 4096)
    moments = moments_of(x, launch.ceil_div(rows, tile.rows))
    vec = launch.common_divisor(x, stride, channels)
    launch.run(
        moments_kernel, moments.shape[2] * launch.ceil_div(channels, tile.columns), tile,
        x, stride // vec, moments, rows, moments.shape[2], channels // vec, vec,
    )  # fmt: skip
    merge(moments, rows, tile.rows, into)


def finish(grad: Tensor, x: Tensor, mean: Tensor, through: Tensor, count: Tensor, out: Tensor) -> None:
    """One kernel."""
    in_place = out is grad
    (grad, grad_stride), (x, x_stride), (out, out_stride) = launch.matrix(grad), launch.matrix(x), launch.matrix(out)
    assert not in_place or grad.data_ptr() == out.data_ptr()
    channels = x.shape[-1]
    rows, tile = x.numel() // channels, tiles.elementwise(channels)
    vec = launch.common_divisor(x, grad_stride, x_stride, out_stride, channels)
    launch.run(
        finish_kernel, launch.ceil_div(rows, tile.rows) * launch.ceil_div(channels, tile.columns), tile,
        grad, grad_stride // vec, x, x_stride // vec, mean, through, through.stride(0), count, out, out_stride // vec,
        rows, channels // vec, vec,
    )  # fmt: skip
