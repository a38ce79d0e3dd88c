from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether calling one of these modules does more than its own forward and backward."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)
