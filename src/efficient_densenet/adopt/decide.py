"""The one place that decides how a part of a network runs at a call: on the shared buffer, recomputing, or as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from efficient_densenet import ops
from efficient_densenet.adopt.chain import Chain
from efficient_densenet.adopt.conditions import MOST_LOOKS, compared, conditions, hooked, hooked_globally
from efficient_densenet.adopt.head import Head
from efficient_densenet.adopt.look import Look, NotTriedError, look, look_at_size
from efficient_densenet.adopt.meanings import NotDenseError
from efficient_densenet.adopt.tools import needs_ordinary, replaced_calls, watched_calls
from efficient_densenet.adopt.trial import Tensors
from efficient_densenet.adopt.turns import alone
from efficient_densenet.adopt.unchanged import Unchanged
from efficient_densenet.execution import Keep
from efficient_densenet.execution.operands import unsuitable
from efficient_densenet.execution.plan import Plan, parts
from efficient_densenet.execution.reading import accepts, activations, sync_group
from efficient_densenet.execution.ready import Ready

Way = Literal["shared", "recompute"]
"""What can be asked for: the shared buffer, or recomputation, which is exact and has gradients of gradients."""

WAYS: tuple[Way, ...] = get_args(Way)
SHARED, RECOMPUTE, ORDINARY = "shared buffer", "recompute", "ordinary"

_OTHER_THREADS = "it has changed, and cannot be looked at while other threads run it"


class Segment(NamedTuple):
    """Modules of a sequence, from one to another (exclusive), that run as one."""

    start: int
    stop: int
    adoption: Adoption


class Last(NamedTuple):
    """What was found at a call on tensors of this device, for as long as the modules stay as they were.

    Attributes:
        types: of all tensors of the modules.
        ready: what the engine keeps for the next call.
    """

    unchanged: Unchanged
    device: torch.device | None
    known: Look
    types: set[torch.dtype]
    ready: Ready


@dataclass
class Adoption:
    """What is remembered of modules that run in a row, or of one.

    Attributes:
        way, keep: as in `make_efficient`.
        name: what a warning calls them; empty: the class of the first of them.
        where: their names in the model that was made efficient, which a profiler's trace calls them.
        argument: the name of the one tensor that the first of them takes.
        looks: what they compute, under the conditions that were met.
        promised: whether they were to run on the shared buffer when they were adopted.
        head: whether relu and the mean over all pixels follow.
        segments: of a sequence, what runs as one; of a network, its last block and norm.
        features, heads: of a network, the name of its features, and how it was found to end.
        said: reasons that the user has been given.
        last: what was found when modules were looked at last.
    """

    way: Way
    keep: Keep
    name: str = ""
    where: str = ""
    argument: str = ""
    looks: list[Look] = field(default_factory=list)
    promised: bool = True
    head: bool = False
    segments: tuple[Segment, ...] = ()
    features: str = ""
    heads: list[Head] = field(default_factory=list)
    said: set[str] = field(default_factory=set)
    last: Last | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Looks name classes and functions, which not every pickle can hold: a pickled module is looked at anew."""
        return self.__dict__ | {"looks": [], "heads": [], "said": set(), "last": None}

    def __deepcopy__(self, memo: Any) -> Adoption:
        segments = copy.deepcopy(self.segments, memo)
        return replace(self, looks=list(self.looks), heads=list(self.heads), segments=segments, said=set(), last=None)


class Decision(NamedTuple):
    """How to run; why not on the shared buffer, if so; what it is; whether to tell the reason; what is ready."""

    way: str
    reason: str | None = None
    chain: Chain | None = None
    modules: Sequence[nn.Module] = ()
    tell: bool = True
    ready: Ready | None = None

    @property
    def plan(self) -> Plan:
        """How to run on the shared buffer, if that is the way."""
        assert self.chain is not None and self.chain.plan is not None
        return self.chain.plan


