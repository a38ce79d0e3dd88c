"""The backward pass: one kernel for the prefix's gradient with all that it adds up, one for the weight's."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (the compiler of the kernels knows the types of their arguments)

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.ops.protocol import BackwardOperands
from efficient_densenet.ops.triton import launch, tiles, tuning
from efficient_densenet.ops.triton.moments import moments_of
from efficient_densenet.ops.triton.norms import norm_gradients
from efficient_densenet.ops.triton.rows import (
    coordinates,
    first_of_pool,
    inside,
    next_tap,
    rectified,
    rectified_rows,
    window,
    within_pool,
)


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def grad_x_kernel(
    grad_out, grad_out_stride, x, x_stride, scale, shift, mean, weight, grad_x, grad_x_stride, sums,
    rows, blocks, depth, height, width, channels, outputs,
    TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``g[r, c] = [scale·x + shift > 0] · Σ_tap Σ_o grad_out[r − tap, o] · weight[o, tap, c]``; then D and the sums.

    ``grad_x += scale·g`` (or ``=``), and ``Σ g`` and ``Σ g·(x − mean)`` of each block of `ROWS` rows, while the tile
    is in registers. With a pool, a row of the product belongs to a whole window of pixels, each with its own mask.

    Shapes: grad_out ``(rows, outputs)``, x and grad_x ``(rows·pool, channels)``, weight ``(outputs, taps, channels)``,
    sums ``(2, channels, blocks)``.
    Bytes: x once, grad_x once or (`ACCUMULATE`) twice, grad_out once per `COLUMNS` channels, mostly in cache.
    """
    grad_out_stride, x_stride, grad_x_stride = grad_out_stride * VEC, x_stride * VEC, grad_x_stride * VEC
    channels, outputs = channels * VEC, outputs * VEC
    TAPS: tl.constexpr = TD * TH * TW
    POOL: tl.constexpr = PD * PH * PW
    DTYPE: tl.constexpr = x.dtype.element_ty
    column_blocks = tl.cdiv(channels, COLUMNS)
    block = tl.program_id(0) // column_blocks
    row = block * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, channel_mask = row < rows, channel < channels
    grad_out_rows = grad_out + row.to(tl.int64)[:, None] * grad_out_stride
    if TAPS > 1:
        _, d, h, w = coordinates(row, depth, height, width)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    tap, start = 0, 0
    for _ in range(TAPS * tl.cdiv(outputs, DEPTH)):
        output = start + tl.arange(0, DEPTH)
        output_mask = output < outputs
        if TAPS > 1:
            dd, dh, dw = window(tap, TD, TH, TW)
            valid = row_mask & inside(d - dd, h - dh, w - dw, depth, height, width, TD, TH, TW)
            offset = ((dd * height + dh) * width + dw).to(tl.int64)
            at = grad_out_rows + (output - offset * grad_out_stride)[None, :]
        else:
            valid, at = row_mask, grad_out_rows + output[None, :]
        dy = tl.load(at, mask=valid[:, None] & output_mask[None, :], other=0.0)
        w_tile = tl.load(
            weight + output[:, None] * (TAPS * channels) + tap * channels + channel[None, :],
            mask=output_mask[:, None] & channel_mask[None, :],
            other=0.0,
        )
        total = tl.dot(dy, w_tile, total, input_precision=PRECISION)
        tap, start = next_tap(tap, start, TAPS, DEPTH)
    total = total * (1.0 / POOL)
    a = tl.load(scale + channel, mask=channel_mask, other=0.0)[None, :]
    b = tl.load(shift + channel, mask=channel_mask, other=0.0)[None, :]
    mu = tl.load(mean + channel, mask=channel_mask, other=0.0)[None, :]
    mask = row_mask[:, None] & channel_mask[None, :]
    first = first_of_pool(row, depth, height, width, PD, PH, PW).to(tl.int64)[:, None]
    g_sum = tl.zeros((COLUMNS,), dtype=tl.float32)
    g_centred = tl.zeros((COLUMNS,), dtype=tl.float32)
    for p in range(POOL):  # not unrolled, or all windows' tiles would be in registers at once
        at_row = first + within_pool(p, height, width, PH, PW)
        value = tl.load(x + at_row * x_stride + channel[None, :], mask=mask, other=0.0)
        g = tl.where(mask & (rectified(value, a, b, DTYPE).to(tl.float32) > 0), total, 0.0)
        target = grad_x + at_row * grad_x_stride + channel[None, :]
        new = tl.load(target, mask=mask, other=0.0).to(tl.float32) + a * g if ACCUMULATE else a * g
        tl.store(target, new.to(DTYPE), mask=mask)
        g_sum += tl.sum(g, 0)
        g_centred += tl.sum(g * (value.to(tl.float32) - mu), 0)
    tl.store(sums + channel.to(tl.int64) * blocks + block, g_sum, mask=channel_mask)
    tl.store(sums + (channels + channel).to(tl.int64) * blocks + block, g_centred, mask=channel_mask)


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def grad_x_pointwise_kernel(
    grad_out, grad_out_stride, x, x_stride, scale, shift, mean, weight, grad_x, grad_x_stride, sums,
    rows, channels, outputs,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`grad_x_kernel` of a 1×1 window without a pool: a program goes over blocks of rows, and keeps its weights.

    The product is short, and memory is what bounds it. So x and grad_x are on their way before the product begins, the
    next block's grad_out too, and the sums stay in registers: `sums` are those of each program.

    Shapes: grad_out ``(rows, outputs)``, `outputs` at most `DEPTH`, x and grad_x ``(rows, channels)``, weight
    ``(outputs, channels)``, sums ``(2, channels, programs / ⌈channels / COLUMNS⌉)``.
    Bytes: as there.
    """
    grad_out_stride, x_stride, grad_x_stride = grad_out_stride * VEC, x_stride * VEC, grad_x_stride * VEC
    channels, outputs = channels * VEC, outputs * VEC
    DTYPE: tl.constexpr = x.dtype.element_ty
    column_blocks = tl.cdiv(channels, COLUMNS)
    part, parts = tl.program_id(0) // column_blocks, tl.num_programs(0) // column_blocks
    channel = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    output = tl.arange(0, DEPTH)
    channel_mask, output_mask = channel < channels, output < outputs
    w_tile = tl.load(
        weight + output[:, None] * channels + channel[None, :],
        mask=output_mask[:, None] & channel_mask[None, :],
        other=0.0,
    )
    a = tl.load(scale + channel, mask=channel_mask, other=0.0)[None, :]
    b = tl.load(shift + channel, mask=channel_mask, other=0.0)[None, :]
    mu = tl.load(mean + channel, mask=channel_mask, other=0.0)[None, :]
    g_sum = tl.zeros((COLUMNS,), dtype=tl.float32)
    g_centred = tl.zeros((COLUMNS,), dtype=tl.float32)
    for block in tl.range(part, tl.cdiv(rows, ROWS), parts, num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)
        row_mask, at = (row < rows)[:, None], row.to(tl.int64)[:, None]
        mask = row_mask & channel_mask[None, :]
        target = grad_x + at * grad_x_stride + channel[None, :]
        at_output = grad_out + at * grad_out_stride + output[None, :]
        dy = tl.load(at_output, mask=row_mask & output_mask[None, :], other=0.0)
        value = tl.load(x + at * x_stride + channel[None, :], mask=mask, other=0.0)
        if ACCUMULATE:
            before = tl.load(target, mask=mask, other=0.0)
        total = tl.dot(dy, w_tile, input_precision=PRECISION)
        g = tl.where(mask & (rectified(value, a, b, DTYPE).to(tl.float32) > 0), total, 0.0)
        new = before.to(tl.float32) + a * g if ACCUMULATE else a * g
        tl.store(target, new.to(DTYPE), mask=mask)
        g_sum += tl.sum(g, 0)
        g_centred += tl.sum(g * (value.to(tl.float32) - mu), 0)
    tl.store(sums + channel.to(tl.int64) * parts + part, g_sum, mask=channel_mask)
    tl.store(sums + (channels + channel).to(tl.int64) * parts + part, g_centred, mask=channel_mask)


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def grad_weight_kernel(
    grad_out, grad_out_stride, x, x_stride, scale, shift, parts,
    rows, rows_per_part, depth, height, width, channels, outputs,
    TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``parts[part, tap, o, c] = Σ_{r in part} grad_out[r − tap, o] · pool(relu(scale·x + shift))[r, c]``.

    A matrix product ``(taps·outputs, rows) × (rows, channels)`` in tiles of ``ROWS × COLUMNS``, `DEPTH` pixels at a
    time. Taps and outputs together are its rows, so that few outputs still fill a tile, and x is read once for all
    the taps in a tile. The prologue is computed again. Each program has rows of its own to add up, in their order.

    Shapes: grad_out ``(rows, outputs)``, x ``(rows·pool, channels)``, parts ``(parts, taps·outputs, channels)``.
    Bytes: x once per `ROWS` of taps and outputs, grad_out once per `COLUMNS` channels, parts once.
    """
    grad_out_stride, x_stride = grad_out_stride * VEC, x_stride * VEC
    channels, outputs = channels * VEC, outputs * VEC
    TAPS: tl.constexpr = TD * TH * TW
    DTYPE: tl.constexpr = x.dtype.element_ty
    column_blocks, row_blocks = tl.cdiv(channels, COLUMNS), tl.cdiv(TAPS * outputs, ROWS)
    part = tl.program_id(0) // (column_blocks * row_blocks)
    tile = tl.program_id(0) % (column_blocks * row_blocks)
    j = (tile // column_blocks) * ROWS + tl.arange(0, ROWS)
    channel = (tile % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    j_mask = j < TAPS * outputs
    if TAPS > 1:
        dd, dh, dw = window(j // outputs, TD, TH, TW)
        offset = ((dd * height + dh) * width + dw).to(tl.int64)
        # `VEC` neighbours have the same tap, which the compiler does not see by itself.
        column = tl.max_contiguous(tl.multiple_of(j % outputs - offset * grad_out_stride, VEC), VEC)
    else:
        column = j.to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    stop = tl.minimum((part + 1) * rows_per_part, rows)
    for start in range(part * rows_per_part, stop, DEPTH):
        row = start + tl.arange(0, DEPTH)
        row_mask = row < stop
        valid = row_mask[:, None] & j_mask[None, :]
        if TAPS > 1:
            _, d, h, w = coordinates(row, depth, height, width)
            valid &= inside(
                d[:, None] - dd[None, :], h[:, None] - dh[None, :], w[:, None] - dw[None, :],
                depth, height, width, TD, TH, TW,
            )  # fmt: skip
            valid = tl.max_constancy(valid, [1, VEC])
        dy = tl.load(grad_out + row.to(tl.int64)[:, None] * grad_out_stride + column[None, :], mask=valid, other=0.0)
        # Where dy is zero, x is that of some row.
        first = first_of_pool(tl.minimum(row, rows - 1), depth, height, width, PD, PH, PW)
        s = rectified_rows(
            x, x_stride, first, scale, shift, channel, channels, height, width, PD, PH, PW, ALIGNED, DTYPE,
        )  # fmt: skip
        total = tl.dot(tl.trans(dy), s, total, input_precision=PRECISION)
    tl.store(
        parts + (part.to(tl.int64) * (TAPS * outputs) + j)[:, None] * channels + channel[None, :],
        total,
        mask=j_mask[:, None] & (channel < channels)[None, :],
    )


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def sum_parts_kernel(
    parts, grad_weight, stride_output, stride_channel, stride_tap, number, taps, outputs, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``grad_weight[o, c, tap] = Σ_part parts[part, tap, o, c]``, in the weight's own type and layout.

    Bytes: parts once, grad_weight once.
    """
    size = taps * outputs * channels
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = at < size
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, number, ROWS):
        part = start + tl.arange(0, ROWS)
        values = tl.load(
            parts + part.to(tl.int64)[:, None] * size + at[None, :],
            mask=(part < number)[:, None] & mask[None, :],
            other=0.0,
        )
        total += tl.sum(values, 0)
    j = at // channels
    target = (j % outputs) * stride_output + (at % channels) * stride_channel + (j // outputs) * stride_tap
    tl.store(grad_weight + target, total.to(grad_weight.dtype.element_ty), mask=mask)


def norm_relu_conv_backward(operands: BackwardOperands, into: tuple[Tensor | None, Tensor, Tensor]) -> None:
    """Four kernels: prefix and its sums, the norm's gradients, and if wanted the weight's gradient and its sum.

    Pixels outside of the pool's whole windows stay as they are.

    Args:
        into: what the gradients overwrite: of the convolution's weight, in which taps lie at equal distances (None if
            it is not wanted), and of the norm's weight and bias.
    """
    x, grad_x = operands.x, operands.grad_x
    of_weight, *of_norm = into
    product = Product(operands)
    tile = tiles.grad_x_pointwise(product.of)
    name, sums = ("grad_x", product.grad_x) if tile is None else ("grad_x_pointwise", product.grad_x_pointwise)

    def attempt(grad_x: Tensor, through: Tensor | None, tile: tiles.Tile, of_norm: Sequence[Tensor]) -> None:
        norm_gradients(sums(grad_x, operands.accumulate, tile), product.norm, through, of_norm)

    tile = tuning.tuned(
        tile or tiles.grad_x(product.of),
        lambda tile: attempt(torch.empty_like(x), None, tile, [torch.empty_like(vector) for vector in of_norm]),
        *(name, x, product.of),
    )
    attempt(grad_x, operands.through, tile, of_norm)
    if of_weight is not None:
        tile = tuning.tuned(
            tiles.grad_weight(product.of),
            lambda tile: product.grad_weight(torch.empty_like(of_weight), tile),
            *("grad_weight", x, product.of),
        )
        product.grad_weight(of_weight, tile)


class Product:
    """The operands of both gradients, as the kernels take them."""

    def __init__(self, operands: BackwardOperands) -> None:
        grad_out, x, norm, weight, *_ = operands
        self.grad_out, self.grad_out_stride = launch.matrix(grad_out.to(x.dtype))
        self.x, self.x_stride = launch.matrix(x)
        self.norm, self.weight = norm, weight
        self.outputs, self.channels = weight.shape[:2]
        self.rows, self.volume = grad_out.numel() // self.outputs, launch.cube(x.shape[1:-1])
        self.windows = launch.windows(weight.shape[2:], operands.pool)
        self.of = tiles.product(x, self.outputs, prod(weight.shape[2:]), operands.pool)

    def _divided(self, *further: int) -> tuple[int, list[int]]:
        """The common divisor, and by it the strides of grad_out and x, channels, outputs, and further strides."""
        sizes = self.grad_out_stride, self.x_stride, self.channels, self.outputs, *further
        vec = launch.common_divisor(self.x, *sizes)
        return vec, [size // vec for size in sizes]

    def grad_x(self, grad_x: Tensor, accumulate: bool, tile: tiles.Tile) -> Tensor:
        """Write or add to `grad_x`; returns the sums of which the norm's gradients are made."""
        grad_x, grad_x_stride = launch.matrix(grad_x)
        blocks = launch.ceil_div(self.rows, tile.rows)
        sums = moments_of(self.x, blocks)
        vec, (grad_out_stride, x_stride, channels, outputs, grad_x_stride) = self._divided(grad_x_stride)
        launch.run(
            grad_x_kernel, blocks * launch.ceil_div(self.channels, tile.columns), tile,
            self.grad_out, grad_out_stride, self.x, x_stride, self.norm.scale, self.norm.shift, self.norm.mean,
            launch.packed(self.weight, self.x.dtype), grad_x, grad_x_stride, sums,
            self.rows, blocks, *self.volume, channels, outputs, *self.windows, accumulate, self.of.precision, vec,
        )  # fmt: skip
        return sums

    def grad_x_pointwise(self, grad_x: Tensor, accumulate: bool, tile: tiles.Tile) -> Tensor:
        """As `grad_x`, of a 1×1 window without a pool and at most `tile.depth` outputs."""
        assert self.outputs <= tile.depth
        grad_x, grad_x_stride = launch.matrix(grad_x)
        column_blocks = launch.ceil_div(self.channels, tile.columns)
        most = max(1, 2 * self.of.device.programs // column_blocks)  # they are small: four on a multiprocessor
        parts = min(launch.ceil_div(self.rows, tile.rows), most)
        sums = moments_of(self.x, parts)
        vec, (grad_out_stride, x_stride, channels, outputs, grad_x_stride) = self._divided(grad_x_stride)
        launch.run(
            grad_x_pointwise_kernel, parts * column_blocks, tile,
            self.grad_out, grad_out_stride, self.x, x_stride, self.norm.scale, self.norm.shift, self.norm.mean,
            launch.packed(self.weight, self.x.dtype), grad_x, grad_x_stride, sums,
            self.rows, channels, outputs, accumulate, self.of.precision, vec, tile.stages,
        )  # fmt: skip
        return sums

    def grad_weight(self, grad_weight: Tensor, tile: tiles.Tile) -> None:
        """Overwrite it: it is contiguous or channels-last."""
        lines = self.of.taps * self.outputs
        products = launch.ceil_div(lines, tile.rows) * launch.ceil_div(self.channels, tile.columns)
        rows_per_part = tiles.rows_per_part(self.rows, products, tile, self.of.device)
        number = launch.ceil_div(self.rows, rows_per_part)
        parts = self.norm.scale.new_empty((number, lines, self.channels))
        vec, (grad_out_stride, x_stride, channels, outputs) = self._divided()
        launch.run(
            grad_weight_kernel, number * products, tile,
            self.grad_out, grad_out_stride, self.x, x_stride, self.norm.scale, self.norm.shift, parts,
            self.rows, rows_per_part, *self.volume, channels, outputs, *self.windows, self.of.precision,
            launch.aligned(self.norm.scale, self.norm.shift), vec,
        )  # fmt: skip
        by_output, by_channel, *_ = grad_weight.stride()
        launch.run(
            sum_parts_kernel, launch.ceil_div(lines * self.channels, tiles.SUM_PARTS.columns), tiles.SUM_PARTS,
            parts, grad_weight, by_output, by_channel, launch.stride_of_taps(grad_weight), number, self.of.taps,
            self.outputs, self.channels,
        )  # fmt: skip
