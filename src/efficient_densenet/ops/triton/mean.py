"""The head's norm, relu and global average."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (the compiler of the kernels knows the types of their arguments)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.ops.protocol import Affine
from efficient_densenet.ops.triton import launch, tiles
from efficient_densenet.ops.triton.moments import moments_of
from efficient_densenet.ops.triton.norms import norm_gradients
from efficient_densenet.ops.triton.rows import rectified


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def mean_kernel(
    x, x_stride, scale, shift, out, rows_per_image, channels,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``out[n, c] = Σ_r relu(scale·x + shift)[n, r, c] / rows_per_image``, an image's `COLUMNS` channels per program.

    Shapes: x ``(images·rows_per_image, channels)``, out ``(images, channels)``. Bytes: x once, out once.
    """
    x_stride, channels = x_stride * VEC, channels * VEC
    column_blocks = tl.cdiv(channels, COLUMNS)
    image = (tl.program_id(0) // column_blocks).to(tl.int64)
    channel = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    known = channel < channels
    a = tl.load(scale + channel, mask=known, other=0.0)[None, :]
    b = tl.load(shift + channel, mask=known, other=0.0)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rows_per_image, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows_per_image)[:, None] & known[None, :]
        at = x + (image * rows_per_image + row)[:, None] * x_stride + channel[None, :]
        s = rectified(tl.load(at, mask=mask, other=0.0), a, b, x.dtype.element_ty).to(tl.float32)
        total += tl.where(mask, s, 0.0)
    mean = tl.sum(total, 0) / rows_per_image
    tl.store(out + image * channels + channel, mean.to(out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def mean_backward_kernel(
    grad_out, x, x_stride, scale, shift, mean, grad_x, grad_x_stride, sums, rows, blocks, rows_per_image, channels,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``g = grad_out[image] / rows_per_image`` where the rectifier passed, ``grad_x = scale·g``; sums as elsewhere.

    Shapes: grad_out ``(images, channels)``, x and grad_x ``(rows, channels)``, sums ``(2, channels, blocks)``.
    Bytes: x and grad_x once, grad_out from the cache.
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
    tl.store(grad_x + at * grad_x_stride + channel[None, :], (a * g).to(grad_x.dtype.element_ty), mask=mask)
    tl.store(sums + channel.to(tl.int64) * blocks + block, tl.sum(g, 0), mask=known)
    g_centred = tl.sum(g * (value.to(tl.float32) - mu), 0)
    tl.store(sums + (channels + channel).to(tl.int64) * blocks + block, g_centred, mask=known)


def norm_relu_mean(x: Tensor, norm: Affine, out: Tensor) -> None:
    """One kernel."""
    (x, x_stride), channels = launch.matrix(x), x.shape[-1]
    tile, vec = tiles.elementwise(channels, 2048), launch.common_divisor(x, x_stride, channels)
    launch.run(
        mean_kernel, len(x) * launch.ceil_div(channels, tile.columns), tile,
        x, x_stride // vec, norm.scale, norm.shift, out, x[0].numel() // channels, channels // vec, vec,
    )  # fmt: skip


def norm_relu_mean_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Two kernels: the prefix and its sums, the gradients of the norm."""
    (x, x_stride), (grad_x, grad_x_stride), channels = launch.matrix(x), launch.matrix(grad_x), x.shape[-1]
    rows, tile = x.numel() // channels, tiles.elementwise(channels)
    sums = moments_of(x, launch.ceil_div(rows, tile.rows))
    vec = launch.common_divisor(x, x_stride, grad_x_stride, channels)
    launch.run(
        mean_backward_kernel, sums.shape[2] * launch.ceil_div(channels, tile.columns), tile,
        grad_out.contiguous(), x, x_stride // vec, norm.scale, norm.shift, norm.mean, grad_x, grad_x_stride // vec,
        sums, rows, sums.shape[2], rows // len(x), channels // vec, vec,
    )  # fmt: skip
    return norm_gradients(sums, norm, through)
