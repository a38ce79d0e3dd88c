"""The fused norm–relu–convolution and its statistics: tensors in, tensors out.

`reference` defines the operations; every backend is a module (or object) with functions of the same names and meaning.
`backend` chooses: at present there is one, plain PyTorch, which runs on any device.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from efficient_densenet.ops import eager


def backend(x: Tensor) -> ModuleType:
    """The backend for activations like `x`."""
    return eager
