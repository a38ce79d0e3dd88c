"""The stem's norm, relu and max pool, keeping their input alone: forward and backward, on tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from efficient_densenet import ops
from efficient_densenet.execution.buffers import beside, room
from efficient_densenet.execution.norms import Norm, ThroughStatistics, blank, rows
from efficient_densenet.execution.synchronise import all_statistics


def forward(x: Tensor, norm: Norm, group: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``max_pool(relu(norm(x)))`` of ``x: (N, C, *spatial)``; with mean, variance and count of the batch."""
    source = _channels_last(x)
    run = ops.backend(source)
    local = run.statistics(source) if norm.uses_batch else blank(source)
    mean, variance, count = all_statistics(local, rows(source), group)
    affine = norm.affine((mean, variance))
    output = room(x, x.shape[1], [(n + 1) // 2 for n in x.shape[2:]])
    run.norm_relu_max_pool(source, affine.scale, affine.shift, output.movedim(1, -1))
    return output, mean, variance, count


def backward(
    grad_out: Tensor, x: Tensor, norm: Norm, statistics: Sequence[Tensor], group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, and of the norm's weight and bias, from the output's and what `forward` returned."""
    mean, variance, count = statistics
    source = _channels_last(x)
    affine = norm.affine((mean, variance))
    grad = beside(source)
    g, g_centred = ops.backend(source).norm_relu_max_pool_backward(
        grad_out.movedim(1, -1), source, affine.scale, affine.shift, affine.mean, grad
    )
    if norm.uses_batch:
        through = ThroughStatistics(mean, count, group)
        through.add(affine, g, g_centred)
        through.subtract(grad, source, slice(None), grad)
    return grad.movedim(-1, 1), *norm.parameter_gradients(affine, g, g_centred)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous()
