"""What several kernels share: rows of pixels, windows around them, and the prologue.

A channels-last activation of 1, 2 or 3 spatial dimensions is a matrix of rows, one per pixel, in a volume of
``depth × height × width`` pixels per image; missing dimensions have size 1. A window has ``TD × TH × TW`` taps, a pool
``PD × PH × PW`` pixels, both known at compilation; all sizes of activations are run-time arguments.

Channel counts and strides come in units of `VEC` values: multiplied back inside the kernel, they tell the compiler by
how much they can be divided, and so how wide a load may be, without a kernel of its own for every value.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (the compiler of the kernels knows the types of their arguments)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rectified(x, scale, shift, DTYPE: tl.constexpr):
    """``relu(scale·x + shift)`` as the ordinary network would have stored it; NaN stays NaN."""
    z = x.to(tl.float32) * scale + shift
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)


@triton.jit
def coordinates(rows, depth, height, width):
    """Image, plane, line and pixel of each row."""
    line = rows // width
    plane = line // height
    return plane // depth, plane % depth, line % height, rows % width


@triton.jit
def window(tap, TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """How far tap number `tap` lies from the centre of the window, in planes, lines and pixels."""
    plane = tap // (TH * TW) - TD // 2 if TD > 1 else tap * 0
    line = (tap // TW) % TH - TH // 2 if TH > 1 else tap * 0
    return plane, line, tap % TW - TW // 2


@triton.jit
def next_tap(tap, start, TAPS: tl.constexpr, DEPTH: tl.constexpr):
    """The next tap for the channels from `start` on; after the last one the first, for the next `DEPTH` channels.

    What the taps share is then still in the cache. Counted, for a division takes registers.
    """
    if TAPS == 1:
        return tap, start + DEPTH
    else:
        tap += 1
        start = tl.where(tap == TAPS, start + DEPTH, start)
        return tl.where(tap == TAPS, 0, tap), start


@triton.jit
def inside(d, h, w, depth, height, width, TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """Whether a pixel lies in its image: only the directions in which a window reaches out are looked at."""
    valid = (w >= 0) & (w < width)
    if TH > 1:
        valid &= (h >= 0) & (h < height)
    if TD > 1:
        valid &= (d >= 0) & (d < depth)
    return valid


@triton.jit
def first_of_pool(rows, depth, height, width, PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """The first row of the window that each row of a pooled activation was made of."""
    if PD * PH * PW == 1:
        return rows
    else:
        image, d, h, w = coordinates(rows, depth // PD, height // PH, width // PW)
        return ((image * depth + d * PD) * height + h * PH) * width + w * PW


@triton.jit
def within_pool(p, height, width, PH: tl.constexpr, PW: tl.constexpr):
    """By how many rows pixel number `p` of a pool's window comes after the first."""
    return ((p // (PH * PW)) * height + (p // PW) % PH) * width + p % PW


@triton.jit
def rectified_rows(
    x, x_stride, first, scale, shift, channel, channels, height, width,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``average_pool(relu(scale·x + shift))`` of a tile of rows and channels, zero in channels that there are not.

    Rows must exist: a mask would be as much work as the rectifier, and keep the result from the tensor cores.
    With `ALIGNED`, scale and shift begin at multiples of 16 bytes, and are loaded 16 bytes at a time.
    """
    mask = (channel < channels)[None, :]
    scales, shifts = scale + channel, shift + channel
    if ALIGNED:
        scales, shifts = tl.multiple_of(scales, 16), tl.multiple_of(shifts, 16)
    a = tl.load(scales, mask=channel < channels, other=0.0)[None, :]
    b = tl.load(shifts, mask=channel < channels, other=0.0)[None, :]
    at = x + first.to(tl.int64)[:, None] * x_stride + channel[None, :]
    if PD * PH * PW == 1:
        return rectified(tl.load(at, mask=mask, other=0.0), a, b, DTYPE)
    else:
        total = tl.zeros(at.shape, dtype=tl.float32)
        for p in tl.static_range(PD * PH * PW):
            offset = within_pool(p, height, width, PH, PW)
            values = tl.load(at + offset.to(tl.int64) * x_stride, mask=mask, other=0.0)
            total += rectified(values, a, b, DTYPE).to(tl.float32)
        return (total * (1.0 / (PD * PH * PW))).to(DTYPE)
