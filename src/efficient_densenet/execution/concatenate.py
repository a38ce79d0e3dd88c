"""The ordinary way, and the definition of what every other way must compute.

Saved for backward: the concatenation (by the norm), the activation (by the activation and the convolution).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def concat(inputs: Sequence[Tensor]) -> Tensor:
    """Join features ``(N, C_i, ...)`` along their channels; a single tensor is returned as it is."""
    return inputs[0] if len(inputs) == 1 else torch.cat(list(inputs), 1)


def norm_relu_conv(inputs: Sequence[Tensor], norm: nn.Module, relu: nn.Module, conv: nn.Module) -> Tensor:
    """``conv(relu(norm(concat(inputs))))`` with everything kept that autograd wants to keep."""
    return conv(relu(norm(concat(inputs))))
