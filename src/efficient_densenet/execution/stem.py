"""The stem's norm, relu and max pool, keeping their input alone: forward and backward, on tensors."""

from __future__ import annotations

from torch import Tensor

from efficient_densenet.execution.buffers import empty_activation, empty_like
from efficient_densenet.execution.norms import Folded, Norm, Norms, empty_folded


def forward(x: Tensor, norm: Norm, group: str) -> tuple[Tensor, Folded]:
    """``max_pool(relu(norm(x)))`` of ``x: (N, C, *spatial)``; and the norm, folded."""
    source, channels = _channels_last(x), x.shape[1]
    folded = empty_folded(source, channels, channels)
    norms = Norms(source, [norm], [(0, channels)], folded, group)
    if norm.constants is None:
        norms.run.statistics(source, norms.statistics(0, channels))
        if group:
            norms.share(0, channels)
    output = empty_activation(x, channels, [(n + 1) // 2 for n in x.shape[2:]])
    norms.run.norm_relu_max_pool(source, norms.fold(0), output.movedim(1, -1))
    return output, folded


def backward(grad_out: Tensor, x: Tensor, norm: Norm, folded: Folded, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, and of the norm's weight and bias, from the output's and what `forward` returned."""
    source, channels = _channels_last(x), x.shape[1]
    norms = Norms(source, [norm], [(0, channels)], folded, group)
    norms.begin_backward()
    grad = empty_like(source)
    of_norm = norms.run.norm_relu_max_pool_backward(
        grad_out.movedim(1, -1), source, norms.affines[0], grad, norms.through_of(0)
    )
    norms.finish(grad, source, 0, channels, grad)
    return grad.movedim(-1, 1), *norms.parameter_gradients(0, *of_norm)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous()
