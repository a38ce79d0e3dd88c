"""The operations that a dense block is made of, as they are defined: plain PyTorch, on whole tensors, any device.

This is what tests, other backends and benchmarks compare with. The mathematics is derived in docs/algorithm.md.

Layout: activations are channels-last matrices ``(N, *spatial, C)`` with 1, 2 or 3 spatial dimensions. An activation may
be a slice of the channels of a larger tensor (its rows are then further apart than ``C``); weights are PyTorch's
``(out channels, in channels, *kernel)``, stride 1, padded by half the kernel, so that the resolution stays. `scale`,
`shift`, `mean` and the sums have shape ``(C,)``, in float32 or, for float64 activations, in float64.

The rectified prefix ``s = relu(scale·x + shift)`` is the prologue of every operation, and is never stored: backward
computes it again from `x`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


Statistics = tuple[Tensor, Tensor]
"""Mean and biased variance of each channel, ``(C,)`` each."""


def norm_relu_conv(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, out: Tensor, pool: int = 1, want_statistics: bool = False
) -> Statistics | None:
    """``out = conv(average_pool(relu(scale·x + shift)))``.

    A 1×1 convolution and an average pool commute; pooling first spares three quarters of the multiplications.

    Args:
        x: ``(N, *spatial, C)``.
        scale, shift: ``(C,)``.
        weight: ``(O, C, *kernel)``.
        out: ``(N, *spatial // pool, O)``, is overwritten.
        pool: window and stride of the average pool; 1: none.
        want_statistics: whether to return the statistics of `out`.
    """
    out.copy_(_last(_convolve(_prologue(x, scale, shift), weight, pool)))
    return statistics(out) if want_statistics else None


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
    """The backward pass of `norm_relu_conv`, short of what flows through the batch statistics.

    With ``g`` the gradient at the rectifier's input (zero where it cut off): ``grad_x += scale·g`` (or ``=``).

    Returns:
        The gradient of the weight (None if not needed), ``Σ g`` and ``Σ g·(x − mean)`` per channel.
    """
    with torch.enable_grad():
        s = _prologue(x, scale, shift).detach().requires_grad_()
        w = weight.detach().requires_grad_(need_weight)
        out = _convolve(s, w, pool)
        wanted = [s, w] if need_weight else [s]
        grads = torch.autograd.grad(out, wanted, _first(grad_out))
    g = _last(grads[0] * (s > 0))
    return grads[1] if need_weight else None, *_accumulate(g, x, scale, mean, grad_x, accumulate)


def norm_relu_max_pool(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """``out = max_pool(relu(scale·x + shift))`` with window 3, stride 2, padding 1: the stem of an ImageNet network.

    Args:
        x: ``(N, *spatial, C)``.
        out: ``(N, *⌈spatial/2⌉, C)``, is overwritten.
    """
    out.copy_(_last(MAX_POOL[x.dim() - 2](_prologue(x, scale, shift), 3, 2, 1)))


def norm_relu_max_pool_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, grad_x: Tensor
) -> tuple[Tensor, Tensor]:
    """The backward pass of `norm_relu_max_pool`: ``grad_x = scale·g``; returns ``Σ g`` and ``Σ g·(x − mean)``."""
    with torch.enable_grad():
        s = _prologue(x, scale, shift).detach().requires_grad_()
        (grad,) = torch.autograd.grad(MAX_POOL[x.dim() - 2](s, 3, 2, 1), s, _first(grad_out))
    return _accumulate(_last(grad * (s > 0)), x, scale, mean, grad_x, accumulate=False)


def statistics(x: Tensor) -> Statistics:
    """Mean and biased variance of each channel of ``x: (N, *spatial, C)``."""
    rows = x.reshape(-1, x.shape[-1]).to(statistics_dtype(x.dtype))
    variance, mean = torch.var_mean(rows, 0, correction=0)
    return mean, variance


def merge(means: Tensor, variances: Tensor, counts: Tensor) -> Statistics:
    """The statistics of several parts taken together, from those of the parts (Chan, Golub, LeVeque, 1979).

    Squares of differences alone are summed, so nothing cancels.

    Args:
        means, variances: ``(parts, C)``.
        counts: ``(parts,)``, values per channel of each part.
    """
    share = (counts / counts.sum()).unsqueeze(1)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


def finish(grad: Tensor, x: Tensor, mean: Tensor, constant: Tensor, slope: Tensor, out: Tensor) -> None:
    """Add what flows through the batch statistics, for a slice of channels: ``grad − constant − slope·(x − mean)``.

    Args:
        grad, x: ``(N, *spatial, C)``.
        mean, constant, slope: ``(C,)``.
        out: of the shape of `grad`, is overwritten; it may be `grad` itself.
    """
    out.copy_(grad - constant - slope * (x - mean))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics and sums of activations of this type are held."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _prologue(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return _first(torch.relu(x * scale + shift).to(x.dtype))


def _convolve(s: Tensor, weight: Tensor, pool: int) -> Tensor:
    dims = s.dim() - 2
    if pool > 1:
        s = AVERAGE_POOL[dims](s, pool)
    return _CONVOLUTION[dims](s, weight, padding=[k // 2 for k in weight.shape[2:]])


def _accumulate(
    g: Tensor, x: Tensor, scale: Tensor, mean: Tensor, grad_x: Tensor, accumulate: bool
) -> tuple[Tensor, Tensor]:
    g = g.to(scale.dtype)
    if not accumulate:
        grad_x.zero_()
    grad_x.copy_(grad_x + scale * g)
    rows = tuple(range(x.dim() - 1))
    return g.sum(rows), (g * (x - mean)).sum(rows)


def _first(x: Tensor) -> Tensor:
    """Channels first, as PyTorch's own operations want them: a view."""
    return x.movedim(-1, 1)


def _last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)
