"""What must still be as it was when a plan was made: found at every call, and therefore in one quick pass."""

from __future__ import annotations

import functools
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from efficient_densenet.execution.plan import parts

_PLAIN = frozenset({
    *(int, float, bool, str, bytes, complex, type(None), tuple, frozenset, torch.dtype, torch.device, torch.Size),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial, type),
})  # fmt: skip
CONTAINERS = frozenset({list, dict, set, deque, OrderedDict, defaultdict, Counter})
# What replicas have, and what PyTorch itself keeps in these.
_NOT_COMPARED = frozenset({
    *("_is_replica", "_former_parameters", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    *("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks"),
    *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_is_full_backward_hook"),
    *("_compiled_call_impl", "_is_hf_initialized"),
})  # fmt: skip
_OF_TORCH = "torch.nn.modules."


def conditions(roots: Sequence[nn.Module], without: nn.Module | None = None) -> tuple[list[nn.Module], tuple[Any, ...]]:
    """All modules in `roots` (in the order of `plan.parts`), and what their forward may depend on.

    What is in `without`, and itself, is left out.

    That is their classes, how they are nested and shared, and all plain attributes: numbers, flags, strings and
    functions, of modules and of their classes, `training` among them, and lists and dictionaries of these.
    """
    found: list[Any] = []
    order: dict[nn.Module, int] = {}
    stack: list[nn.Module] = [*roots][::-1]
    kinds: set[type] = set()
    while stack:
        module = stack.pop()
        if module in order:
            found.append(order[module])
            continue
        order[module] = len(order)
        kind = type(module)
        kind = kind.__dict__.get("original", kind)
        found.append(kind)
        for name, value in module.__dict__.items():
            of = type(value)
            if of in _PLAIN:
                if name not in _NOT_COMPARED:
                    found.append(name)
                    found.append(value)
            elif of in CONTAINERS and value and name not in _NOT_COMPARED:
                found.append(name)
                found.append(frozen(value))
        if kind not in kinds:
            kinds.add(kind)
            for base in kind.__mro__:
                if base is nn.Module:
                    break
                if not base.__module__.startswith(_OF_TORCH):
                    for name, value in base.__dict__.items():
                        if type(value) in _PLAIN and not name.startswith("__"):
                            found.append(value)
        children = module._modules
        found.append(len(children))
        for child in list(children.values())[::-1]:
            if child is not None and child is not without:
                stack.append(child)
    return list(order), tuple(found)


def compared(module: nn.Module) -> list[str]:
    """The names of the attributes of `module` that are among its `conditions`."""
    kinds = _PLAIN | CONTAINERS
    return [name for name, value in module.__dict__.items() if type(value) in kinds and name not in _NOT_COMPARED]


def frozen(value: Any) -> Any:
    """A plain container as it is now; of what is not plain in it, the type alone."""
    if type(value) in _PLAIN:
        return value
    if type(value) not in CONTAINERS:
        return type(value)
    if isinstance(value, dict):
        return tuple([(k, frozen(v)) for k, v in value.items()])
    return tuple([frozen(v) for v in value])


def hooked(modules: Sequence[nn.Module]) -> bool:
    """Whether calling one of these does more than its own forward and backward."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
        if "_compiled_call_impl" in m.__dict__ and m.__dict__["_compiled_call_impl"] is not None:
            return True
    return False


def compiled_within(roots: Sequence[nn.Module]) -> str | None:
    """Why nothing that these make may be forgotten, if that is for a compiler to decide."""
    if any(module.__dict__.get("_compiled_call_impl") is not None for module in parts(roots)):
        return "a module inside it is compiled by itself"
    return None


def hooked_globally() -> bool:
    """Whether there are hooks on all modules of the process."""
    here = nn.modules.module
    return bool(
        here._global_forward_hooks
        or here._global_forward_pre_hooks
        or here._global_backward_hooks
        or here._global_backward_pre_hooks
    )
