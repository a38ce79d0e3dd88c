"""What a training step will need, for every way to run a network, and which of them to take: `plan`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import torch
from torch import nn

from efficient_densenet import ops
from efficient_densenet.adopt.adopted import restore
from efficient_densenet.adopt.conversion import convert
from efficient_densenet.adopt.decide import ORDINARY, RECOMPUTE
from efficient_densenet.adopt.report import entries_of, pixels_of
from efficient_densenet.adopt.step import StepMemory, count_step, without_values
from efficient_densenet.adopt.survey import Finding, survey
from efficient_densenet.errors import UserError
from efficient_densenet.execution import KEEP, Keep
from efficient_densenet.units import format_bytes, megabytes, parse_bytes

Optimizer = Literal["none", "sgd", "adam"]
_STATES: dict[Optimizer, int] = {"none": 0, "sgd": 1, "adam": 2}  # values for each of a parameter; sgd with momentum
WAYS = (*KEEP, RECOMPUTE, ORDINARY)
"""The shared buffer's `keep`, the fastest first, and the two other ways."""

_MOST_TRIALS = 6  # a step's memory is nearly a straight line in its batch
_MOST_COUNTED = 1024  # images; larger batches run in more pieces, which take time to count, but not in larger ones


@dataclass(frozen=True)
class PlannedWay:
    """One way to run the network.

    Attributes:
        name: a `keep` of the shared buffer, ``"recompute"`` or ``"ordinary"``.
        parts: bytes that stem, dense blocks and transitions keep for the backward pass, by their names: estimates.
        step: what a step adds to model, gradients and images; `step.kept` is of all parts and what lies between.
        needed: bytes of a step with all that: model, gradients, the optimizer's state and images.
        largest_batch: that fits the memory; None without a limit.
    """

    name: str
    parts: dict[str, float]
    step: StepMemory
    needed: int
    largest_batch: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a training step needs; ``print`` shows it as a table.

    Attributes:
        batch_size: of the step.
        parameters, gradients, state, images: bytes; `parameters` with buffers, `state` of the optimizer.
        ways: in the order of `WAYS`.
        recommended: the name of a way; None: nothing fits.
        reason: for that.
    """

    batch_size: int
    parameters: int
    gradients: int
    state: int
    images: int
    ways: tuple[PlannedWay, ...]
    recommended: str | None
    reason: str

    def __str__(self) -> str:
        about = (
            f"A training step of {self.batch_size} images, in MB: parameters {megabytes(self.parameters)}, gradients "
            f"{megabytes(self.gradients)}, optimizer {megabytes(self.state)}, images {megabytes(self.images)}, and "
            "what follows."
        )
        rows = [["", *(way.name for way in self.ways)]]
        for part in dict.fromkeys(part for way in self.ways for part in way.parts):
            rows.append([part or "(the model)", *(megabytes(way.parts.get(part, 0)) for way in self.ways)])
        rows.append(
            ["the rest, by difference", *(megabytes(way.step.kept - sum(way.parts.values())) for way in self.ways)]
        )
        rows.append(["kept for backward", *(megabytes(way.step.kept) for way in self.ways)])
        rows.append(["peak of the step", *(megabytes(way.step.peak) for way in self.ways)])
        rows.append(["everything", *(megabytes(way.needed) for way in self.ways)])
        if self.ways[0].largest_batch is not None:
            rows.append(["largest batch", *(str(way.largest_batch) for way in self.ways)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            numbers = (cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
            lines.append("  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
        where = [f"{way.name}: the peak falls in {way.step.where}" for way in self.ways]
        chosen = f"Recommended: {self.recommended}, {self.reason}" if self.recommended else self.reason
        return "\n".join([about, "", *lines, "", *where, "", f"{chosen}."])


def plan(
    model: nn.Module,
    image: Sequence[int],
    *,
    batch_size: int = 32,
    memory: int | str | None = None,
    optimizer: Optimizer = "sgd",
    autocast: torch.dtype | None = None,
) -> Plan:
    """What a training step of any network needs in memory, for every way to run it, without running a step.

    The step's own operations run on tensors without values, and all bytes that would be alive are counted. Left out is
    what is no tensor: the interpreter, libraries, and what an allocator cannot use.

    Args:
        model: ordinary or already efficient; is not changed. Its parameters' types are those of the step.
        image: the shape ``(C, *spatial)`` of one image.
        batch_size: images of the step.
        memory: that there is: bytes, or text such as ``"11GB"``; a largest batch is told for each way.
        optimizer: what keeps state for each parameter: ``"none"``, ``"sgd"`` (with momentum) or ``"adam"``.
        autocast: the type of `torch.autocast`, if the step runs in it.

    Raises:
        UserError: the model has no dense blocks or cannot run on such an image, or an argument is not supported.
    """
    memory = _checked(model, batch_size, memory)
    shorter = (autocast or next(model.parameters()).dtype).itemsize / 4  # parts are told in float32
    twin = restore(copy.deepcopy(model))
    findings, pixels = survey(twin), pixels_of(twin, image)
    ways = []
    for name in _as_every_way(twin, findings):
        steps = _Steps(twin, image, optimizer, autocast)
        with ops.nothing_computed():
            told = entries_of(twin, findings, KEEP[0], pixels)
        of_one = {e.name: (e.bytes_before if name == ORDINARY else e.bytes_after) or 0.0 for e in told}
        parts = {part: nbytes * shorter * batch_size for part, nbytes in of_one.items() if nbytes}
        largest = None if memory is None else steps.largest_batch(memory, batch_size)
        ways.append(PlannedWay(name, parts, steps.step(batch_size), steps.needed(batch_size), largest))
    images = batch_size * steps.per_image
    chosen = _recommended(ways, batch_size, memory)
    return Plan(batch_size, steps.parameters, steps.gradients, steps.state, images, tuple(ways), *chosen)


def _checked(model: nn.Module, batch_size: int, memory: int | str | None) -> int | None:
    """The memory in bytes, once the arguments are such as a step can be planned with."""
    if not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
        raise UserError(f"a step is planned for a torch.nn.Module with parameters, not for a {type(model).__name__}")
    memory = parse_bytes(memory) if isinstance(memory, str) else memory
    for name, value in (("batch_size", batch_size), ("memory", memory)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    return memory


def fastest_that_fits(
    model: nn.Module,
    batch: Sequence[int],
    memory: int | str,
    optimizer: Optimizer = "sgd",
    autocast: torch.dtype | None = None,
) -> tuple[Keep, str]:
    """The fastest `keep` whose training step fits, and why, in words. Errors and other arguments: as of `plan`.

    Args:
        batch: the shape ``(N, C, *spatial)`` of the images of a step.
        memory: that there is.

    Raises:
        DoesNotFitError: nothing fits.
    """
    if len(batch) < 3:
        raise UserError(f"batch must be the shape (N, C, *spatial) of the images of a step, not {tuple(batch)}")
    batch_size, *image = batch
    limit = _checked(model, batch_size, memory)
    assert limit is not None
    twin = restore(copy.deepcopy(model))
    before = ""
    for keep, _ in zip(KEEP, _as_every_way(twin, survey(twin)), strict=False):  # the first of `WAYS`
        steps = _Steps(twin, image, optimizer, autocast)
        needed = steps.needed(batch_size)
        if needed <= limit:
            why = f"a step of {batch_size} images needs {format_bytes(needed)} of {format_bytes(limit)}{before}"
            return keep, f'keep="{keep}": {why}'
        before = f", and {format_bytes(needed)} with {keep!r}"
    largest = steps.largest_batch(limit, batch_size)
    raise DoesNotFitError(batch_size, needed, limit, largest)


class DoesNotFitError(UserError):
    """A training step fits with no `keep`; `largest_batch` images would with the smallest, or 0."""

    def __init__(self, batch_size: int, needed: int, memory: int, largest_batch: int) -> None:
        self.largest_batch = largest_batch
        way_out = f"use a batch of at most {largest_batch}" if largest_batch else "use smaller images, or more memory"
        super().__init__(
            f"a training step of {batch_size} images needs {format_bytes(needed)} with keep={KEEP[-1]!r}, the least, "
            f"and {format_bytes(memory)} are allowed: {way_out}"
        )


class _Steps:
    """What training steps of a model need, by their batches; each is counted once, up to `_MOST_COUNTED` images."""

    def __init__(
        self, model: nn.Module, image: Sequence[int], optimizer: Optimizer, autocast: torch.dtype | None
    ) -> None:
        if optimizer not in _STATES:
            raise UserError(f"optimizer must be one of {', '.join(map(repr, get_args(Optimizer)))}, not {optimizer!r}")
        self.counted = cache(lambda batch_size: count_step(model, image, batch_size, autocast))
        self.gradients = _bytes([parameter for parameter in model.parameters() if parameter.requires_grad])
        self.parameters = _bytes([*model.parameters(), *model.buffers()])
        self.state = _STATES[optimizer] * self.gradients
        self.per_image = torch.Size(image).numel() * next(model.parameters()).element_size()

    def step(self, batch_size: int) -> StepMemory:
        """Counted, or, for a larger batch, on the straight line through two that are."""
        if batch_size <= _MOST_COUNTED:
            return self.counted(batch_size)
        few, many = self.counted(_MOST_COUNTED // 2), self.counted(_MOST_COUNTED)
        more = (batch_size - many.batch_size) / (many.batch_size - few.batch_size)
        kept, peak = (b + int(more * (b - a)) for a, b in ((few.kept, many.kept), (few.peak, many.peak)))
        return replace(many, batch_size=batch_size, kept=kept, peak=peak, trace=())

    def needed(self, batch_size: int) -> int:
        """Bytes of everything."""
        constant = self.parameters + self.gradients + self.state
        return constant + batch_size * self.per_image + self.step(batch_size).peak

    def largest_batch(self, memory: int, first: int) -> int:
        """The largest that fits. Where the line through two that are counted meets the limit is the next to count."""
        before, batch_size = first, first + 1
        for _ in range(_MOST_TRIALS):
            per_image = (self.needed(batch_size) - self.needed(before)) / (batch_size - before)
            following = max(1, batch_size + int((memory - self.needed(batch_size)) // max(per_image, 1)))
            if following in (before, batch_size):
                break
            before, batch_size = batch_size, following
        while batch_size and self.needed(batch_size) > memory:
            batch_size -= max(1, batch_size // 100)
        return batch_size


def _as_every_way(model: nn.Module, findings: Sequence[Finding]) -> Iterator[str]:
    """Have a model, of which that is what `survey` finds, run in each of `WAYS`, on tensors without values."""
    convert(model, KEEP[0], findings=findings)
    without_values(model)
    for keep in KEEP:
        convert(model, keep)
        yield keep
    convert(model, KEEP[0], "recompute")
    yield RECOMPUTE
    restore(model)
    yield ORDINARY


def _recommended(ways: Sequence[PlannedWay], batch_size: int, memory: int | None) -> tuple[str | None, str]:
    """A way, and why: the fastest of the shared buffer that fits."""
    shared = ways[: len(KEEP)]
    if memory is None:
        return shared[0].name, "the fastest; a memory limit would tell whether it fits"
    for i, way in enumerate(shared):
        if way.needed <= memory:
            reason = "the fastest" if i == 0 else f"for {shared[i - 1].name} needs {format_bytes(shared[i - 1].needed)}"
            return way.name, f"{reason}; {way.largest_batch} images fit into {format_bytes(memory)}"
    most = max(shared, key=lambda way: way.largest_batch or 0)
    return None, f"{batch_size} images do not fit into {format_bytes(memory)}; {most.largest_batch} do with {most.name}"


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
