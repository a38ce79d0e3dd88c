"""Norm and rectifier as a pass of its own, before a convolution with a window; and the way back, of a mean."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (the compiler of the kernels knows the types of their arguments)

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.ops.protocol import Affine
from efficient_densenet.ops.triton import launch, tiles
from efficient_densenet.ops.triton.moments import moments_of
from efficient_densenet.ops.triton.norms import norm_gradients
from efficient_densenet.ops.triton.rows import rectified


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def rectify_kernel(
    x, x_stride, scale, shift, out, rows, channels,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``out = relu(scale·x + shift)``. Shapes: x and out ``(rows, channels)``. Bytes: x once, out once."""
    x_stride, channels = x_stride * VEC, channels * VEC
    column_blocks = tl.cdiv(channels, COLUMNS)
    row = (tl.program_id(0) // column_blocks) * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    known = channel < channels
    mask, at = (row < rows)[:, None] & known[None, :], row.to(tl.int64)[:, None]
    a = tl.load(scale + channel, mask=known, other=0.0)[None, :]
    b = tl.load(shift + channel, mask=known, other=0.0)[None, :]
    value = tl.load(x + at * x_stride + channel[None, :], mask=mask, other=0.0)
    tl.store(out + at * channels + channel[None, :], rectified(value, a, b, x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def rectify_backward_kernel(
    grad_out, x, x_stride, scale, shift, mean, grad_x, grad_x_stride, sums, rows, blocks, rows_per_image, channels,
    ACCUMULATE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``g = grad_out / rows_per_image`` where the rectifier passed, ``grad_x += scale·g`` (or ``=``); and the sums.

    A row of `grad_out` is that of all `rows_per_image` rows of an image: of a mean over them; or, with 1, of one row.

    Shapes: grad_out ``(rows / rows_per_image, channels)``, x and grad_x ``(rows, channels)``, sums
    ``(2, channels, blocks)``. Bytes: x and grad_out once, grad_x once or (`ACCUMULATE`) twice.
    """
    x_stride, grad_x_stride, channels = x_stride * VEC, grad_x_stride * VEC, channels * VEC
    column_blocks = tl.cdiv(channels, COLUMNS)
    block = tl.program_id(0) // column_blocks
    row = block * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    known = channel < channels
    mask = (row < rows)[:, None] & known[None, :]
    a = tl.load(scale + channel, mask=known, other=0.0)[None, :]
    b = tl.load(shift + channel, mask=known, other=0.0)[None, :]
    mu = tl.load(mean + channel, mask=known, other=0.0)[None, :]
    image, at = (row // rows_per_image).to(tl.int64)[:, None], row.to(tl.int64)[:, None]
    dy = tl.load(grad_out + image * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + at * x_stride + channel[None, :], mask=mask, other=0.0)
    passed = mask & (rectified(value, a, b, x.dtype.element_ty).to(tl.float32) > 0)
    g = tl.where(passed, dy / rows_per_image, 0.0)
    target = grad_x + at * grad_x_stride + channel[None, :]
    new = tl.load(target, mask=mask, other=0.0).to(tl.float32) + a * g if ACCUMULATE else a * g
    tl.store(target, new.to(grad_x.dtype.element_ty), mask=mask)
    tl.store(sums + channel.to(tl.int64) * blocks + block, tl.sum(g, 0), mask=known)
    g_centred = tl.sum(g * (value.to(tl.float32) - mu), 0)
    tl.store(sums + (channels + channel).to(tl.int64) * blocks + block, g_centred, mask=known)


def rectify(x: Tensor, norm: Affine) -> Tensor:
    """One kernel: ``relu(scale·x + shift)`` in the type of `x`, contiguous."""
    out = x.new_empty(x.shape)
    (x, x_stride), channels = launch.matrix(x), x.shape[-1]
    rows, tile, vec = x.numel() // channels, tiles.elementwise(channels), launch.common_divisor(x, x_stride, channels)
    launch.run(
        rectify_kernel, launch.ceil_div(rows, tile.rows) * launch.ceil_div(channels, tile.columns), tile,
        x, x_stride // vec, norm.scale, norm.shift, out, rows, channels // vec, vec,
    )  # fmt: skip
    return out


def rectify_backward(
    grad_out: Tensor,
    x: Tensor,
    norm: Affine,
    grad_x: Tensor,
    accumulate: bool,
    through: Tensor | None,
    into: Sequence[Tensor],
) -> None:
    """Two kernels: the prefix and its sums, the gradients of the norm.

    Args:
        grad_out: that of each row, or of the mean of each image's rows.
        into: what the gradients of the norm's weight and bias overwrite.
    """
    (x, x_stride), (grad_x, grad_x_stride), channels = launch.matrix(x), launch.matrix(grad_x), x.shape[-1]
    rows, tile = x.numel() // channels, tiles.elementwise(channels)
    sums = moments_of(x, launch.ceil_div(rows, tile.rows))
    vec = launch.common_divisor(x, x_stride, grad_x_stride, channels)
    launch.run(
        rectify_backward_kernel, sums.shape[2] * launch.ceil_div(channels, tile.columns), tile,
        grad_out.contiguous(), x, x_stride // vec, norm.scale, norm.shift, norm.mean, grad_x, grad_x_stride // vec,
        sums, rows, sums.shape[2], x.numel() // grad_out.numel(), channels // vec, accumulate, vec,
    )  # fmt: skip
    norm_gradients(sums, norm, through, into)
