"""`make_efficient`, and the `keep` that it takes where the memory decides."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from efficient_densenet.adopt.conversion import convert
from efficient_densenet.adopt.decide import WAYS, Way
from efficient_densenet.adopt.planner import fastest_that_fits
from efficient_densenet.errors import UserError
from efficient_densenet.execution import AUTO, Auto, Keep, check_keep

_log = logging.getLogger(__name__)


def make_efficient(
    model: nn.Module,
    keep: Keep | Auto = "bottleneck",
    way: Way = "shared",
    *,
    memory: int | str | None = None,
    batch: Sequence[int] | None = None,
) -> nn.Module:
    """Make the dense blocks of any model run on the shared buffer, in place, and return the model.

    Dense blocks, transitions and the sequences that run them are recognised by what they compute: their forward is
    recorded on a few random pixels, and compared with what would run instead. Their objects get another class;
    parameters, buffers, keys, hooks and modes stay the very same. Blocks of other norms, activations or convolutions
    recompute instead, which needs more memory and is exact. See `report` for what became of each part, and `restore`
    to undo it.

    Gradients agree with the ordinary model's up to rounding; running statistics move once per step.

    Args:
        model: from torchvision, timm, MONAI, this library, or any other source; calling this again changes `keep` and
            `way`.
        keep: what stays in memory for backward: ``"bottleneck"`` features and bottleneck outputs (fastest),
            ``"features"`` the features alone, ``"inputs"`` the inputs of the blocks alone (smallest); ``"auto"``: the
            fastest of them with which a training step fits into `memory`, as `plan` counts it, for SGD with momentum
            and in the types of the parameters. What was chosen and why is logged as information.
        way: ``"shared"``, or ``"recompute"``: the ordinary operations, which forget concatenations, norms and
            activations and compute them again in backward. It needs more memory (`keep` does not matter), is equal
            to the ordinary model in every bit, and has gradients of gradients, which ``"shared"`` refuses.
        memory: with ``keep="auto"``, what a step may take: bytes, or text such as ``"11GB"``.
        batch: with ``keep="auto"``, the shape ``(N, C, *spatial)`` of the images of a step.

    Raises:
        UserError: `keep` or `way` is no such word, the model is no module, nothing in it is a dense block, or nothing
            fits.
    """
    if way not in WAYS:
        raise UserError(f"way must be one of {', '.join(map(repr, WAYS))}, not {way!r}")
    convert(model, chosen_keep(model, keep, way, memory, batch), way)
    return model


def chosen_keep(
    model: nn.Module, keep: Keep | Auto, way: Way, memory: int | str | None, batch: Sequence[int] | None
) -> Keep:
    """`keep`, or what it is where the memory decides. Arguments and errors are those of `make_efficient`."""
    check_keep(keep, AUTO)
    if keep != AUTO:
        if memory is not None or batch is not None:
            raise UserError(f'memory and batch decide what keep="auto" is, and keep is {keep!r}: leave them out')
        return keep
    if way != "shared" or memory is None or batch is None:
        raise UserError(
            'keep="auto" is for the shared buffer, and needs memory, such as "11GB", and batch, the shape (N, C, H, W) '
            "of the images of a training step"
        )
    found, reason = fastest_that_fits(model, batch, memory)
    _log.info(reason)
    return found
