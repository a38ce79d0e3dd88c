"""The operations of `Backend` on a CPU: each is one kernel, or PyTorch's convolution between passes of one loop each.

Where the rule in `instructions` says so, a norm–relu–convolution is one kernel (`convolve.h`): the rectified prefix is
made a few lines at a time in a scratch that stays in the cache, and consumed by the product from there. Elsewhere the
convolution is PyTorch's, and the prefix lives in a scratch tensor of a few megabytes, as in `eager`; the passes before
and after it (`loops.h`, `average_pool.h`) read and write what they must, once. Sums are added up in double precision,
in an order that depends on the shapes and the number of threads alone.

Bytes moved per value of the prefix: forward reads x; backward reads x and D and writes D.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from efficient_densenet.ops import eager
from efficient_densenet.ops.convolution import convolve, convolve_backward, convolve_pooled, gradient_like
from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.cpu.instructions import convolutions
from efficient_densenet.ops.cpu.layers import run_layers, run_layers_backward  # noqa: F401 (operations of this backend)
from efficient_densenet.ops.cpu.library import load
from efficient_densenet.ops.cpu.tensors import (
    affine_of,
    convolution_of,
    kernels_for,
    own_convolution,
    rows_of,
    volume_of,
)
from efficient_densenet.ops.layout import pieces, row_stride
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
        ours, reason = convolutions(loaded.instructions, dtype, loaded.pytorch)
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
    kernels_for(into.scale).fold_norm(*pointers[:4], eps, len(into.scale), *pointers[4:])


def norm_relu_conv(
    x: Tensor, norm: Affine, weight: Tensor, out: Tensor, pool: int = 1, into: Statistics | None = None
) -> None:
    moments = _zeros(out) if into else None
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
    sums = _zeros(operands.x)
    done, grad_weight = _convolve_backward(operands, sums) if operands.pool == 1 else (False, None)
    if not done:
        grad_weight = _backward_in_passes(operands, sums)
    return grad_weight, *eager.norm_gradients(operands.norm, sums, operands.through)


def _convolve(x: Tensor, norm: Affine, weight: Tensor, out: Tensor, moments: Tensor | None) -> bool:
    """The whole operation without a pool in one kernel; False where there is none, or it leaves this to PyTorch."""
    kernels = own_convolution(x, weight)
    return kernels is not None and kernels.convolve(
        rows_of(x), convolution_of(x, weight), weight.data_ptr(), affine_of(norm),
        rows_of(out), None if moments is None else moments.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def _convolve_backward(operands: BackwardOperands, sums: Tensor) -> tuple[bool, Tensor | None]:
    """The backward pass of `_convolve`: whether it is done, and the weight's gradient; the sums go to `sums`."""
    grad_out, x, norm, weight, grad_x, accumulate, _, _, need_weight = operands
    kernels = own_convolution(x, weight)
    if kernels is None:
        return False, None
    grad_weight = torch.empty_like(weight) if need_weight else None
    done = kernels.convolve_backward(
        rows_of(grad_out), rows_of(x), convolution_of(x, weight), weight.data_ptr(),
        affine_of(norm), rows_of(grad_x), accumulate,
        None if grad_weight is None else grad_weight.data_ptr(), sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return bool(done), grad_weight


def _backward_in_passes(operands: BackwardOperands, sums: Tensor) -> Tensor | None:
    """The product between the passes, by PyTorch unless a pool comes before it; the sums go to `sums`."""
    grad_out, x, norm, weight, grad_x, accumulate, _, pool, need_weight = operands
    grad_weight, identity = None, _identity(norm)
    operands.clear_outside_windows()
    for images, scratch in pieces(x):
        piece, grad = x[images], grad_out[images]
        s = _prologue(piece, norm, pool, scratch)
        done = False
        if pool > 1:
            g = torch.empty_like(s)
            product = BackwardOperands(grad, s, identity, weight, g, False, None, need_weight=need_weight)
            done, gw = _convolve_backward(product, torch.zeros_like(sums))
        if not done:
            g, gw = convolve_backward(grad, s, weight, need_weight)
        if need_weight:
            assert gw is not None
            gw = gw.to(norm.scale.dtype)
            grad_weight = gw if grad_weight is None else grad_weight.add_(gw)
        _accumulate(g, piece, norm, grad_x[images], accumulate, pool, sums)
    return gradient_like(grad_weight, weight) if need_weight else None


def _identity(norm: Affine) -> Affine:
    """A norm that changes nothing, of as many channels."""
    zero, one = torch.zeros_like(norm.mean), torch.ones_like(norm.mean)
    return Affine(zero, one, one, zero)


def norm_relu_max_pool(x: Tensor, norm: Affine, out: Tensor) -> None:
    if not len(x):
        return
    kernels_for(x).max_pool(
        rows_of(x), volume_of(x, 3), x.shape[-1], affine_of(norm), rows_of(out),
        None, torch.get_num_threads(),
    )  # fmt: skip


def norm_relu_max_pool_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not len(x):
        return eager.norm_relu_max_pool_backward(grad_out, x, norm, grad_x, through)
    volume, channels, threads = volume_of(x, 3), x.shape[-1], torch.get_num_threads()
    if row_stride(grad_out) is None:
        grad_out = grad_out.contiguous()
    argmax = grad_out.new_empty(grad_out.shape, dtype=torch.uint8)  # the tap of each window, of each channel
    sums = _zeros(x)
    kernels_for(x).max_pool(
        rows_of(x), volume, channels, affine_of(norm), library.Rows(), argmax.data_ptr(),
        threads,
    )  # fmt: skip
    kernels_for(x).max_pool_backward(
        rows_of(grad_out), argmax.data_ptr(), rows_of(x), volume, channels,
        affine_of(norm), rows_of(grad_x), sums.data_ptr(), threads,
    )  # fmt: skip
    return eager.norm_gradients(norm, sums, through)


def norm_relu_mean(x: Tensor, norm: Affine, out: Tensor) -> None:
    kernels_for(x).mean(
        rows_of(x), *_images(x), affine_of(norm), rows_of(out),
        torch.get_num_threads(),
    )  # fmt: skip


def norm_relu_mean_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    sums = _zeros(x)
    kernels_for(x).mean_backward(
        rows_of(grad_out.contiguous()), rows_of(x), *_images(x),
        affine_of(norm), rows_of(grad_x), sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return eager.norm_gradients(norm, sums, through)


def statistics(x: Tensor, into: Statistics) -> None:
    moments = _zeros(x)
    _copy_moments(x, None, moments)
    _put(moments, into)


def finish(grad: Tensor, x: Tensor, mean: Tensor, through: Tensor, count: Tensor, out: Tensor) -> None:
    channels = x.shape[-1]
    rows = x.numel() // channels
    constant, slope = through / count
    kernels_for(x).finish(
        rows_of(grad), rows_of(x), rows, channels, *_constants(mean, constant, slope), rows_of(out),
        torch.get_num_threads(),
    )  # fmt: skip


def _prologue(x: Tensor, norm: Affine, pool: int, scratch: Tensor) -> Tensor:
    """``average_pool(relu(scale·x + shift))`` in the scratch tensor."""
    channels, threads = x.shape[-1], torch.get_num_threads()
    if pool == 1:
        kernels_for(x).prologue(
            rows_of(x), x.numel() // channels, channels, affine_of(norm), scratch.data_ptr(), threads
        )
        return scratch
    pooled = x.new_empty((x.shape[0], *(n // pool for n in x.shape[1:-1]), channels))
    kernels_for(x).prologue_pool(rows_of(x), volume_of(x, pool), channels, affine_of(norm), pooled.data_ptr(), threads)
    return pooled


def _accumulate(g: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, accumulate: bool, pool: int, sums: Tensor) -> None:
    kernels = kernels_for(x)
    channels = x.shape[-1]
    run = kernels.accumulate if pool == 1 else kernels.accumulate_pool
    size = x.numel() // channels if pool == 1 else volume_of(x, pool)
    run(
        g.data_ptr(), rows_of(x), size, channels, affine_of(norm),
        rows_of(grad_x), accumulate, sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def _zeros(x: Tensor) -> Tensor:
    """Two sums or moments for each channel, ``(2, C)``, in double precision."""
    return x.new_zeros((2, x.shape[-1]), dtype=torch.float64)


def _copy_moments(x: Tensor, out: Tensor | None, moments: Tensor | None, before: int = 0) -> int:
    """Copy `x` to `out`, if given, and add it to the moments of `before` rows, if wanted; return the rows so far."""
    channels = x.shape[-1]
    rows = x.numel() // channels
    kernels_for(x).copy_moments(
        rows_of(x), rows, channels, library.Rows() if out is None else rows_of(out),
        None if moments is None else moments.data_ptr(), before, torch.get_num_threads(),
    )  # fmt: skip
    return before + rows


def _put(moments: Tensor | None, into: Statistics | None) -> None:
    if moments is not None and into is not None:
        into.mean.copy_(moments[0])
        into.variance.copy_(moments[1])


def _constants(*vectors: Tensor) -> list[int]:
    pointers = []
    for vector in vectors:
        assert vector.is_contiguous()
        pointers.append(vector.data_ptr())
    return pointers


def _images(x: Tensor) -> tuple[int, int, int]:
    """Images, pixels of each, and channels."""
    return x.shape[0], prod(x.shape[1:-1]), x.shape[-1]
