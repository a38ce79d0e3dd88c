"""Whether calling a module does what its class says, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether calling one of these modules does more than its own forward and backward."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def runs(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling `module` runs the forward of one of these classes, not one of a subclass or of its own."""
    forward = type(module).forward
    return "forward" not in module.__dict__ and any(forward is kind.forward for kind in kinds)