Standing = tuple[int, tuple[tuple[str, ...], ...]]
"""How modules run as they are now, for a compiler, which takes it for a constant (of plain types).

Which of `Adoption.looks` holds, -1 where they cannot run on the shared buffer; and of each of their parts, in the order
of `plan.parts`, the names of the attributes that this depends on.
"""


def decide(
    x: Any,
    roots: Sequence[nn.Module],
    adoption: Adoption,
    own_hooks: bool,
    while_compiling: Callable[[], Standing] | None = None,
) -> Decision:
    """How these modules run on `x`, one after the other.

    Args:
        x: the tensor that they are called with, or all arguments where these are not one tensor.
        roots: the modules.
        adoption: what is remembered of them.
        own_hooks: whether the hooks of `roots` are called in any case.
        while_compiling: `standing_now` of them, as a compiler can call it; None: they are not compiled.
    """
    decision = at_call(x, roots, adoption)
    if decision is not None:
        return decision
    if torch.compiler.is_compiling():
        return _decide_while_compiling(roots, adoption, own_hooks, while_compiling)
    return standing(roots, adoption, own_hooks, x)


def at_call(x: Any, roots: Sequence[nn.Module], adoption: Adoption) -> Decision | None:
    """How they run if the call itself decides that, whatever the modules are."""
    reason = needs_ordinary(x)
    if reason is not None and (reason or not _others_wait(x, roots, adoption)):
        return Decision(ORDINARY, reason, tell=bool(reason) and roots[0].training)
    if torch.compiler.is_compiling():
        return None
    if not isinstance(x, Tensor):
        return Decision(RECOMPUTE, "it was called with other arguments than one tensor")
    other = unsuitable([x], x.device)
    if other is not None:
        return Decision(ORDINARY, f"its input is {other}")
    if adoption.way == "recompute":
        return Decision(RECOMPUTE)
    slower = watched_calls() or ops.slower_than_recomputing(x)
    return None if slower is None else Decision(RECOMPUTE, slower)


def _others_wait(x: Tensor, roots: Sequence[nn.Module], adoption: Adoption) -> bool:
    """Whether other processes, which have images, wait for the statistics of this one, which has none.

    They run on the shared buffer, and what they send is not what SyncBatchNorm sends.
    """
    if x.numel() or adoption.way != "shared" or torch.compiler.is_compiling():
        return False
    return sync_group(parts(roots)) is not None


def standing(roots: Sequence[nn.Module], adoption: Adoption, own_hooks: bool, x: Tensor | None = None) -> Decision:
    """How these modules run, as they are now, on this tensor if there is one."""
    if hooked_globally():
        return Decision(RECOMPUTE, "there are hooks on all modules, which must take effect")
    last, device = adoption.last, None if x is None else x.device
    if last is not None and last.device == device and last.unchanged.holds(roots, own_hooks):
        modules, known, types = [roots[0], *last.unchanged.others], last.known, last.types
    else:
        adoption.last = None
        modules, tensors, found = conditions(roots)
        if hooked(modules[1:] if own_hooks else modules):
            return Decision(RECOMPUTE, "there are hooks on modules inside it, which must take effect")
        other = unsuitable(tensors, device)
        if other is not None:
            return Decision(ORDINARY, f"among its parameters and buffers is {other}")
        known = _known(roots, adoption, found)
        types = {tensor.dtype for tensor in tensors}
        unchanged = Unchanged.of(modules, roots, own_hooks) if device is not None and known.reason is None else None
        last = None if unchanged is None else Last(unchanged, device, known, types, Ready(tensors))
        adoption.last = last
    reason = known.reason
    if reason is None and known.sizes and x is not None:
        error = _differs_at(known, roots, x.shape)
        if isinstance(error, NotTriedError):
            return Decision(ORDINARY, str(error), known.chain, tell=False)  # it will raise that itself
        reason = None if error is None else str(error)
    if adoption.way == "recompute":
        return Decision(RECOMPUTE, None, known.chain)
    if reason is not None:
        return Decision(RECOMPUTE, reason, known.chain, modules)
    decision = Decision(SHARED, None, known.chain, modules, ready=None if last is None else last.ready)
    if x is not None and not _fits(x, decision, types):
        return Decision(ORDINARY, "its input does not fit", tell=False)  # an error, which it explains itself
    return decision


