"""Optimiser and schedule of a configuration: rates by layer, what weight decay leaves alone, warm-up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LinearLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR

from efficient_densenet.errors import UserError


def make_optimizer(
    make: Callable[[Any], Optimizer],
    network: nn.Module,
    rates: Mapping[str, float] | None = None,
    decay_norms_and_biases: bool = True,
    learning_rate: float | None = None,
) -> Optimizer:
    """The optimiser of a network's parameters, in groups where rate or weight decay differ.

    Args:
        make: makes the optimiser from parameters.
        network: whose parameters are trained; frozen ones are among them, and optimisers pass over them.
        rates: factors of the learning rate by the beginnings of parameters' names, the longest that fits:
            ``{features: 0.1}``.
        decay_norms_and_biases: false: no weight decay for parameters of one dimension, which are norms and biases.
        learning_rate: in place of the one that `make` has; None: that one.

    Raises:
        UserError: no parameter has a name that begins as `rates` says, or a rate is negative.
    """
    rates = rates or {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    unused = set(rates)
    for name, parameter in network.named_parameters():
        prefix = max((p for p in rates if f"{name}.".startswith(f"{p}.")), key=len, default=None)
        unused.discard(prefix or "")
        decays = decay_norms_and_biases or parameter.dim() > 1
        groups.setdefault((1.0 if prefix is None else rates[prefix], decays), []).append(parameter)
    if unused:
        children = ", ".join(name for name, _ in network.named_children())
        raise UserError(
            f"model.rates: no parameter's name begins with {', '.join(sorted(unused))}; there are {children}"
        )
    if any(rate < 0 for rate in rates.values()):
        raise UserError(f"model.rates are factors of the learning rate and must not be negative: {dict(rates)}")
    if len(groups) == 1:
        optimizer = make(list(network.parameters()))
    else:
        optimizer = make([{"params": parameters} for parameters in groups.values()])
    for (rate, decays), group in zip(groups, optimizer.param_groups, strict=True):
        group["lr"] = (group["lr"] if learning_rate is None else learning_rate) * rate
        if not decays:
            group["weight_decay"] = 0.0
    return optimizer


def make_schedule(
    make: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None,
    optimizer: Optimizer,
    warmup: int = 0,
) -> LRScheduler | ReduceLROnPlateau | None:
    """The schedule of the learning rates, behind a linear rise over the first `warmup` of its units: unit t of them has
    the share ``(t + 1) / (warmup + 1)`` of the rate.

    Raises:
        UserError: the schedule cannot begin later, or has rates of its own in place of those of the groups.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = None if make is None else make(optimizer)
    if isinstance(schedule, OneCycleLR | CyclicLR) and len(set(rates)) > 1:
        maxima = {group.get("max_lr") for group in optimizer.param_groups} | set(getattr(schedule, "max_lrs", ()))
        if len(maxima - {None}) == 1:
            raise UserError(
                f"model.rates would be ignored by {type(schedule).__name__}: give it a list of max_lr, one for each of "
                f"{len(rates)} groups, or use another schedule"
            )
    if not warmup:
        return schedule
    if isinstance(schedule, ReduceLROnPlateau | OneCycleLR | CyclicLR):
        raise UserError(
            f"model.warmup does not go together with {type(schedule).__name__}: leave it out, or use another schedule "
            "such as CosineAnnealingLR"
        )
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return rise if schedule is None else SequentialLR(optimizer, [rise, schedule], milestones=[warmup])
