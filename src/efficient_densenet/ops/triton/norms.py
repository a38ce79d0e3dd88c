"""What there is to do for a batch norm on vectors of one number per channel: fold it, and its gradients."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (the compiler of the kernels knows the types of their arguments)

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.ops.protocol import Affine, Statistics
from efficient_densenet.ops.triton import launch, tiles


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def fold_kernel(mean, variance, weight, bias, eps, inverse, scale, shift, channels, COLUMNS: tl.constexpr):
    """``inverse = 1/√(σ² + eps)``, ``scale = weight·inverse``, ``shift = bias − μ·scale``: vectors ``(channels,)``."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = channel < channels
    variance_ = tl.load(variance + channel, mask=mask, other=0.0).to(tl.float32)
    inverse_ = tl.div_rn(1.0, tl.sqrt_rn(variance_ + eps))
    scale_ = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32) * inverse_
    mean_ = tl.load(mean + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(inverse + channel, inverse_, mask=mask)
    tl.store(scale + channel, scale_, mask=mask)
    tl.store(shift + channel, tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32) - mean_ * scale_, mask=mask)


@triton.jit(do_not_specialize=launch.RUN_TIME, do_not_specialize_on_alignment=launch.VECTORS)
def norm_gradients_kernel(
    sums, inverse, scale, grad_weight, grad_bias, through, through_stride, blocks, channels,
    THROUGH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the sums of blocks: gradients of weight and bias, and what goes ``through`` the statistics; a channel each.

    With ``Σ g = Σ_b sums[0, c, b]`` and ``Σ g·(x − μ) = Σ_b sums[1, c, b]``, in an order that depends on the number of
    blocks alone: ``grad_weight = inverse·Σ g·(x − μ)``, ``grad_bias = Σ g``, ``through[0] += scale·Σ g``,
    ``through[1] += scale·inverse²·Σ g·(x − μ)``.

    Shapes: sums ``(2, channels, blocks)``, through ``(2, channels)``, the others ``(channels,)``. Bytes: sums once.
    """
    channel = tl.program_id(0)
    at = sums + channel.to(tl.int64) * blocks
    offset = channels.to(tl.int64) * blocks
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    total_centred = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, blocks, COLUMNS):
        block = start + tl.arange(0, COLUMNS)
        total += tl.load(at + block, mask=block < blocks, other=0.0)
        total_centred += tl.load(at + offset + block, mask=block < blocks, other=0.0)
    g, g_centred = tl.sum(total, 0), tl.sum(total_centred, 0)
    inverse_ = tl.load(inverse + channel)
    tl.store(grad_weight + channel, inverse_ * g_centred)
    tl.store(grad_bias + channel, g)
    if THROUGH:
        a = tl.load(scale + channel)
        tl.store(through + channel, tl.load(through + channel) + a * g)
        slope = through + through_stride + channel
        tl.store(slope, tl.load(slope) + a * (inverse_ * inverse_) * g_centred)


def fold_norm(statistics: Statistics, weight: Tensor, bias: Tensor, eps: float, into: Affine) -> None:
    """One kernel."""
    shape, tile = into.scale.shape, tiles.ALONG
    (channels,) = shape
    vectors = [
        v if v.is_contiguous() and v.shape == shape else v.expand(shape).contiguous()
        for v in (*statistics, weight, bias)
    ]
    launch.run(
        fold_kernel, launch.ceil_div(channels, tile.columns), tile,
        *vectors, float(eps), into.inverse, into.scale, into.shift, channels,
    )  # fmt: skip


def norm_gradients(sums: Tensor, norm: Affine, through: Tensor | None, into: Sequence[Tensor]) -> None:
    """One kernel: the gradients of the norm's weight and bias, from the sums of all blocks; they overwrite `into`."""
    _, channels, blocks = sums.shape
    of_weight, of_bias = into
    target = of_bias if through is None else through
    launch.run(
        norm_gradients_kernel, channels, tiles.ALONG,
        sums, norm.inverse, norm.scale, of_weight, of_bias, target, target.stride(0), blocks, channels,
        through is not None,
    )  # fmt: skip
