"""What must still be as it was when a plan was made: found at every call, and therefore in one quick pass."""

from __future__ import annotations

import functools
import types
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

PLAIN = frozenset({
    *(int, float, bool, str, bytes, complex, type(None), tuple, frozenset, torch.dtype, torch.device, torch.Size),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial, type),
})  # fmt: skip
# What PyTorch and this library keep in a module besides what its class wants there, and what replicas have.
OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"} | {
    *("adoption", "_is_replica", "_former_parameters", "_compiled_call_impl", "_is_hf_initialized")
}  # fmt: skip
MOST_LOOKS = 50  # how many conditions are met before it is given up to look again
OF_TORCH = "torch.nn.modules."
_OF_CLASSES = frozenset({property, classmethod, staticmethod})
_LAZY = frozenset({UninitializedParameter, UninitializedBuffer})  # which have no shape yet
_NO_DATA = (Tensor, nn.Module, type, types.ModuleType)
_CONTAINERS = dict | list | tuple | set | deque
DEPTH = 6  # of namespaces, dataclasses and containers in one another
_MOST_VALUES = 1000


def conditions(
    roots: Sequence[nn.Module], without: nn.Module | None = None
) -> tuple[list[nn.Module], list[Tensor], tuple[Any, ...]]:
    """All modules in `roots` (in the order of `plan.parts`), all their tensors, and what their forward may depend on.

    What is in `without`, and itself, is left out.

    That is their classes, how they are nested and shared, the shapes of their tensors, and all plain attributes:
    numbers, flags, strings and functions, of modules and of their classes, `training` among them, and such values in
    containers and objects (see `frozen`).
    """
    found: list[Any] = []
    tensors: list[Tensor] = []
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
        shapes: dict[str, Any] = {}  # of replicas and of sharded modules, the parameters are plain attributes
        held = module.__dict__
        for name in _own(tuple(held)):
            value = held[name]
            if type(value) in PLAIN:
                found += name, value
            elif isinstance(value, Tensor):
                shapes[name] = value.shape
                tensors.append(value)
            else:
                found += name, frozen(value)
        for some in (held["_parameters"], held["_buffers"]):
            for name, tensor in some.items():
                if tensor is not None and type(tensor) not in _LAZY:
                    shapes[name] = tensor.shape
                    tensors.append(tensor)
        found.append(shapes)
        if kind not in kinds:
            kinds.add(kind)
            for base in kind.__mro__:
                if base is nn.Module:
                    break
                if not base.__module__.startswith(OF_TORCH):
                    for name, value in base.__dict__.items():
                        if not name.startswith("__"):
                            of = type(value)
                            if of in PLAIN:
                                found.append(value)
                            elif of not in _OF_CLASSES:
                                found.append(frozen(value))
        children = module._modules
        found.append(len(children))
        for child in list(children.values())[::-1]:
            if child is not None and child is not without:
                stack.append(child)
    return list(order), tensors, tuple(found)


@functools.lru_cache(maxsize=1024)
def _own(names: tuple[str, ...]) -> tuple[str, ...]:
    """Of the names of a module's attributes, those that not every module has."""
    return tuple([name for name in names if name not in OF_EVERY_MODULE])


def compared(module: nn.Module) -> list[str]:
    """The names of the plain attributes of `module` that are among its `conditions`."""
    return [name for name, value in module.__dict__.items() if type(value) in PLAIN and name not in OF_EVERY_MODULE]


def frozen(value: Any, depth: int = DEPTH) -> Any:
    """A plain value as it is; a container or an object with what is plain in it; of anything else, the type alone.

    Args:
        value: what an attribute holds.
        depth: how many levels to look into, see `levels`. What has more than a thousand entries is not looked into.
    """
    kind = type(value)
    if kind in PLAIN or isinstance(value, Number | Enum | str):
        return value
    if kind.__module__ == "numpy" and getattr(value, "nbytes", _MOST_VALUES) < _MOST_VALUES:
        return value.tobytes()
    entries = contents(value, depth)
    if entries is None:
        return kind
    depth -= levels(value)
    if isinstance(entries, dict):
        return kind, tuple([(k, v if type(v) in PLAIN else frozen(v, depth)) for k, v in entries.items()])
    return kind, tuple([v if type(v) in PLAIN else frozen(v, depth) for v in entries])


def contents(value: Any, depth: int = DEPTH) -> Any:
    """A container itself, the attributes of an object that is not a module or a tensor, or None: not looked into."""
    if type(value) in PLAIN or isinstance(value, _NO_DATA):
        return None
    inside = value if isinstance(value, _CONTAINERS) else getattr(value, "__dict__", None)
    return inside if inside is not None and len(inside) <= _MOST_VALUES and levels(value) <= depth else None


def levels(value: Any) -> int:
    """How many levels it counts for: an object of any other class may refer to half of a program."""
    data = isinstance(value, _CONTAINERS | types.SimpleNamespace | Namespace) or is_dataclass(value)
    return 1 if data else DEPTH // 2


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether calling one of these does more than its own forward and backward."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
        if "_compiled_call_impl" in m.__dict__ and compiled(m):
            return True
    return False


def compiled(module: nn.Module) -> bool:
    """Whether it is compiled by itself, as `torch.nn.Module.compile` does it."""
    return module.__dict__.get("_compiled_call_impl") is not None


def hooked_globally() -> bool:
    """Whether there are hooks on all modules of the process."""
    here = nn.modules.module
    return bool(
        here._global_forward_hooks
        or here._global_forward_pre_hooks
        or here._global_backward_hooks
        or here._global_backward_pre_hooks
    )
