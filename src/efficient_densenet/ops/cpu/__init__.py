"""The operations of `Backend` on a CPU: each is one kernel, or PyTorch's convolution between passes of one loop each.

Where the rule in `instructions` says so, a norm–relu–convolution is one kernel (`convolve.h`): the rectified prefix is
made a few lines at a time in a scratch that stays in the cache, and consumed by the product from there. Elsewhere the
convolution is PyTorch's, and the prefix lives in a scratch tensor of a few megabytes, as in `eager`; the passes before
and after it (`loops.h`) read and write what they must, once. Sums are added up in double precision, in an order that
depends on the shapes and the number of threads alone.

Bytes moved per value of the prefix: forward reads x; backward reads x and D and writes D.
"""

from __future__ import annotations

from enum import IntEnum
from math import prod

import torch
from torch import Tensor

from efficient_densenet.ops import eager
from efficient_densenet.ops.convolution import (
    convolve,
    convolve_backward,
    convolve_pooled,
    pieces,
    row_stride,
    stride_of_rows,
)
from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.cpu.instructions import convolutions
from efficient_densenet.ops.cpu.library import load
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics


def supports(x: Tensor) -> bool:
    """Whether activations like `x` run here."""
    return x.device.type == "cpu" and x.dtype in (load().kernels or {})


def describe() -> str:
    """What is in use, and who runs the convolutions of each type, in words."""
    loaded = load()
    if loaded.kernels is None:
        return loaded.description
    parts = [loaded.description]
    for dtype in loaded.kernels:
        ours, reason = convolutions(loaded.instructions, dtype)
        whose = "ours" if ours else "PyTorch's"
        parts.append(f"convolutions in {str(dtype).removeprefix('torch.')} are {whose}: {reason}")
    return "; ".join(parts)


def fold_norm(statistics: Statistics, weight: Tensor, bias: Tensor, eps: float, into: Affine) -> None:
    dtype = into.scale.dtype
    constants = [*statistics, weight, bias]
    for i, vector in enumerate(constants):
        if vector.dtype != dtype or not vector.is_contiguous():
            constants[i] = vector.to(dtype).contiguous()
    pointers = _constants(*constants, into.inverse, into.scale, into.shift)
    _kernels(into.scale).fold_norm(*pointers[:4], eps, len(into.scale), *pointers[4:])


def norm_relu_conv(
    x: Tensor, norm: Affine, weight: Tensor, out: Tensor, pool: int = 1, into: Statistics | None = None
) -> None:
    moments = _no_moments(out) if into else None
    if pool > 1 or not _convolve(x, norm, weight, out, moments):
        rows, identity = 0, _identity(norm)
        for images, scratch in pieces(x):
            s, here = _prologue(x[images], norm, pool, scratch), out[images]
            # What a pool has made is not negative: another rectifier changes nothing.
            if pool > 1 and _convolve(s, identity, weight, here, None):
                rows = _copy_moments(here, None, moments, rows)
            else:
                y = convolve_pooled(s, weight) if pool > 1 else convolve(s, weight)
                rows = _copy_moments(y, here, moments, rows)
    _put(moments, into)


def norm_relu_conv_backward(operands: BackwardOperands) -> tuple[Tensor | None, Tensor, Tensor]:
    sums = operands.x.new_zeros((2, operands.x.shape[-1]), dtype=torch.float64)
    grad_weight, done = None, _Done.NOTHING
    if operands.pool == 1:
        done, grad_weight = _convolve_backward(operands, sums)
    if done == _Done.NOTHING:
        grad_weight = _backward_in_passes(operands, sums)
    elif done == _Done.ALL_BUT_WEIGHT:
        elsewhere = operands._replace(grad_x=torch.empty_like(operands.grad_x), accumulate=False)
        grad_weight = _backward_in_passes(elsewhere, torch.empty_like(sums))
    return grad_weight, *eager.norm_gradients(operands.norm, sums, operands.through)


class _Done(IntEnum):
    """What the kernel for a whole backward pass has done: non-finite values it leaves to PyTorch."""

    NOTHING = 0
    ALL_BUT_WEIGHT = 1
    ALL = 2


