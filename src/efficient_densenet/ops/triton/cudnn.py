"""Convolutions with a window by cuDNN between passes of ours, where a device's line in `tiles` says so.

Each part runs when the one before has been started: an operation of `launch` begins only at its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_densenet.ops.convolution import convolve, convolve_backward
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics
from efficient_densenet.ops.triton import launch, moments
from efficient_densenet.ops.triton.rectifier import rectify, rectify_backward


def norm_relu_conv(x: Tensor, norm: Affine, weight: Tensor, out: Tensor, pool: int, into: Statistics | None) -> None:
    """Four kernels of ours and of PyTorch: rectify, convolve, copy into the slice; the statistics, which are two.

    Bytes, for M pixels, C channels and O outputs: ``M·(3C + 3O)``, with statistics ``M·(3C + 4O)``.
    """
    assert pool == 1
    with launch.operation(x.device):
        s = rectify(x, norm)
    out.copy_(convolve(s, weight.to(x.dtype)))
    if into:
        moments.statistics(out, into)


def norm_relu_conv_backward(operands: BackwardOperands) -> tuple[Tensor | None, Tensor, Tensor]:
    """Rectify again, both gradients of the convolution, and the way back through the rectifier with its sums.

    Bytes: ``M·(8C + 2O)``, and one C more where the gradient is added to one that is there.
    """
    x, norm, weight = operands.x, operands.norm, operands.weight
    with launch.operation(x.device):
        s = rectify(x, norm)
    g, grad_weight = convolve_backward(operands.grad_out.to(x.dtype), s, weight.to(x.dtype), operands.need_weight)
    of_norm = rectify_backward(g, x, norm, operands.grad_x, operands.accumulate, operands.through)
    # In the weight's own type and layout.
    return torch.empty_like(weight).copy_(grad_weight) if operands.need_weight else None, *of_norm
