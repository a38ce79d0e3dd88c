"""The head's norm, relu and global average."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (the compiler of the kernels knows the types of their arguments)

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.ops.protocol import Affine
from efficient_densenet.ops.triton import launch, tiles
from efficient_densenet.ops.triton.rectifier import rectify_backward
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


def norm_relu_mean(x: Tensor, norm: Affine, out: Tensor) -> None:
    """One kernel."""
    (x, x_stride), channels = launch.matrix(x), x.shape[-1]
    tile, vec = tiles.elementwise(channels, 2048), launch.common_divisor(x, x_stride, channels)
    launch.run(
        mean_kernel, len(x) * launch.ceil_div(channels, tile.columns), tile,
        x, x_stride // vec, norm.scale, norm.shift, out, x[0].numel() // channels, channels // vec, vec,
    )  # fmt: skip


def norm_relu_mean_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None, into: Sequence[Tensor]
) -> None:
    """Two kernels: see there."""
    rectify_backward(grad_out, x, norm, grad_x, False, through, into)
