"""What modules are by their classes alone, where the question is not what they compute."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that it has, or had before it was adopted."""
    return type(module).__dict__.get("original", type(module))


def has_forward(module: nn.Module) -> bool:
    """Not a list or dictionary of modules, which nobody calls."""
    return getattr(type(module), "forward", None) is not nn.Module.forward


def runs_in_order(module: nn.Module) -> bool:
    """Whether it is a sequence that runs its parts one after the other, or was one before it was adopted."""
    forward = getattr(original_class(module), "forward", None)
    return forward is nn.Sequential.forward and "forward" not in vars(module)


def modules_of(sequence: nn.Module) -> list[nn.Module]:
    """What a sequence runs, in its order: `children` leaves out what comes a second time."""
    return [module for module in sequence._modules.values() if module is not None]


def is_plain_convolution(module: Any) -> bool:
    """Whether it computes what PyTorch's own convolutions do."""
    if not isinstance(module, CONVOLUTIONS) or {"forward", "_conv_forward"} & vars(module).keys():
        return False
    kinds = [(kind.forward, kind._conv_forward) for kind in CONVOLUTIONS]
    return (type(module).forward, type(module)._conv_forward) in kinds


def is_norm(module: nn.Module) -> bool:
    """A norm of PyTorch's, or one of another library with a weight for each channel."""
    if isinstance(module, _NORMS) or "norm" not in type(module).__name__.lower():
        return isinstance(module, _NORMS)
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1
