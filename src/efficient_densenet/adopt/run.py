"""Run a part of a network as was decided, and hand out what the ordinary network does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from efficient_densenet.adopt.conditions import compiled
from efficient_densenet.adopt.decide import ORDINARY, RECOMPUTE, SHARED, Adoption, Decision
from efficient_densenet.adopt.kinds import original_class
from efficient_densenet.errors import EfficiencyWarning
from efficient_densenet.execution import shared
from efficient_densenet.execution.buffers import is_channels_last
from efficient_densenet.execution.plan import parts
from efficient_densenet.execution.profiling import labelled
from efficient_densenet.execution.recompute import obstacle, recomputing


def run_shared(x: Tensor, decision: Decision, adoption: Adoption, channels_last: bool | None) -> tuple[Tensor, bool]:
    """Run on the shared buffer, as decided.

    Args:
        x: the input.
        decision: of `decide`.
        adoption: what is remembered of the modules.
        channels_last: whether the input would be so in memory in the ordinary network; None: it is as there.

    Returns:
        What comes out, and whether that would be channels-last in the ordinary network: see `as_ordinary`.
    """
    plan, modules = decision.plan, decision.modules
    if channels_last is None:
        channels_last = is_channels_last(x)
    made = shared.run(x, plan, modules, adoption.keep, channels_last, adoption.where, decision.ready)
    # Made by convolutions alone, without the input.
    if plan.pool or (plan.entry and plan.convolutions) or (plan.output and 0 not in dict(plan.output)):
        channels_last = channels_last or shared.makes_channels_last(plan, modules)
    # Under autocast, what no convolution made has the type of the input, if that has more digits.
    of_convolution = plan.pool or (plan.entry and plan.convolutions)
    dtype = made.dtype if of_convolution else torch.promote_types(made.dtype, x.dtype)
    if len(plan.output) == 1:  # or all features would stay
        layout = torch.preserve_format if channels_last else torch.contiguous_format
        return made.to(dtype, copy=True, memory_format=layout), channels_last
    return made.to(dtype), channels_last


def as_ordinary(x: Tensor, channels_last: bool | None) -> Tensor:
    """Contiguous, as the ordinary network hands it out, unless that is channels-last; None: `x` is what it hands out.

    A reader of ours needs no such copy; anybody else may view it as another shape, or draw dropout in its order.
    """
    if channels_last is not False or x.dim() < 3:
        return x
    # Of a single pixel both layouts are the same, but not what PyTorch makes of it when it is upsampled.
    return x.clone(memory_format=torch.contiguous_format) if x.stride(1) == 1 else x.contiguous()


def run_as(
    decision: Decision, x: Any, roots: Sequence[nn.Module], adoption: Adoption, ordinary: Callable[[], Any]
) -> Any:
    """Run as decided, and hand out what the ordinary network does.

    Args:
        decision: of `decide`.
        x: the input.
        roots: the modules.
        adoption: what is remembered of them.
        ordinary: runs them as they are.
    """
    if decision.way == SHARED:
        return as_ordinary(*run_shared(x, decision, adoption, None))
    forget = decision.way == RECOMPUTE and torch.is_grad_enabled()
    cannot = obstacle() if forget else None
    if forget and any(map(compiled, parts(roots))):
        cannot = "a module inside it is compiled by itself, and its compiler decides what is kept"
    if cannot is not None:
        decision, forget = Decision(ORDINARY, cannot), False
    _say(decision, roots[0], adoption)
    with labelled(f"{adoption.where}: {decision.way}"), recomputing() if forget else nullcontext():
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
    name = adoption.name or original_class(module).__name__
    warnings.warn(f"{name} {how} and does not use the shared buffer: {reason}", EfficiencyWarning, stacklevel=4)
