"""What parts of a network become: objects of a subclass of their own class.

Changing the class of an object, and nothing in it, keeps its keys, hooks, parameters and copies right. There are three
tasks: a dense block, transition or stem by itself; a sequence, which runs some of its modules as one; and a whole
network, whose head joins the last block.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_densenet.adopt.decide import SHARED, Adoption, Standing, at_call, decide, standing_now
from efficient_densenet.adopt.head import Head, head_of
from efficient_densenet.adopt.kinds import original_class
from efficient_densenet.adopt.run import as_ordinary, run_as, run_shared
from efficient_densenet.adopt.turns import in_turn
from efficient_densenet.errors import UserError


class Adopted(nn.Module):
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

    def run(self: Any, *arguments: Any, **named: Any) -> Any:
        """What `forward` does."""
        raise NotImplementedError

    def standing_now(self: Any, segment: int | None = None) -> Standing:
        """Of this module, or of one of the segments of a sequence.

        A compiler calls this as it is, and takes what it returns for a constant. It is a method because a module is
        handed over like that as `self` alone.
        """
        if segment is None:
            return standing_now([self], self.adoption, own_hooks=True)
        start, stop, adoption = self.adoption.segments[segment]
        return standing_now(list(self)[start:stop], adoption, own_hooks=False)

    standing_now._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler's decorator does


class AdoptedPart(Adopted):
    """A dense block, a transition, a block with its transition, or a stem."""

    def run(self: Any, *arguments: Any, **named: Any) -> Any:
        def ordinary() -> Any:
            return self.original.forward(self, *arguments, **named)

        x = one_tensor(self.adoption, arguments, named)
        decision = decide(x, [self], self.adoption, own_hooks=True, while_compiling=self.standing_now)
        return run_as(decision, x, [self], self.adoption, ordinary)


class AdoptedSequence(Adopted):
    """A sequence, some of whose modules run as one."""

    def run(self: Any, *arguments: Any, **named: Any) -> Any:
        x = one_tensor(self.adoption, arguments, named)
        decision = at_call(x, [self], self.adoption)
        if decision is None:
            return as_ordinary(*self.run_modules(list(self), x))
        return run_as(decision, x, [self], self.adoption, lambda: self.original.forward(self, *arguments, **named))

    def run_modules(self: Any, modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, bool | None]:
        """Run all modules, or the first ones; see `as_ordinary` for what comes out."""
        i, channels_last = 0, None
        for number, (start, stop, adoption) in enumerate(self.adoption.segments):
            if stop > len(modules):
                break
            if start > i:
                x, channels_last = in_order(modules[i:start], as_ordinary(x, channels_last)), None

            def ask(number: int = number) -> Standing:
                return self.standing_now(number)

            x, channels_last = run_segment(modules[start:stop], x, adoption, channels_last, ask)
            i = stop
        if i < len(modules):
            x, channels_last = in_order(modules[i:], as_ordinary(x, channels_last)), None
        return x, channels_last


class AdoptedNetwork(Adopted):
    """A network whose head, relu and mean over all pixels, runs on the buffer of its features' last block."""

    def run(self: Any, *arguments: Any, **named: Any) -> Any:
        x = one_tensor(self.adoption, arguments, named)
        features: Any = getattr(self, self.adoption.features, None)
        usual = isinstance(features, AdoptedSequence) and len(features._modules) > 1
        # While compiling there is nothing to look at.
        if usual and at_call(x, [self], self.adoption) is None and not torch.compiler.is_compiling():
            head = head_of(self, features, self.adoption.heads, x.shape)
            if head is not None:
                return self.run_head(features, head, x)
        return self.original.forward(self, *arguments, **named)

    def run_head(self: Any, features: Any, head: Head, x: Tensor) -> Tensor:
        *first, block, norm = list(features)
        x, channels_last = features.run_modules(first, x)
        (segment,) = self.adoption.segments
        decision = decide(x, [block, norm], segment.adoption, own_hooks=False)
        if decision.way == SHARED:
            x, _ = run_shared(x, decision, segment.adoption, channels_last)
        else:  # the block tells why, if it does not run on its buffer either
            x = in_order([block, norm], as_ordinary(x, channels_last))
            x = F.relu(x).mean(tuple(range(2, x.dim())))
        return self.get_submodule(head.classifier)(x) if head.classifier else x


def in_order(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def run_segment(
    modules: Sequence[nn.Module],
    x: Tensor,
    adoption: Adoption,
    channels_last: bool | None,
    while_compiling: Callable[[], Standing],
) -> tuple[Tensor, bool | None]:
    """Run modules as one; `channels_last`, given and returned, as in `run_shared`; the rest as in `decide`."""
    decision = decide(x, modules, adoption, own_hooks=False, while_compiling=while_compiling)
    if decision.way == SHARED:
        return run_shared(x, decision, adoption, channels_last)
    x = as_ordinary(x, channels_last)
    if any(isinstance(module, Adopted) for module in modules):
        return in_order(modules, x), None  # they decide by themselves, and tell why
    return run_as(decision, x, modules, adoption, lambda: in_order(modules, x)), None


def one_tensor(adoption: Adoption, arguments: tuple, named: dict[str, Any]) -> Any:
    """The one argument of a call, by position or by its name; or all of them, where there are more."""
    if len(arguments) == 1 and not named:
        return arguments[0]
    if not arguments and len(named) == 1 and adoption.argument in named:
        return named[adoption.argument]
    return (*arguments, *named.values())


def adopt(module: Any, task: type[Adopted], adoption: Adoption) -> None:
    """Give `module` its task, or another `adoption`. Nothing else in it changes."""
    original = original_class(module)
    adoption.argument = next(iter(list(inspect.signature(original.forward).parameters)[1:2]), "")
    module.__class__ = _adopted_class(original, task)
    module.adoption = adoption


def restore(model: nn.Module) -> nn.Module:
    """Give every adopted module of `model` the class back that it had, and return `model`."""
    for module in adopted_modules(model):
        module.__class__ = module.original
        del module.adoption
    return model


def adopted_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Adopted)]


def adoptions(model: nn.Module) -> Iterator[Adoption]:
    """All that is remembered of parts of `model`."""
    for module in adopted_modules(model):
        yield module.adoption
        yield from [segment.adoption for segment in module.adoption.segments]


_classes: dict[tuple[type, type], type] = {}


def _adopted_class(original: type[nn.Module], task: type[Adopted]) -> type[nn.Module]:
    """One class for each original class and task."""
    if (original, task) not in _classes:

        @functools.wraps(original.forward)  # which tracers read the signature of
        def forward(self: Any, *arguments: Any, **named: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                return self.run(*arguments, **named)
            return in_turn(self, arguments, named)

        members = {
            "original": original,
            "task": task,
            "forward": forward,
            "__module__": __name__,
            "__doc__": original.__doc__,
        }
        _classes[original, task] = type(f"Efficient{original.__name__}", (task, original), members)
    return _classes[original, task]


def _blank(original: type[nn.Module], task: type[Adopted]) -> nn.Module:
    """A module without content, for a copy."""
    cls = _adopted_class(original, task)
    return cls.__new__(cls)
