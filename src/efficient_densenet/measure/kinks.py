"""Keep the activations of a network away from zero, where the gradient of a rectifier jumps.

An activation within rounding error of zero is cut off in one computation and passes in another. Both are right, but
their gradients differ by far more than rounding, in places that chance decides; to compare rounding errors, there must
be no such activation.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from efficient_densenet.measure.devices import Place

_CANDIDATES = 16  # values of a channel between which zero may come to lie


@torch.no_grad()
def move_zeros_into_gaps(network: nn.Module, images: Tensor, place: Place) -> None:
    """Shift the biases of all norms a little, so that zero lies in the middle of a wide gap of each channel's values.

    For float32 the distances are then thousands of times the rounding error; nothing comparable is possible in half
    precision. Running averages stay as they are.

    Args:
        network: in the mode, and with the random state, in which it will run.
        images: the share of the batch that belongs to `place`; gaps are those of all shares together.
    """
    exact = copy.deepcopy(network).double()
    norms = [module for module in exact.modules() if isinstance(module, _BatchNorm)]

    def shift(norm: Any, inputs: Any, output: Tensor) -> Tensor:
        change = _to_widest_gap(output.transpose(0, 1).flatten(1), place)
        norm.bias += change
        return output + change.view(-1, *[1] * (output.dim() - 2))

    for norm in norms:
        norm.register_forward_hook(shift)
    exact(images.double())
    for module, norm in zip((m for m in network.modules() if isinstance(m, _BatchNorm)), norms, strict=True):
        module.bias.copy_(norm.bias)


def _to_widest_gap(values: Tensor, place: Place) -> Tensor:
    """What to add to ``values: (C, M)`` of each channel."""
    near = _nearest_to_zero(torch.cat(place.gather(_nearest_to_zero(values)), dim=1)).sort(dim=1).values
    if near.shape[1] < 2:
        return torch.zeros_like(values[:, 0])
    gaps = near.diff(dim=1).nan_to_num(nan=0, posinf=0)
    width, lower = gaps.max(dim=1, keepdim=True)
    middle = near.gather(1, lower) + width / 2
    return -torch.where(width > 0, middle, 0).squeeze(1)


def _nearest_to_zero(values: Tensor) -> Tensor:
    """The distinct values nearest to zero; dropout makes many equal ones. Infinite where there are not enough."""
    values = values.sort(dim=1).values
    values[:, 1:].masked_fill_(values.diff(dim=1) == 0, torch.inf)
    indices = values.abs().topk(min(_CANDIDATES, values.shape[1]), dim=1, largest=False).indices
    return values.gather(1, indices)
