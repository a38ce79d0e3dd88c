"""The one place that decides how a part of a network runs at a call: on the shared buffer, recomputing, or as it is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx import Proxy

from efficient_densenet import ops
from efficient_densenet.adopt.chain import Chain
from efficient_densenet.adopt.conditions import conditions, hooked, hooked_globally
from efficient_densenet.adopt.head import Head
from efficient_densenet.adopt.look import Look, look, look_at_size
from efficient_densenet.adopt.meanings import NotDenseError
from efficient_densenet.adopt.trial import Tensors
from efficient_densenet.errors import EfficiencyWarning
from efficient_densenet.execution import Keep, shared
from efficient_densenet.execution.plan import Plan, parts
from efficient_densenet.execution.recompute import forgetting

Way = Literal["shared", "recompute"]
"""What can be asked for: the shared buffer, or recomputation, which is exact and has gradients of gradients."""

WAYS: tuple[Way, ...] = get_args(Way)
SHARED, RECOMPUTE, ORDINARY = "shared buffer", "recompute", "ordinary"

_TRACED = "it is traced, as the ordinary operations"
_MOST_LOOKS = 50


class Segment(NamedTuple):
    """Modules of a sequence, from one to another (exclusive), that run as one."""

    start: int
    stop: int
    adoption: Adoption


@dataclass
class Adoption:
    """What is remembered of modules that run in a row, or of one.

    Attributes:
        way, keep: as in `make_efficient`.
        name: what a warning calls them; empty: the class of the first of them.
        argument: the name of the one tensor that the first of them takes.
        looks: what they compute, under the conditions that were met, the latest first.
        promised: whether they were to run on the shared buffer when they were adopted.
        head: whether relu and the mean over all pixels follow.
        segments: of a sequence, what runs as one; of a network, its last block and norm.
        features, heads: of a network, the name of its features, and how it was found to end.
        said: reasons that the user has been given.
    """

    way: Way
    keep: Keep
    name: str = ""
    argument: str = ""
    looks: list[Look] = field(default_factory=list)
    promised: bool = True
    head: bool = False
    segments: tuple[Segment, ...] = ()
    features: str = ""
    heads: list[Head] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        """Looks name classes and functions, which not every pickle can hold: a pickled module is looked at anew."""
        return self.__dict__ | {"looks": [], "heads": [], "said": set()}

    def __deepcopy__(self, memo: Any) -> Adoption:
        segments = copy.deepcopy(self.segments, memo)
        return replace(self, looks=list(self.looks), heads=list(self.heads), segments=segments, said=set())


class Decision(NamedTuple):
    """How to run; why not on the shared buffer, if so; what it is; and whether the reason is worth telling."""

    way: str
    reason: str | None = None
    chain: Chain | None = None
    modules: Sequence[nn.Module] = ()
    tell: bool = True

    @property
    def plan(self) -> Plan:
        """How to run on the shared buffer, if that is the way."""
        assert self.chain is not None and self.chain.plan is not None
        return self.chain.plan


def decide(x: Any, roots: Sequence[nn.Module], adoption: Adoption, own_hooks: bool) -> Decision:
    """How these modules run on `x`, one after the other.

    Args:
        x: the tensor that they are called with, or all arguments where these are not one tensor.
        roots: the modules.
        adoption: what is remembered of them.
        own_hooks: whether the hooks of `roots` are called in any case.
    """
    decision = at_call(x, roots[0], adoption)
    if decision is not None:
        return decision
    if torch.compiler.is_compiling():
        return _decide_while_compiling(roots, adoption)
    decision = standing(roots, adoption, own_hooks, x.shape)
    if decision.way == SHARED and decision.chain is not None and decision.chain.width != x.shape[1]:
        return Decision(ORDINARY, "its input has other channels", tell=False)  # an error, which it explains itself
    return decision


def at_call(x: Any, module: nn.Module, adoption: Adoption) -> Decision | None:
    """How it runs if the call itself decides that, whatever the modules are."""
    reason = _must_be_ordinary(x)
    if reason is not None:
        return Decision(ORDINARY, reason, tell=bool(reason) and module.training)
    if torch.compiler.is_compiling():
        return None
    if not isinstance(x, Tensor):
        return Decision(RECOMPUTE, "it was called with other arguments than one tensor")
    if adoption.way == "recompute":
        return Decision(RECOMPUTE)
    slower = ops.slower_than_recomputing(x)
    return None if slower is None else Decision(RECOMPUTE, slower)


def standing(
    roots: Sequence[nn.Module], adoption: Adoption, own_hooks: bool, shape: torch.Size | None = None
) -> Decision:
    """How these modules run on a tensor (of this shape), as they are now."""
    modules, found = conditions(roots)
    if hooked(modules[1:] if own_hooks else modules):
        return Decision(RECOMPUTE, "there are hooks on modules inside it, which must take effect")
    if hooked_globally():
        return Decision(RECOMPUTE, "there are hooks on all modules, which must take effect")
    known = _known(roots, adoption, found)
    reason = known.reason
    if reason is None and known.sizes and shape is not None:
        reason = _differs_at(known, roots, shape)
    if adoption.way == "recompute":
        return Decision(RECOMPUTE, None, known.chain)
    return Decision(RECOMPUTE if reason is not None else SHARED, reason, known.chain, modules)


def run_as(decision: Decision, x: Any, module: nn.Module, adoption: Adoption, ordinary: Callable[[], Any]) -> Any:
    """Run as decided.

    Args:
        decision: of `decide`.
        x: the input.
        module: the first of the modules; for a warning.
        adoption: what is remembered of them.
        ordinary: runs them as they are.
    """
    if decision.way == SHARED:
        plan = decision.plan
        made = shared.run(x, plan, decision.modules, adoption.keep)
        # What is handed out may be changed in place; the features that are kept for backward may not.
        whole = not (plan.pool or plan.entry or plan.output)
        return made.clone() if whole and made.requires_grad else made
    _say(decision, module, adoption)
    if decision.way == RECOMPUTE and torch.is_grad_enabled():
        with forgetting():
            return ordinary()
    return ordinary()


def _say(decision: Decision, module: nn.Module, adoption: Adoption) -> None:
    """Tell once for each reason that something runs slower, or takes more memory, than was promised."""
    reason = decision.reason
    if torch.compiler.is_compiling() or not decision.tell or not adoption.promised:
        return
    if reason is None or reason in adoption.said:
        return
    adoption.said.add(reason)
    how = "recomputes" if decision.way == RECOMPUTE else "runs the ordinary way"
    name = adoption.name or getattr(type(module), "original", type(module)).__name__
    warnings.warn(f"{name} {how} and does not use the shared buffer: {reason}", EfficiencyWarning, stacklevel=4)


def _must_be_ordinary(x: Any) -> str | None:
    """Why only the ordinary operations will do; an empty reason is none to tell."""
    # What `is_exporting` returns; but PyTorch 2.11 takes that for true wherever it compiles.
    if torch.jit.is_tracing() or torch.compiler._is_exporting_flag:
        return _TRACED
    if torch.compiler.is_compiling():
        return None
    if any(isinstance(argument, Proxy) for argument in (x if isinstance(x, tuple) else (x,))):
        return _TRACED
    fake = isinstance(x, FakeTensor) and ops.computes_nothing()  # a step is planned, see `step`
    if isinstance(x, Tensor) and type(x) not in (Tensor, nn.Parameter) and not fake:
        return f"its input is a {type(x).__name__}, a tensor of another kind"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms it, for which it must consist of ordinary operations"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives need the ordinary operations"
    return "" if isinstance(x, Tensor) and not x.numel() else None


def _decide_while_compiling(roots: Sequence[nn.Module], adoption: Adoption) -> Decision:
    """Without a look, which is nothing to compile: what was found last in this mode of the first module."""
    if adoption.way == "shared":
        for one in adoption.looks:
            if one.training == roots[0].training:
                if one.reason is not None or one.sizes:
                    break
                return Decision(SHARED, None, one.chain, parts(roots))
    return Decision(ORDINARY, "", tell=False)


def look_now(roots: Sequence[nn.Module], adoption: Adoption) -> tuple[Chain | None, str | None]:
    """What these modules compute as they are now, and why that is nothing for the shared buffer."""
    known = _known(roots, adoption, conditions(roots)[1])
    return known.chain, known.reason


def _known(roots: Sequence[nn.Module], adoption: Adoption, found: tuple[Any, ...]) -> Look:
    """What the modules compute under these conditions."""
    looks, training = adoption.looks, roots[0].training
    for i, one in enumerate(looks):
        if one.conditions == found:
            if i:
                looks.insert(0, looks.pop(i))
            return one
    if getattr(roots[0], "_is_replica", False):
        return Look(found, None, False, "it is a replica of something that has changed", training)
    if len(looks) >= _MOST_LOOKS:
        return Look(found, None, False, f"its attributes have changed more than {_MOST_LOOKS} times", training)
    try:
        looks.insert(0, look(roots, Tensors("cpu"), modes=(None,), head=adoption.head)[0])
    except NotDenseError as error:
        looks.insert(0, Look(found, None, False, str(error), training))
    return looks[0]


def _differs_at(known: Look, roots: Sequence[nn.Module], shape: torch.Size) -> str | None:
    """Why what was found does not hold for an input of this shape, if so."""
    if shape not in known.by_size:
        try:
            same = look_at_size(roots, shape) == known.chain
            known.by_size[shape] = None if same else "what it computes depends on the size of its input"
        except NotDenseError as error:
            known.by_size[shape] = str(error)
    return known.by_size[shape]