def _convolve(x: Tensor, norm: Affine, weight: Tensor, out: Tensor, moments: Tensor | None) -> bool:
    """The whole operation without a pool in one kernel; False where there is none, or it leaves this to PyTorch."""
    kernels = own_convolution(x, weight)
    return kernels is not None and kernels.convolve(
        _rows(x), _convolution(x, weight), weight.data_ptr(), _affine(norm),
        _rows(out), None if moments is None else moments.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def _convolve_backward(operands: BackwardOperands, sums: Tensor) -> tuple[_Done, Tensor | None]:
    """The backward pass of `_convolve`, and the gradient of the weight; the sums go to `sums`."""
    grad_out, x, norm, weight, grad_x, accumulate, _, _, need_weight = operands
    kernels = own_convolution(x, weight)
    if kernels is None:
        return _Done.NOTHING, None
    grad_weight = torch.empty_like(weight) if need_weight else None
    done = kernels.convolve_backward(
        _rows(grad_out), _rows(x), _convolution(x, weight), weight.data_ptr(),
        _affine(norm), _rows(grad_x), accumulate,
        None if grad_weight is None else grad_weight.data_ptr(), sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return _Done(done), grad_weight


def _backward_in_passes(operands: BackwardOperands, sums: Tensor) -> Tensor | None:
    """The product between the passes, by PyTorch unless a pool comes before it; the sums go to `sums`."""
    grad_out, x, norm, weight, grad_x, accumulate, _, pool, need_weight = operands
    grad_weight, identity = None, _identity(norm)
    if pool > 1 and not accumulate and any(n % pool for n in x.shape[1:-1]):
        grad_x.zero_()  # pixels outside whole windows
    for images, scratch in pieces(x):
        piece, grad = x[images], grad_out[images]
        s = _prologue(piece, norm, pool, scratch)
        done = _Done.NOTHING
        if pool > 1:
            g = torch.empty_like(s)
            product = BackwardOperands(grad, s, identity, weight, g, False, None, need_weight=need_weight)
            done, gw = _convolve_backward(product, torch.zeros_like(sums))
        if done != _Done.ALL:
            g, gw = convolve_backward(grad, s, weight, need_weight)
        if need_weight:
            assert gw is not None
            gw = gw.to(norm.scale.dtype)
            grad_weight = gw if grad_weight is None else grad_weight.add_(gw)
        _accumulate(g, piece, norm, grad_x[images], accumulate, pool, sums)
    return _like(grad_weight, weight) if need_weight else None


def _identity(norm: Affine) -> Affine:
    """A norm that changes nothing, of as many channels."""
    zero, one = torch.zeros_like(norm.mean), torch.ones_like(norm.mean)
    return Affine(zero, one, one, zero)


def norm_relu_max_pool(x: Tensor, norm: Affine, out: Tensor) -> None:
    if not len(x):
        return
    _kernels(x).max_pool(
        _rows(x), _volume(x, 3), x.shape[-1], _affine(norm), _rows(out),
        None, torch.get_num_threads(),
    )  # fmt: skip


def norm_relu_max_pool_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not len(x):
        return eager.norm_relu_max_pool_backward(grad_out, x, norm, grad_x, through)
    volume, channels, threads = _volume(x, 3), x.shape[-1], torch.get_num_threads()
    if row_stride(grad_out) is None:
        grad_out = grad_out.contiguous()
    argmax = grad_out.new_empty(grad_out.shape, dtype=torch.uint8)  # the tap of each window, of each channel
    sums = x.new_zeros((2, channels), dtype=torch.float64)
    _kernels(x).max_pool(
        _rows(x), volume, channels, _affine(norm), library.Rows(), argmax.data_ptr(),
        threads,
    )  # fmt: skip
    _kernels(x).max_pool_backward(
        _rows(grad_out), argmax.data_ptr(), _rows(x), volume, channels,
        _affine(norm), _rows(grad_x), sums.data_ptr(), threads,
    )  # fmt: skip
    return eager.norm_gradients(norm, sums, through)


def norm_relu_mean(x: Tensor, norm: Affine, out: Tensor) -> None:
    _kernels(x).mean(
        _rows(x), *_images(x), _affine(norm), _rows(out),
        torch.get_num_threads(),
    )  # fmt: skip


def norm_relu_mean_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    sums = x.new_zeros((2, x.shape[-1]), dtype=torch.float64)
    _kernels(x).mean_backward(
        _rows(grad_out.contiguous()), _rows(x), *_images(x),
        _affine(norm), _rows(grad_x), sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return eager.norm_gradients(norm, sums, through)


def statistics(x: Tensor, into: Statistics) -> None:
    moments = _no_moments(x)
    _copy_moments(x, None, moments)
    _put(moments, into)


def finish(grad: Tensor, x: Tensor, mean: Tensor, through: Tensor, count: Tensor, out: Tensor) -> None:
    channels = x.shape[-1]
    rows = x.numel() // channels
    constant, slope = through / count
    _kernels(x).finish(
        _rows(grad), _rows(x), rows, channels, *_constants(mean, constant, slope), _rows(out),
        torch.get_num_threads(),
    )  # fmt: skip


def own_convolution(x: Tensor, weight: Tensor) -> library.Kernels | None:
    """The kernels, where the whole operation is one of them: a 1×1 window, or 3×3 over images that are large enough.

    Where `instructions` says so, it takes half to nine tenths of the time of oneDNN and the passes around it.
    """
    loaded = load()
    if x.dtype not in loaded.convolves or weight.dtype != x.dtype or not x.shape[0]:
        return None
    if not (weight.is_contiguous() or weight.movedim(1, -1).is_contiguous()):  # nor channels-last
        return None
    assert loaded.kernels is not None
    kernels = loaded.kernels[x.dtype]
    if weight.shape[2:] == (3, 3):
        return kernels if kernels.suits(*x.shape[1:3]) else None
    return kernels if prod(weight.shape[2:]) == 1 else None


def _convolution(x: Tensor, weight: Tensor) -> library.Convolution:
    """The taps of a window lie at equal distances, whether the weight is contiguous or channels-last."""
    n, height, width = x.shape[:3] if weight.dim() == 4 else (1, 1, x.numel() // x.shape[-1])
    return library.Convolution(
        n, height, width, weight.shape[-1], *weight.shape[:2], *weight.stride()[:2], weight.stride(-1)
    )


def _prologue(x: Tensor, norm: Affine, pool: int, scratch: Tensor) -> Tensor:
    """``average_pool(relu(scale·x + shift))`` in the scratch tensor."""
    channels, threads = x.shape[-1], torch.get_num_threads()
    if pool == 1:
        _kernels(x).prologue(_rows(x), x.numel() // channels, channels, _affine(norm), scratch.data_ptr(), threads)
        return scratch
    pooled = x.new_empty((x.shape[0], *(n // pool for n in x.shape[1:-1]), channels))
    _kernels(x).prologue_pool(_rows(x), _volume(x, pool), channels, _affine(norm), pooled.data_ptr(), threads)
    return pooled


def _accumulate(g: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, accumulate: bool, pool: int, sums: Tensor) -> None:
    kernels = _kernels(x)
    channels = x.shape[-1]
    run = kernels.accumulate if pool == 1 else kernels.accumulate_pool
    size = x.numel() // channels if pool == 1 else _volume(x, pool)
    run(
        g.data_ptr(), _rows(x), size, channels, _affine(norm),
        _rows(grad_x), accumulate, sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def _no_moments(x: Tensor) -> Tensor:
    return x.new_zeros((2, x.shape[-1]), dtype=torch.float64)


def _copy_moments(x: Tensor, out: Tensor | None, moments: Tensor | None, before: int = 0) -> int:
    """Copy `x` to `out`, if given, and add it to the moments of `before` rows, if wanted; return the rows so far."""
    channels = x.shape[-1]
    rows = x.numel() // channels
    _kernels(x).copy_moments(
        _rows(x), rows, channels, library.Rows() if out is None else _rows(out),
        None if moments is None else moments.data_ptr(), before, torch.get_num_threads(),
    )  # fmt: skip
    return before + rows


def _put(moments: Tensor | None, into: Statistics | None) -> None:
    if moments is not None and into is not None:
        into.mean.copy_(moments[0])
        into.variance.copy_(moments[1])


def _like(grad: Tensor | None, weight: Tensor) -> Tensor:
    """The gradient in the type and memory format of the weight; zero if there was no image."""
    if grad is None:
        return torch.zeros_like(weight)
    if grad.dtype == weight.dtype and prod(weight.shape[2:]) == 1 and weight.is_contiguous():
        return grad.as_strided(weight.shape, weight.stride())  # formats differ in the strides of single pixels alone
    return torch.empty_like(weight).copy_(grad)


def _kernels(x: Tensor) -> library.Kernels:
    """Those for activations of this type."""
    kernels = load().kernels
    assert kernels is not None
    return kernels[x.dtype]


def _rows(x: Tensor) -> library.Rows:
    """A slice of the channels of a contiguous ``(n, *spatial, C)``."""
    stride = stride_of_rows(x.shape, x.stride())
    assert stride is not None, f"{x.shape} with strides {x.stride()} is no slice of channels"
    return library.Rows(x.data_ptr(), stride)


def _affine(norm: Affine) -> library.Affine:
    mean, _, scale, shift = norm
    assert mean.is_contiguous() and scale.is_contiguous() and shift.is_contiguous()
    return library.Affine(mean.data_ptr(), scale.data_ptr(), shift.data_ptr())


def _constants(*vectors: Tensor) -> list[int]:
    pointers = []
    for vector in vectors:
        assert vector.is_contiguous()
        pointers.append(vector.data_ptr())
    return pointers


def _images(x: Tensor) -> tuple[int, int, int]:
    """Images, pixels of each, and channels."""
    return x.shape[0], prod(x.shape[1:-1]), x.shape[-1]


def _volume(x: Tensor, pool: int) -> library.Volume:
    """Of ``x: (n, *spatial, C)``, with a window of `pool` in each direction that there is."""
    missing = [1] * (5 - x.dim())
    return library.Volume(x.shape[0], *missing, *x.shape[1:-1], *missing, *[pool] * (x.dim() - 2))