def _fits(x: Tensor, decision: Decision, types: set[torch.dtype]) -> bool:
    """Whether shape and type of the input are those that the modules take, whose tensors have these types."""
    chain, plan = decision.chain, decision.plan
    assert chain is not None
    if x.dim() != chain.dims + 2 or x.shape[1] != chain.width or min(x.shape[2:]) < plan.pool:
        return False
    if types <= {x.dtype, torch.int64}:
        return True
    known, kind = {} if decision.ready is None else decision.ready.accepts, activations(x)
    if kind not in known:
        known[kind] = accepts(kind, plan, decision.modules)
    return known[kind]


def standing_now(roots: Sequence[nn.Module], adoption: Adoption, own_hooks: bool) -> Standing:
    """See `Standing`."""
    decision = standing(roots, adoption, own_hooks)
    usual = decision.way == SHARED and replaced_calls() is None
    watched = tuple(tuple(compared(module)) for module in parts(roots))
    for number, one in enumerate(adoption.looks):
        if usual and one.chain is decision.chain and not one.sizes:
            return number, watched
    return -1, watched


def _decide_while_compiling(
    roots: Sequence[nn.Module], adoption: Adoption, own_hooks: bool, ask: Callable[[], Standing] | None
) -> Decision:
    """As things are when the graph is made. What the compiler reads here, it watches, and compiles anew at a change."""
    modules = parts(roots)
    usual = adoption.way == "shared" and not hooked_globally() and not hooked(modules[1:] if own_hooks else modules)
    if usual and ask is not None:
        number, watched = ask()
        for module, names in zip(modules, watched, strict=True):
            for name in names:
                if getattr(module, name):
                    pass
        if number >= 0:
            return Decision(SHARED, None, adoption.looks[number].chain, modules)
    return Decision(ORDINARY, "", tell=False)


def look_now(roots: Sequence[nn.Module], adoption: Adoption) -> tuple[Chain | None, str | None]:
    """What these modules compute as they are now, and why that is nothing for the shared buffer."""
    known = _known(roots, adoption, conditions(roots)[-1])
    return known.chain, known.reason


def _known(roots: Sequence[nn.Module], adoption: Adoption, found: tuple[Any, ...]) -> Look:
    """What the modules compute under these conditions."""
    looks, training = adoption.looks, roots[0].training
    for one in looks:
        if one.conditions == found:
            return one
    if getattr(roots[0], "_is_replica", False):
        return Look(found, None, False, "it is a replica of something that has changed", training)
    if len(looks) >= MOST_LOOKS:
        return Look(found, None, False, f"its attributes have changed more than {MOST_LOOKS} times", training)
    with alone(roots) as nobody_else:
        if not nobody_else:
            return Look(found, None, False, _OTHER_THREADS, training)
        try:
            (one,) = look(roots, Tensors("cpu"), modes=(None,), head=adoption.head)
            looks.append(replace(one, conditions=found))  # those of a trial may differ, for it has copies of objects
        except NotDenseError as error:
            looks.append(Look(found, None, False, str(error), training))
        return looks[-1]


def _differs_at(known: Look, roots: Sequence[nn.Module], shape: torch.Size) -> NotDenseError | None:
    """Why what was found does not hold for an input of this shape, if so."""
    if shape not in known.by_size:
        with alone(roots) as nobody_else:
            if not nobody_else:
                return NotDenseError(_OTHER_THREADS)
            known.by_size[shape] = None
            try:
                if look_at_size(roots, shape) != known.chain:
                    known.by_size[shape] = NotDenseError("what it computes depends on the size of its input")
            except NotDenseError as error:
                known.by_size[shape] = error.with_traceback(None)  # which would keep tensors alive
    return known.by_size[shape]
