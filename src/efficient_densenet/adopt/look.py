"""Look at what modules compute: record their forward, and try on the same tensors whether the plan does the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from efficient_densenet.adopt.chain import Chain, conclude, join
from efficient_densenet.adopt.conditions import conditions
from efficient_densenet.adopt.meanings import NotDenseError, OtherWidthError
from efficient_densenet.adopt.record import Record
from efficient_densenet.adopt.trial import Tensors, attributes, on_trial, random_states, stored
from efficient_densenet.execution import shared
from efficient_densenet.execution.operands import UnsuitableError
from efficient_densenet.execution.plan import parts

_SIZES = ((2, (4, 3, 3)), (3, (3, 5, 4)))  # images and pixels: odd and even, and an inside of a 3×3 window
_OTHER_SIZES = (8, 16, 32, 64, 7, 14, 28, 56, 128, 256, 512, 1000)  # along each dimension
_MOST_PIXELS = 4096
_TOLERANCE = 1e-3  # relative, in single precision: another function is off by more than a tenth


class NotTriedError(NotDenseError):
    """Its forward raised an error: perhaps not on an input of another size."""


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
    by_size: dict[torch.Size, NotDenseError | None] = field(default_factory=dict, compare=False)


def look(
    roots: Sequence[nn.Module],
    tensors: Tensors,
    modes: Sequence[bool | None] = (True, False),
    head: bool = False,
    tried: bool = True,
) -> list[Look]:
    """What these modules compute, one after the other, in each mode.

    Args:
        roots: the modules.
        tensors: what they hold meanwhile.
        modes: training or evaluation for all of them; None: the modes in which they are.
        head: whether they end with a norm, which relu and the mean over all pixels follow.
        tried: whether what would run instead is compared with them, on two sizes of input and batch; otherwise they
            are only recorded, on one.

    Raises:
        NotDenseError: it is none of what `Chain` describes.
    """
    modules = parts(roots)
    if _any_lazy(modules):
        raise NotDenseError(
            "some of its parameters have no shape yet: call the model once on an image, then make_efficient"
        )
    dims = _dims(modules)
    sizes: list[tuple[int, ...]] = [(n, *size[:dims]) for n, size in _SIZES]
    sizes = sizes if tried else sizes[:1]
    try:
        return _look_at_sizes(roots, modules, tensors, modes, sizes, head, tried)
    except NotTriedError:
        sides = _sides_that_run(roots, _some_width(modules), dims)
        if not sides:
            raise
        sizes = [(2, *[sides[0]] * dims), (3, *[sides[-1]] * dims)][: len(sizes)]
        return _look_at_sizes(roots, modules, tensors, modes, sizes, head, tried)


def look_at_both(block: nn.Module, tail: nn.Module, looks: Sequence[Look], tails: Sequence[Look]) -> list[Look] | None:
    """What a block and a transition or norm behind it compute together, from what was found of each, in each mode.

    None where the two share modules, or do not fit together on the shared buffer in one of the modes.
    """
    modules, found = parts([block, tail]), []
    offset = len(parts([block]))
    if len(modules) > offset + len(parts([tail])):
        return None
    with on_trial(modules, Tensors("meta")):
        for first, second in zip(looks, tails, strict=True):
            chain = None if first.chain is None or second.chain is None else join(first.chain, second.chain, offset)
            if chain is None:
                return None
            _set_modes(modules, first.training)
            here = conditions([block, tail])[-1]
            found.append(Look(here, chain, first.sizes or second.sizes, None, first.training))
    return found


def _look_at_sizes(
    roots: Sequence[nn.Module],
    modules: Sequence[nn.Module],
    tensors: Tensors,
    modes: Sequence[bool | None],
    sizes: Sequence[tuple[int, ...]],
    head: bool,
    tried: bool,
) -> list[Look]:
    width, found = _some_width(modules), []
    with on_trial(modules, tensors):
        for mode in modes:
            training = roots[0].training if mode is None else mode
            synchronises = _set_modes(modules, mode)
            here = conditions(roots)[-1]
            _leave_others_out(modules, synchronises)
            chains, asks = [], False
            for n, *size in sizes:
                width, chain, asked = _look(roots, modules, synchronises, tensors, (n, width, *size), tried, head)
                chains.append(chain)
                asks |= asked
            chain = chains[0]
            if any(other != chain for other in chains):
                chain = replace(chain, plan=None, reason="what it computes depends on the size of its input")
            found.append(Look(here, chain, asks, chain.reason, training))
    return found


def _sides_that_run(roots: Sequence[nn.Module], width: int, dims: int) -> list[int]:
    """Up to two sizes along each dimension at which no forward raises an error; found without computing anything.

    Raises:
        NotDenseError: at such a size it is none of what `Chain` describes.
    """
    found: list[int] = []
    for side in _OTHER_SIZES:
        if side**dims <= _MOST_PIXELS and len(found) < 2:
            with suppress(NotTriedError):
                look_at_size(roots, (2, width, *[side] * dims))
                found.append(side)
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
        return _look(roots, modules, synchronises, tensors, shape, tried=False, head=False)[1]


def _look(
    roots: Sequence[nn.Module],
    modules: Sequence[nn.Module],
    synchronises: dict[int, bool],
    tensors: Tensors,
    shape: Sequence[int],
    tried: bool,
    head: bool,
) -> tuple[int, Chain, bool]:
    """The channels of the input, what it computes, and whether its forward asks for sizes."""
    record = Record(modules, synchronises)
    before, states = attributes(modules), random_states(modules)
    buffers = [b for m in modules for b in m._buffers.values() if b is not None]
    values = [b.clone() for b in buffers]
    x = output = tensors.activation(*shape)
    try:
        torch.default_generator.manual_seed(0)  # the CPU's: nothing here runs on a GPU, whose state nobody restores
        for module in roots:
            output = record.run(module, output)
        chain = conclude(record, output, head)
    except OtherWidthError as error:
        if error.width == shape[1]:
            raise NotDenseError("it reads its input in different ways") from error
        shape = (shape[0], error.width, *shape[2:])
        return _look(roots, modules, synchronises, tensors, shape, tried, head)
    except NotDenseError as error:
        reason = _RANDOM if random_states(modules) != states else str(error)
        raise NotDenseError(reason, record.joins_input) from error
    except Exception as error:  # whatever it is: the module stays as it is, and the report says why
        raise NotTriedError(f"it could not be tried: {type(error).__name__}: {error}") from error
    after = [b.clone() for b in buffers]
    _set(buffers, values)
    name = stored(before, attributes(modules))
    if name is not None:
        chain = replace(chain, plan=None, reason=f"its forward stores {name!r} in a module")
    elif random_states(modules) != states:
        chain = replace(chain, plan=None, reason=_RANDOM)
    elif record.looks_at_values:
        chain = replace(chain, plan=None, reason="its forward looks at the values of weights or buffers")
    elif tried and chain.plan is not None:
        if head:
            output = output.relu().mean(tuple(range(2, output.dim())))
        torch.default_generator.manual_seed(0)
        try:
            made = shared.run(x, chain.plan, modules, "features")
        except UnsuitableError as error:  # what a parametrization computes is not known before
            return shape[1], replace(chain, plan=None, reason=str(error)), record.looks_at_sizes
        pairs = zip([output, *after], [made, *buffers], strict=True)
        if not all(_agree(actual, expected) for expected, actual in pairs):
            raise NotDenseError("what it returns, or a buffer after it, is another than that of dense layers")
        _set(buffers, values)
    return shape[1], chain, record.looks_at_sizes


_RANDOM = "its forward draws random numbers of Python or NumPy, or of a generator of its own"


def _set(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        if tensor.shape != value.shape:  # observers of quantisation make their buffers larger at the first call
            tensor.resize_(value.shape)
        tensor.copy_(value)


def find(roots: Sequence[nn.Module], tensors: Tensors) -> list[Chain | None]:
    """What the first, the first two, ... of these modules compute, one after the other: recorded, not tried.

    Returns:
        None where that is nothing whole; up to the first module that cannot belong to what was before it.
    """
    modules = parts(roots)
    most: list[Chain | None] = []
    for side in _OTHER_SIZES:
        found, failed = _find(roots, modules, tensors, (2, _some_width(modules), *[side] * _dims(modules)))
        most = max(most, found, key=len)
        if not failed:
            break
    return most


def _find(
    roots: Sequence[nn.Module], modules: Sequence[nn.Module], tensors: Tensors, shape: Sequence[int]
) -> tuple[list[Chain | None], bool]:
    """As `find`, for an input of this shape (perhaps of other channels); and whether a forward raised an error."""
    found: list[Chain | None] = []
    try:
        with _recording(modules, tensors) as record:
            x = tensors.activation(*shape)
            for module in roots:
                x = record.run(module, x)
                found.append(_conclusion(record, x))
    except OtherWidthError as error:
        if not found and error.width != shape[1]:
            return _find(roots, modules, tensors, (shape[0], error.width, *shape[2:]))
    except NotDenseError:
        pass
    except Exception:  # whatever it is: here it ends
        return found, True
    return found, False


class Joins(NamedTuple):
    """What modules concatenate after a convolution has run: their input, what they have concatenated before."""

    input: bool = False
    again: bool = False


def joins(module: nn.Module, tensors: Tensors) -> Joins:
    """What the module concatenates, whatever else it computes: recorded, not tried."""
    modules = parts([module])
    if not _any_lazy(modules):
        for side in _OTHER_SIZES:
            shape = (2, _some_width(modules), *[side] * _dims(modules))
            found = _joins(module, modules, tensors, shape) if prod(shape[2:]) <= _MOST_PIXELS else None
            if found is not None:
                return found
    return Joins()


def _joins(module: nn.Module, modules: Sequence[nn.Module], tensors: Tensors, shape: Sequence[int]) -> Joins | None:
    """As `joins`, for an input of this shape (perhaps of other channels); None where the forward raised an error."""
    try:
        with _recording(modules, tensors, to_the_end=True) as record, suppress(NotDenseError):
            record.run(module, tensors.activation(*shape))
    except OtherWidthError as error:
        other = (shape[0], error.width, *shape[2:])
        return None if error.width == shape[1] else _joins(module, modules, tensors, other)
    except Exception:  # whatever it is: it takes something else than one tensor of this size
        return None
    return Joins(record.joins_input, record.joins_again)


@contextmanager
def _recording(modules: Sequence[nn.Module], tensors: Tensors, to_the_end: bool = False) -> Iterator[Record]:
    """A record of modules in training, which hold these tensors meanwhile."""
    with on_trial(modules, tensors):
        synchronises = _set_modes(modules, True)
        _leave_others_out(modules, synchronises)
        yield Record(modules, synchronises, to_the_end)


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
    return {i: isinstance(m, nn.SyncBatchNorm) for i, m in enumerate(modules) if m.__dict__.get("training")}


def _leave_others_out(modules: Sequence[nn.Module], synchronises: dict[int, bool]) -> None:
    """Put synchronised norms into evaluation: one process alone cannot try how they agree with those of others."""
    for i, is_sync in synchronises.items():
        if is_sync:
            modules[i].training = False


def _any_lazy(modules: Sequence[nn.Module]) -> bool:
    held = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
    return any(is_lazy(tensor) for tensor in held if tensor is not None)


def _dims(modules: Sequence[nn.Module]) -> int:
    """The spatial dimensions that convolutions in these modules have; without any, those in names like BatchNorm3d."""
    weights = [t for t in _tensors(modules) if t.dim() > 2]
    if weights:
        return weights[0].dim() - 2
    names = [type(m).__name__ for m in modules]
    return next((int(name[-2]) for name in names if name.endswith(("1d", "2d", "3d"))), 2)


def _some_width(modules: Sequence[nn.Module]) -> int:
    """Some number of channels: that of the first norm."""
    return next((len(t) for t in _tensors(modules) if t.dim() == 1), 1)


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Parameters and buffers, but those that have no shape yet."""
    found = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
    return [t for t in found if t is not None and not is_lazy(t)]


def _agree(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return not b.numel() or bool((a.double() - b.double()).abs().max() <= _TOLERANCE * b.double().abs().max())
