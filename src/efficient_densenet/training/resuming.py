"""A resumed run follows its configuration: learning rate, weight decay and schedule are the configuration's.

Lightning restores them from the checkpoint, so that what a configuration says anew would be ignored without a word.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from efficient_densenet.errors import UserError

_LENGTHS = {"CosineAnnealingLR": "T_max", "PolynomialLR": "total_iters", "OneCycleLR": "total_steps"}


def length_of_schedule(given: Any) -> dict[str, int]:
    """The entry that makes a schedule as long as the training, where nothing `given` says how long it is.

    Args:
        given: the entries of a configuration that somebody gave, as a namespace of jsonargparse.
    """
    kind, epochs = given.get("model.scheduler.class_path") or "", given.get("trainer.max_epochs")
    length = _LENGTHS.get(kind.rpartition(".")[2])
    in_steps = given.get("model.schedule_interval") == "step"
    own = given.get("model.scheduler.init_args")
    if length is None or (own is not None and {length, "epochs"} & set(vars(own))):
        return {}
    if not isinstance(epochs, int) or epochs < 1:
        return {}
    if in_steps:
        raise UserError(f"model.scheduler.{length} is required, the number of steps that the schedule lasts")
    warmup = given.get("model.warmup") or 0
    if warmup >= epochs:
        raise UserError(f"model.warmup {warmup} must be less than trainer.max_epochs {epochs}")
    return {f"model.scheduler.init_args.{length}": epochs - warmup}


def follow_configuration(
    checkpoint: dict[str, Any], optimizer: Optimizer, scheduler: LRScheduler | None
) -> dict[str, tuple[Any, Any]]:
    """Put the settings of a new `optimizer` and `scheduler` into the states of a `checkpoint` of Lightning.

    The schedule is stepped to where the checkpoint's was, as if it had been the configured one from the beginning. What
    an optimiser has gathered (momentum, ...) stays.

    Returns:
        What has changed: by name, the checkpoint's value and the configuration's.

    Raises:
        UserError: the checkpoint is of another kind of optimiser, or of other parameters.
    """
    (saved,) = checkpoint["optimizer_states"]
    states = checkpoint["lr_schedulers"]
    follows_metric = isinstance(scheduler, ReduceLROnPlateau)  # its past is not known
    if scheduler is not None and not follows_metric:
        _advance(scheduler, states[0]["last_epoch"] if states else checkpoint["epoch"])
    changes: dict[str, tuple[Any, Any]] = {}
    for old, new in zip(_groups(saved, optimizer), optimizer.param_groups, strict=True):
        for name in new.keys() - {"params"} - ({"lr"} if follows_metric else set()):
            _replace(old, name, new[name], changes)
    if scheduler is None:
        checkpoint["lr_schedulers"] = []
    elif not states:
        checkpoint["lr_schedulers"] = [scheduler.state_dict()]
    elif not follows_metric:
        for name, value in scheduler.state_dict().items():
            if not name.startswith("_"):
                _replace(states[0], name, value, changes)
            else:
                states[0][name] = value
    return changes


def _groups(saved: dict[str, Any], optimizer: Optimizer) -> list[dict[str, Any]]:
    groups = saved["param_groups"]
    kinds = [optimizer.defaults.keys() - group.keys() for group in groups]
    sizes = [[len(group["params"]) for group in found] for found in (groups, optimizer.param_groups)]
    if any(kinds) or sizes[0] != sizes[1]:
        raise UserError(
            f"the checkpoint's optimiser is not the configuration's {type(optimizer).__name__}: give the optimiser and "
            "the network that the run began with, or start a new run with --model.weights"
        )
    return groups


def _advance(scheduler: LRScheduler, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimiser has not stepped: it is a new one
        for _ in range(steps):
            scheduler.step()


def _replace(state: dict[str, Any], name: str, value: Any, changes: dict[str, tuple[Any, Any]]) -> None:
    if state.get(name) != value:
        changes[name] = (state.get(name), value)
    state[name] = value
