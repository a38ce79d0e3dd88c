"""Whether calling a module does what its class says, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether calling one of these modules does more than its own forward and backward."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def runs(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether calling `module` runs the forward of one of these classes: neither a subclass nor it itself has another."""
    forward = getattr(module.forward, "__func__", None)
    return any(isinstance(module, kind) and forward is kind.forward for kind in kinds)
