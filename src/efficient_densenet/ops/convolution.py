"""The convolutions between the fused passes, by PyTorch itself, and the pieces of a batch that they run on.

On a CPU they are oneDNN's. Where kernels of our own are faster, `cpu` does not come here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from math import ceil, prod

import torch
from torch import Tensor

_aten = torch.ops.aten
# Bytes of the scratch tensor. A CPU's is to stay in the cache; elsewhere fewer, larger pieces are better.
SCRATCH = {"cpu": 4 << 20}
_SCRATCH_ELSEWHERE = 64 << 20
_CHANNELS_PER_SUM = 64


def pieces(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the images of ``x: (N, *spatial, C)``, each with a contiguous scratch tensor of its shape."""
    images = x.shape[0]
    if not images:
        return
    bytes_per_image = max(1, prod(x.shape[1:]) * x.element_size())
    most = max(1, SCRATCH.get(x.device.type, _SCRATCH_ELSEWHERE) // bytes_per_image)
    step = ceil(images / ceil(images / most))  # pieces of nearly one size
    scratch = torch.empty((step, *x.shape[1:]), dtype=x.dtype, device=x.device)
    for start in range(0, images, step):
        stop = min(start + step, images)
        yield slice(start, stop), scratch[: stop - start] if stop - start < step else scratch


def convolve(s: Tensor, weight: Tensor) -> Tensor:
    """``(n, *spatial, C)`` → ``(n, *spatial, O)``, contiguous; stride 1, padded so that the resolution stays."""
    return channels_last(_aten.convolution(channels_first(s), weight, None, *_geometry(weight))).contiguous()


def convolve_pooled(s: Tensor, weight: Tensor) -> Tensor:
    """`convolve` for a 1×1 window after an average pool, as a sum over groups of channels.

    In the ordinary network the pool comes after the convolution and averages its rounding errors too. Where it comes
    first, shorter sums make up for that.
    """
    groups = zip(s.split(_CHANNELS_PER_SUM, -1), weight.split(_CHANNELS_PER_SUM, 1), strict=True)
    return functools.reduce(torch.Tensor.add_, (convolve(*group) for group in groups))


def convolve_backward(grad_out: Tensor, s: Tensor, weight: Tensor, need_weight: bool) -> tuple[Tensor, Tensor]:
    """The gradients of `s`, contiguous, and of `weight` (undefined where it is not needed)."""
    g, grad_weight, _ = _aten.convolution_backward(
        channels_first(grad_out), channels_first(s), weight, None, *_geometry(weight), [True, need_weight, False]
    )
    return channels_last(g).contiguous(), grad_weight


def row_stride(x: Tensor) -> int | None:
    """The distance between the rows of ``x: (N, *spatial, C)``, if it is a slice of the channels of a whole tensor."""
    return stride_of_rows(x.shape, x.stride())


@functools.lru_cache(maxsize=4096)  # a network asks for the same few, thousands of times
def stride_of_rows(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """As `row_stride`, for such a shape and strides."""
    if shape[-1] > 1 and strides[-1] != 1:
        return None
    distance, rows = shape[-1], 1
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size > 1:
            if rows == 1:
                distance = stride
            if stride != distance * rows:
                return None
            rows *= size
    return distance


def channels_first(x: Tensor) -> Tensor:
    """``(n, *spatial, C)`` as PyTorch's own operations want it: a view."""
    return x.movedim(-1, 1)


def channels_last(x: Tensor) -> Tensor:
    """The view back."""
    return x.movedim(1, -1)


def _geometry(weight: Tensor) -> tuple:
    """Stride, padding, dilation, transposed, output padding and groups."""
    kernel = weight.shape[2:]
    ones = [1] * len(kernel)
    return ones, [k // 2 for k in kernel], ones, False, [0] * len(kernel), 1
