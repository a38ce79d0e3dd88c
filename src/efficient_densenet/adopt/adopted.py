"""What other people's blocks, transitions and sequences become: objects of a subclass of their own class.

Changing the class of an object, and nothing in it, keeps its keys, hooks, parameters and copies right. Each class here
has one task, to run on the shared buffer where that is possible at this call, and the original `forward` where not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from efficient_densenet.adopt import read, trial
from efficient_densenet.errors import UserError
from efficient_densenet.execution import layer_by_layer, obstacle, run_reader, shared, wants_buffer
from efficient_densenet.execution.hooks import has_hooks
from efficient_densenet.execution.joining import run_in_order

SHARED, RECOMPUTE, ORDINARY = "shared buffer", "recompute", "ordinary"


@dataclass
class Adoption:
    """What an adopted module remembers.

    Attributes:
        keep: as in `execution.shared`.
        way: how it ran when it was adopted.
        tried: for each set of classes of its parts with which it was tried, the disagreement if there was one.
    """

    keep: str
    way: str
    tried: dict[frozenset[type], str | None] = field(default_factory=dict)


class Adopted:
    """Of every adopted module: `original` is the class that it had before."""

    original: ClassVar[type[nn.Module]]
    task: ClassVar[type[Adopted]]
    adoption: Adoption

    def __init__(self: Any, *arguments: Any, **named: Any) -> None:
        """Not called for adopted modules. One that is made anew, as a slice of a sequence is, is an original."""
        super().__init__(*arguments, **named)
        self.__class__ = self.original

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the original class and the task, for this class itself is made at run time."""
        by_default: Any = super().__reduce_ex__(protocol)
        return (_blank, (self.original, self.task), *by_default[2:])

    def __prepare_scriptable__(self) -> nn.Module:
        raise UserError(
            "torch.jit.script cannot read an adopted DenseNet: use torch.jit.trace, or script restore(model)"
        )


class AdoptedBlock(Adopted):
    """A dense block."""

    def forward(self: Any, x: Tensor, transition: nn.Module | None = None) -> Tensor:
        """The features; or what `transition` makes of them, if it is to run on the same buffer."""
        if not isinstance(x, Tensor) or not wants_buffer(x, True):
            return _then(self.original.forward(self, x), transition)
        reason = disagreement(self)
        if reason is None:
            layers = read.block(self)
            tail = None if transition is None else read.transition(transition)
            reason = obstacle(layers, tail)
            if reason is None:
                made = shared.dense_block(x, layers, tail, self.adoption.keep)
                # What is handed out may be changed in place; what is kept for backward may not.
                return made.clone() if tail is None and made.requires_grad else made
            if not has_hooks(inside(self)):
                if self.adoption.way == SHARED:
                    _warn(f"does not run on the shared buffer, but recomputes: {reason}")
                return _then(layer_by_layer(x, layers, "recompute"), transition)
        _warn(f"runs the ordinary way: {reason}")
        return _then(self.original.forward(self, x), transition)


class AdoptedTransition(Adopted):
    """A transition that runs by itself, because what its block makes is used elsewhere too."""

    def forward(self: Any, x: Tensor) -> Tensor:
        tail = read.transition(self)
        if tail is None or not wants_buffer(x, True) or has_hooks(inside(self)):
            return self.original.forward(self, x)
        if obstacle([], tail) is None:
            return shared.dense_block(x, [], tail, self.adoption.keep)
        return tail.pool(run_reader([x], tail.reader, "recompute"))


class AdoptedSequence(Adopted):
    """What runs adopted blocks one after the other: it joins each with its transition, and the parts of the stem."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not wants_buffer(x, True):
            return self.original.forward(self, x)
        return run_in_order(x, list(self), read.stem, _can_join, self.adoption.keep)


def adopt(module: Any, task: type[Adopted], adoption: Adoption) -> None:
    """Give `module` its task, or another `keep`. Nothing else in it changes."""
    module.__class__ = _adopted_class(original_class(module), task)
    module.adoption = adoption


def restore(model: nn.Module) -> nn.Module:
    """Give every adopted module of `model` the class back that it had, and return `model`."""
    for module in adopted_modules(model):
        module.__class__ = module.original
        del module.adoption
    return model


def adopted_modules(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, Adopted))


def original_class(module: nn.Module) -> type[nn.Module]:
    return module.original if isinstance(module, Adopted) else type(module)


def runs_in_order(module: nn.Module) -> bool:
    """Whether it is a sequence that runs its parts one after the other, or was one before it was adopted."""
    return original_class(module).forward is nn.Sequential.forward and "forward" not in module.__dict__


def disagreement(block: nn.Module) -> str | None:
    """`trial.disagreement`, tried once for the classes that the parts of the block have now."""
    if any("forward" in module.__dict__ for module in block.modules()):
        return "the forward of a module inside it was replaced"
    if isinstance(block, Adopted):
        if torch.compiler.is_compiling():  # a trial is nothing to compile
            return next(iter(block.adoption.tried.values()), None)
        tried = block.adoption.tried
        classes = classes_inside(block)
        if classes not in tried:
            tried[classes] = _try(block)
        return tried[classes]
    return _try(block)


def _try(block: nn.Module) -> str | None:
    try:
        return trial.disagreement(block, original_class(block).forward)
    except read.NotDenseError as error:
        return str(error)


def classes_inside(block: nn.Module) -> frozenset[type]:
    return frozenset(type(module) for module in inside(block))


def inside(module: nn.Module) -> list[nn.Module]:
    """All modules in it; its own hooks are called whatever happens inside."""
    return list(module.modules())[1:]


def _can_join(block: nn.Module, following: nn.Module) -> bool:
    return isinstance(block, AdoptedBlock) and runs_in_order(following) and read.transition(following) is not None


def _then(features: Tensor, transition: nn.Module | None) -> Tensor:
    return features if transition is None else transition(features)


def _warn(text: str) -> None:
    warnings.warn(f"a dense block that was made efficient {text}", stacklevel=3)


_classes: dict[tuple[type, type], type] = {}


def _adopted_class(original: type[nn.Module], task: type[Adopted]) -> type[nn.Module]:
    """One class for each original class and task."""
    if (original, task) not in _classes:
        members = {"original": original, "task": task, "__module__": __name__, "__doc__": original.__doc__}
        _classes[original, task] = type(f"Efficient{original.__name__}", (task, original), members)
    return _classes[original, task]


def _blank(original: type[nn.Module], task: type[Adopted]) -> nn.Module:
    """A module without content, for a copy."""
    cls = _adopted_class(original, task)
    return cls.__new__(cls)
