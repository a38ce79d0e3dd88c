"""Whether modules are as they were at an earlier call: by identity and equality, without asking what anything means.

All that `conditions` and `unsuitable` find depends on what is compared here. Where it may also depend on what is inside
of an object, a list for example, nothing is remembered, and every call looks anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_, itemgetter, methodcaller
from typing import Any

from torch import Tensor, nn

from efficient_densenet.adopt.conditions import OF_EVERY_MODULE, OF_TORCH, PLAIN

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_CLASSES = PLAIN | {property, classmethod, staticmethod}
_TENSORS = frozenset({Tensor, nn.Parameter, type(None)})
_CONTENTS = ("_parameters", "_buffers", "_modules")
_values, _contents = methodcaller("values"), itemgetter(*_CONTENTS)


class Unchanged:
    """Modules as they are now.

    The first of them, which may own this object, is not kept: it would keep itself alive.

    Attributes:
        others: all modules but the first, in the order of `plan.parts`.
        tensors: all their parameters and buffers but the counters of batches, whose memory nobody keeps.
    """

    def __init__(self, modules: Sequence[nn.Module], roots: Sequence[nn.Module], own_hooks: bool) -> None:
        self.others, self.roots, self.own_hooks = list(modules[1:]), list(roots[1:]), own_hooks
        self.kinds = [*map(type, modules)]
        classes = dict.fromkeys(chain.from_iterable(kind.__mro__ for kind in self.kinds))
        self.classes = [vars(kind) for kind in classes if not kind.__module__.startswith((OF_TORCH, "builtins"))]
        # All attributes of a module are compared at once; an equal value in another object is no change. Dictionaries,
        # and the tensors and modules in them, are compared by identity.
        self.attributes = [*map(vars, self.others)]
        self.copies = [*map(dict.copy, self.attributes)]  # which share their keys
        self.dictionaries = [*chain.from_iterable(map(_contents, self.attributes))]
        held = [*self.dictionaries, *self.classes]
        # Half of them are empty, and it takes a fraction of the time to see that they still are. So are all hooks.
        self.held = [some for some in held if some]
        self.empty = [some for some in held if not some]
        self.empty += [vars(module)[name] for module in (self.others if own_hooks else modules) for name in _HOOKS]
        contents = self._contents(modules[0])
        self.names = [*chain.from_iterable(contents)]
        self.values = [*chain.from_iterable(map(_values, contents))]
        of_tensors = [vars(module)[name] for module in modules for name in ("_parameters", "_buffers")]
        tensors = chain.from_iterable(map(_values, of_tensors))
        self.tensors: list[Tensor] = [t for t in tensors if t is not None and t.is_floating_point()]
        self.memory = self._memory()

    @classmethod
    def of(cls, modules: Sequence[nn.Module], roots: Sequence[nn.Module], own_hooks: bool) -> Unchanged | None:
        """None where a comparison by identity is not enough."""
        for module in modules:
            held = vars(module)
            if any(type(held[name]) not in PLAIN for name in held.keys() - OF_EVERY_MODULE):
                return None
            if any(type(t) not in _TENSORS for t in chain(held["_parameters"].values(), held["_buffers"].values())):
                return None
        try:
            made = cls(modules, roots, own_hooks)
        except RuntimeError:  # a tensor without memory: `torch.func` has wrapped it
            return None
        of_classes = chain.from_iterable(map(dict.items, map(dict, made.classes)))
        return made if all(name[:2] == "__" or type(value) in _OF_CLASSES for name, value in of_classes) else None

    def holds(self, roots: Sequence[nn.Module], own_hooks: bool) -> bool:
        """Whether all is as it was, and no module has hooks."""
        if own_hooks != self.own_hooks or len(roots) != len(self.roots) + 1 or not all(map(is_, roots[1:], self.roots)):
            return False
        if any(self.empty) or [type(roots[0]), *map(type, self.others)] != self.kinds:
            return False
        if not all(map(is_, chain.from_iterable(map(_contents, self.attributes)), self.dictionaries)):
            return False
        try:
            if self.attributes != self.copies:
                return False
        except Exception:  # what took the place of a plain value has no comparison, as tensors and arrays have none
            return False
        contents = self._contents(roots[0])
        if [*chain.from_iterable(contents)] != self.names:
            return False
        return all(map(is_, chain.from_iterable(map(_values, contents)), self.values)) and self._memory() == self.memory

    def _contents(self, first: nn.Module) -> list[Any]:
        """The attributes of the first module, and the dictionaries of all modules and classes."""
        held = vars(first)
        return [{name: value for name, value in held.items() if name != "adoption"}, *_contents(held), *self.held]

    def _memory(self) -> list[Any]:
        """Where the tensors are, for they may be given other memory, and what they are there."""
        tensors = self.tensors
        facts = [t.data_ptr() for t in tensors], [t.dtype for t in tensors]
        return [*facts, [t.shape for t in tensors], [t.stride() for t in tensors]]
