"""The operations of `reference` on a GPU, as Triton kernels: prologue, product, epilogue in one pass each.

What each kernel computes and moves is written beside it: `forward`, `backward`, `max_pool`, `moments`. Products and
sums are accumulated in float32; sums over rows are made of partial sums of fixed blocks, merged in a fixed order, so
that results repeat bit for bit. Triton is imported at the first use.

No part is handed to cuDNN so far; `tiles.BY_PYTORCH` is the place to say so, and why not yet.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from math import prod
from typing import Any

import torch
from torch import Tensor

from efficient_densenet.ops import eager
from efficient_densenet.ops.convolution import row_stride
from efficient_densenet.ops.reference import Statistics
from efficient_densenet.ops.triton.tiles import BY_PYTORCH

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 2**31 - 1  # rows and columns are counted in 32 bits


def supports(x: Tensor) -> bool:
    """Whether activations like `x` run here. Says once why those of a GPU do not."""
    if not x.is_cuda:
        return False
    reason = _obstacle(x.device, x.dtype)
    if reason:
        _warn(reason)
    return not reason


def available() -> str:
    """In words, for people."""
    if not _installed():
        return "plain PyTorch: triton is not installed"
    return "Triton kernels for float32, bfloat16 and float16; plain PyTorch for other types"


def norm_relu_conv(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, out: Tensor, pool: int = 1, want_statistics: bool = False
) -> Statistics | None:
    if _by_pytorch("forward", weight) or not _covered(x, out, weight, pool):
        return eager.norm_relu_conv(x, scale, shift, weight, out, pool, want_statistics)
    from efficient_densenet.ops.triton import forward

    scale, shift = _vectors(scale, shift)
    return forward.norm_relu_conv(x, scale, shift, weight, out, pool, want_statistics)


def norm_relu_conv_backward(
    grad_out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    accumulate: bool,
    pool: int = 1,
    need_weight: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    if _by_pytorch("backward", weight) or not _covered(x, grad_x, weight, pool):
        return eager.norm_relu_conv_backward(
            grad_out, x, scale, shift, mean, weight, grad_x, accumulate, pool, need_weight
        )
    from efficient_densenet.ops.triton import backward

    scale, shift, mean = _vectors(scale, shift, mean)
    return backward.norm_relu_conv_backward(
        grad_out, x, scale, shift, mean, weight, grad_x, accumulate, pool, need_weight
    )


def norm_relu_max_pool(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    if not _covered(x, out):
        return eager.norm_relu_max_pool(x, scale, shift, out)
    from efficient_densenet.ops.triton import max_pool

    scale, shift = _vectors(scale, shift)
    return max_pool.norm_relu_max_pool(x, scale, shift, out)


def norm_relu_max_pool_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, grad_x: Tensor
) -> tuple[Tensor, Tensor]:
    if not _covered(x, grad_x):
        return eager.norm_relu_max_pool_backward(grad_out, x, scale, shift, mean, grad_x)
    from efficient_densenet.ops.triton import max_pool

    scale, shift, mean = _vectors(scale, shift, mean)
    return max_pool.norm_relu_max_pool_backward(grad_out, x, scale, shift, mean, grad_x)


def statistics(x: Tensor) -> Statistics:
    if not _covered(x, x):
        return eager.statistics(x)
    from efficient_densenet.ops.triton import moments

    return moments.statistics(x)


def finish(grad: Tensor, x: Tensor, mean: Tensor, constant: Tensor, slope: Tensor, out: Tensor) -> None:
    if not _covered(x, out):
        return eager.finish(grad, x, mean, constant, slope, out)
    from efficient_densenet.ops.triton import moments

    mean, constant, slope = _vectors(mean, constant, slope)
    return moments.finish(grad, x, mean, constant, slope, out)


def _by_pytorch(what: str, weight: Tensor) -> bool:
    return (what, prod(weight.shape[2:])) in BY_PYTORCH


def _covered(x: Tensor, out: Tensor, weight: Tensor | None = None, pool: int = 1) -> bool:
    """Whether the kernels have this shape; plain PyTorch takes the others, with a warning where that may be slow."""
    if not x.numel() or not out.numel():
        return False
    reason = ""
    if row_stride(out) is None:
        reason = "the output is no slice of the channels of a channels-last tensor"
    elif max(x.numel() // x.shape[-1], out.numel() // out.shape[-1]) > _MOST:
        reason = "there are 2³¹ pixels or more"
    elif weight is not None:
        kernel = list(weight.shape[2:])
        if any(k % 2 == 0 for k in kernel):
            reason = f"the kernel's size {kernel} is not odd"
        elif pool > 1 and max(kernel) > 1:
            reason = f"there is a pool of {pool} before a kernel of size {kernel}"
    if reason:
        _warn(reason)
    return not reason


def _vectors(*vectors: Tensor) -> Any:
    """Constants per channel as the kernels read them."""
    return [v.to(torch.float32).contiguous() for v in vectors]


@functools.cache  # PyTorch takes microseconds to say what a device can do, and is asked for each operation
def _obstacle(device: torch.device, dtype: torch.dtype) -> str:
    if dtype not in _TYPES:
        return f"there are none for {dtype}"
    if not _installed():
        return "triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than they need (compute capability 8.0)"
    return ""


def _installed() -> bool:
    if "installed" not in _state:
        _state["installed"] = importlib.util.find_spec("triton") is not None
    return _state["installed"]


def _warn(reason: str) -> None:
    if not _state.get("warned"):
        _state["warned"] = True
        warnings.warn(f"plain PyTorch runs instead of the Triton kernels, more slowly: {reason}", stacklevel=4)


_state: dict[str, Any] = {}
