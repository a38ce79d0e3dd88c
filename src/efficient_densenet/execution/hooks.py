"""Whether calling a module does what its class says, and nothing else; and how to call it on trial."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(modules: Iterable[nn.Module], inside: bool = False) -> bool:
    """Whether calling one of these modules, or one `inside` them, does more than its own forward and backward."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
        if inside and m._modules and has_hooks((c for c in m._modules.values() if c is not None), True):
            return True
    return False


def runs(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling `module` runs the forward of one of these classes, not one of a subclass or of its own."""
    forward = type(module).forward
    return "forward" not in module.__dict__ and any(forward is kind.forward for kind in kinds)


@contextmanager
def no_hooks(block: nn.Module) -> Iterator[None]:
    """Without the hooks of all modules inside, which are for the user's own calls."""
    kept = [(m, name, getattr(m, name)) for m in block.modules() for name in _HOOKS]
    for module, name, _ in kept:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)


@contextmanager
def modes_kept(block: nn.Module) -> Iterator[None]:
    """Whatever happens meanwhile, all modules inside are in training or evaluation afterwards as they were before."""
    kept = [(module, module.training) for module in block.modules()]
    try:
        yield
    finally:
        for module, training in kept:
            module.training = training
