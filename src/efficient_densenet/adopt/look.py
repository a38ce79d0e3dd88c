"""Look at what modules compute: record their forward, and try on the same tensors whether the plan does the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from efficient_densenet.adopt.chain import Chain, conclude
from efficient_densenet.adopt.conditions import conditions
from efficient_densenet.adopt.meanings import NotDenseError, OtherWidthError
from efficient_densenet.adopt.record import Record
from efficient_densenet.adopt.trial import Tensors, attributes, on_trial, stored
from efficient_densenet.execution import shared
from efficient_densenet.execution.plan import parts

_SIZES = ((2, (4, 3, 3)), (3, (3, 5, 4)))  # images and pixels: odd and even, and an inside of a 3×3 window
_QUICK_SIZE = 8  # pixels
_TOLERANCE = 1e-3  # relative, in single precision: another function is off by more than a tenth


@dataclass(frozen=True)
class Look:
    """What modules that run in a row compute.

    Attributes:
        conditions: under which they do, see `conditions`.
        chain: what they compute; None if it is none of these things.
        sizes: whether their forward asks for the size of a tensor, and may depend on it.
        reason: why they cannot run on the shared buffer, if so.
        training: whether the first of them is in training.
        by_size: for each size of the input that was met, why the chain does not hold for it, if so; see `sizes`.
    """

    conditions: tuple[Any, ...]
    chain: Chain | None
    sizes: bool
    reason: str | None
    training: bool
    by_size: dict[torch.Size, str | None] = field(default_factory=dict, compare=False)


def look(
    roots: Sequence[nn.Module],
    tensors: Tensors,
    width: int | None = None,
    modes: Sequence[bool | None] = (True, False),
    tried: bool = True,
    head: bool = False,
) -> list[Look]:
    """What these modules compute, one after the other, in each mode.

    Args:
        roots: the modules.
        tensors: to try them with.
        width: channels of the input; None: to be found out.
        modes: training or evaluation for all of them; None: the modes in which they are.
        tried: whether to try it on two sizes of input and batch, not only to record it on one.
        head: whether they end with a norm, which relu and the mean over all pixels follow.

    Raises:
        NotDenseError: it is none of what `Chain` describes.
    """
    modules = parts(roots)
    dims, found = _dims(modules), []
    width = width or _some_width(modules)
    with on_trial(modules, tensors):
        for mode in modes:
            training = roots[0].training if mode is None else mode
            synchronises = _set_modes(modules, mode)
            _, here = conditions(roots)
            _leave_others_out(modules, synchronises)
            chains, sizes = [], False
            # In evaluation a second size would show nothing that training has not shown.
            for n, size in _SIZES if tried and mode is not False else _SIZES[:1]:
                width, chain, asked = _look(
                    roots, modules, synchronises, tensors, (n, width, *size[:dims]), tried, head
                )
                chains.append(chain)
                sizes |= asked
            chain = chains[0]
            if any(other != chain for other in chains):
                chain = replace(chain, plan=None, reason="what it computes depends on the size of its input")
            found.append(Look(here, chain, sizes, chain.reason, training))
    return found


def look_at_size(roots: Sequence[nn.Module], shape: Sequence[int]) -> Chain:
    """What these modules compute for an input of this shape, without computing anything.

    Raises:
        NotDenseError: as for `look`.
    """
    modules, tensors = parts(roots), Tensors("meta")
    with on_trial(modules, tensors):
        synchronises = _set_modes(modules, None)
        _leave_others_out(modules, synchronises)
        return _look(roots, modules, synchronises, tensors, shape, False)[1]


def _look(
    roots: Sequence[nn.Module],
    modules: Sequence[nn.Module],
    synchronises: dict[int, bool],
    tensors: Tensors,
    shape: Sequence[int],
    tried: bool,
    head: bool = False,
) -> tuple[int, Chain, bool]:
    """The channels of the input, what it computes, and whether its forward asks for sizes."""
    record = Record(modules, synchronises)
    before, buffers = attributes(modules), [b for m in modules for b in m._buffers.values() if b is not None]
    values = [b.clone() for b in buffers]
    x = output = tensors.activation(*shape)
    try:
        torch.manual_seed(0)
        for module in roots:
            output = record.run(module, output)
    except OtherWidthError as error:
        if error.width == shape[1]:
            raise NotDenseError("it reads its input in different ways") from error
        shape = (shape[0], error.width, *shape[2:])
        return _look(roots, modules, synchronises, tensors, shape, tried, head)
    except NotDenseError:
        raise
    except Exception as error:  # whatever it is: the module stays as it is, and the report says why
        raise NotDenseError(f"it could not be tried: {type(error).__name__}: {error}") from error
    chain = conclude(record, output, head)
    after = [b.clone() for b in buffers]
    _set(buffers, values)
    name = stored(modules, before)
    if name is not None:
        chain = replace(chain, plan=None, reason=f"its forward stores {name!r} in a module")
    elif record.looks_at_values:
        chain = replace(chain, plan=None, reason="its forward looks at the values of weights or buffers")
    elif tried and chain.plan is not None:
        if head:
            output = output.relu().mean(tuple(range(2, output.dim())))
        torch.manual_seed(0)
        made = shared.run(x, chain.plan, modules, "features")
        pairs = zip([output, *after], [made, *buffers], strict=True)
        if not all(_agree(actual, expected) for expected, actual in pairs):
            raise NotDenseError("what it returns, or a buffer after it, is another than that of dense layers")
        _set(buffers, values)
    return shape[1], chain, record.looks_at_sizes


def _set(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def find(roots: Sequence[nn.Module], tensors: Tensors) -> list[Chain | None]:
    """What the first, the first two, ... of these modules compute, one after the other, by a quick look.

    Returns:
        None where that is nothing whole; up to the first module that cannot belong to what was before it.
    """
    modules = parts(roots)
    dims, width = _dims(modules), _some_width(modules)
    while True:
        found: list[Chain | None] = []
        try:
            with on_trial(modules, tensors):
                synchronises = _set_modes(modules, True)
                _leave_others_out(modules, synchronises)
                record = Record(modules, synchronises)
                x = tensors.activation(2, width, *(_QUICK_SIZE,) * dims)
                for module in roots:
                    x = record.run(module, x)
                    found.append(_conclusion(record, x))
        except OtherWidthError as error:
            if not found and error.width != width:
                width = error.width
                continue
        except Exception:  # whatever it is: here it ends
            pass
        return found


def _conclusion(record: Record, x: Tensor) -> Chain | None:
    try:
        return conclude(record, x)
    except NotDenseError:
        return None


def _set_modes(modules: Sequence[nn.Module], training: bool | None) -> dict[int, bool]:
    """Set the mode, if one is given; and tell of each module in training whether it is a synchronised norm."""
    if training is not None:
        for module in modules:
            module.__dict__["training"] = training
    return {i: isinstance(m, nn.SyncBatchNorm) for i, m in enumerate(modules) if m.__dict__["training"]}


def _leave_others_out(modules: Sequence[nn.Module], synchronises: dict[int, bool]) -> None:
    """Put synchronised norms into evaluation: one process alone cannot try how they agree with those of others."""
    for i, is_sync in synchronises.items():
        if is_sync:
            modules[i].training = False


def _dims(modules: Sequence[nn.Module]) -> int:
    """The spatial dimensions that convolutions in these modules have; without any, those in names like BatchNorm3d."""
    weights = [p for m in modules for p in m._parameters.values() if p is not None and p.dim() > 2]
    if weights:
        return weights[0].dim() - 2
    names = [type(m).__name__ for m in modules]
    return next((int(name[-2]) for name in names if name.endswith(("1d", "2d", "3d"))), 2)


def _some_width(modules: Sequence[nn.Module]) -> int:
    """Some number of channels: that of the first norm."""
    vectors = [t for m in modules for t in [*m._parameters.values(), *m._buffers.values()] if t is not None]
    return next((len(t) for t in vectors if t.dim() == 1), 1)


def _agree(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return not b.numel() or bool((a.double() - b.double()).abs().max() <= _TOLERANCE * b.double().abs().max())
