"""The forward pass: normalise, rectify, pool and convolve in one kernel, which also measures what it writes."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (the compiler of the kernels knows the types of their arguments)

from __future__ import annotations

from math import prod

import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.ops.protocol import Affine, Statistics
from efficient_densenet.ops.triton import launch, tiles, tuning
from efficient_densenet.ops.triton.moments import block_moments, merge, moments_of
from efficient_densenet.ops.triton.rectifier import rectify
from efficient_densenet.ops.triton.rows import coordinates, first_of_pool, inside, next_tap, rectified_rows, window

_MUST_WAIT = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
"""Whether Triton lets a product of a warp group still read its left operand's registers while the next step of the
loop overwrites them (triton-lang/triton#9433 and #11781)."""


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def norm_relu_conv_kernel(
    x, x_stride, scale, shift, weight, out, out_stride, moments,
    rows, blocks, depth, height, width, channels, outputs,
    TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    STATISTICS: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
    ALIGNED: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``out[r, o] = Σ_tap Σ_c pool(relu(scale·x + shift))[r + tap, c] · weight[o, tap, c]``, zero outside the image.

    An implicit matrix product of ``(rows, taps·channels)`` and ``(taps·channels, outputs)``, a tile of ``ROWS ×
    COLUMNS`` per program. `moments` gets mean and centred sum of squares of each block of `ROWS` rows.
    With a window, x is what came out of the rectifier, or each tap would rectify it again; there is no pool, and scale
    and shift are not looked at.

    Shapes: x ``(rows·pool, channels)``, weight ``(outputs, taps, channels)``, out ``(rows, outputs)``, moments
    ``(2, outputs, blocks)``.
    Bytes: x once per `COLUMNS` outputs (the taps overlap, in cache), out once, moments ``8·outputs`` per block.
    """
    x_stride, out_stride, channels, outputs = x_stride * VEC, out_stride * VEC, channels * VEC, outputs * VEC
    TAPS: tl.constexpr = TD * TH * TW
    DTYPE: tl.constexpr = x.dtype.element_ty
    column_blocks = tl.cdiv(outputs, COLUMNS)
    block = tl.program_id(0) // column_blocks  # neighbours share rows, which are then in the cache
    row = block * ROWS + tl.arange(0, ROWS)
    output = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, output_mask = row < rows, output < outputs
    # Rows after the last repeat it: what becomes of them is not stored.
    first = first_of_pool(tl.minimum(row, rows - 1), depth, height, width, PD, PH, PW)
    if TAPS > 1:
        _, d, h, w = coordinates(row, depth, height, width)
    x_rows = x + first.to(tl.int64)[:, None] * x_stride
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    tap, start = 0, 0
    for _ in range(TAPS * tl.cdiv(channels, DEPTH)):
        channel = start + tl.arange(0, DEPTH)
        if TAPS > 1:
            dd, dh, dw = window(tap, TD, TH, TW)
            valid = row_mask & inside(d + dd, h + dh, w + dw, depth, height, width, TD, TH, TW)
            offset = (dd * height + dh) * width + dw
            # It goes to shared memory and from there to the tensor cores.
            at = x_rows + (channel + offset.to(tl.int64) * x_stride)[None, :]
            s = tl.load(at, mask=valid[:, None] & (channel < channels)[None, :], other=0.0)
        else:
            s = rectified_rows(
                x, x_stride, first, scale, shift, channel, channels, height, width, PD, PH, PW, ALIGNED, DTYPE,
            )  # fmt: skip
        w_tile = tl.load(
            weight + output[None, :] * (TAPS * channels) + tap * channels + channel[:, None],
            mask=(channel < channels)[:, None] & output_mask[None, :],
            other=0.0,
        )
        total = tl.dot(s, w_tile, total, input_precision=PRECISION)
        if WAIT:  # an empty instruction that uses the sum: the product must be complete before the next step begins
            total = tl.inline_asm_elementwise("", "=f,0", [total], dtype=tl.float32, is_pure=True, pack=1)
        tap, start = next_tap(tap, start, TAPS, DEPTH)
    y = total.to(DTYPE)
    tl.store(
        out + row.to(tl.int64)[:, None] * out_stride + output[None, :],
        y,
        mask=row_mask[:, None] & output_mask[None, :],
    )
    if STATISTICS:
        mean, squares = block_moments(y.to(tl.float32), row_mask, tl.minimum(rows - block * ROWS, ROWS))
        tl.store(moments + output.to(tl.int64) * blocks + block, mean, mask=output_mask)
        tl.store(moments + (outputs + output).to(tl.int64) * blocks + block, squares, mask=output_mask)


def norm_relu_conv(x: Tensor, norm: Affine, weight: Tensor, out: Tensor, pool: int, into: Statistics | None) -> None:
    """Two kernels: the convolution, and if wanted the merging of the statistics of its blocks.

    Before them, one more rectifies x where there is a window: else each tap would do that again.
    """
    outputs, kernel, channels = weight.shape[0], weight.shape[2:], x.shape[-1]
    of = tiles.product(x, outputs, prod(kernel), pool)
    if of.taps > 1:
        x = rectify(x, norm)
    (x, x_stride), (out, out_stride) = launch.matrix(x), launch.matrix(out)
    weight, windows = launch.packed(weight, x.dtype), launch.windows(kernel, pool)
    rows, vec = out.numel() // outputs, launch.common_divisor(x, x_stride, channels, out_stride, outputs)
    wait = _MUST_WAIT and of.device.warp_groups and not of.exact and of.taps == 1

    def attempt(tile: tiles.Tile) -> None:
        blocks = launch.ceil_div(rows, tile.rows)
        moments = moments_of(out, blocks) if into else norm.scale
        launch.run(
            norm_relu_conv_kernel, blocks * launch.ceil_div(outputs, tile.columns), tile,
            x, x_stride // vec, norm.scale, norm.shift, weight, out, out_stride // vec, moments,
            rows, blocks, *launch.cube(x.shape[1:-1]), channels // vec, outputs // vec,
            *windows, into is not None, of.precision, wait, launch.aligned(norm.scale, norm.shift), vec,
        )  # fmt: skip
        if into:
            merge(moments, rows, tile.rows, into)

    attempt(tuning.tuned(tiles.forward(of), attempt, "forward", x, of))
