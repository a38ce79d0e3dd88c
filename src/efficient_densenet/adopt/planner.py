"""What a training step will need, for every way to run a network, and which of them to take: `plan`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import nn

from efficient_densenet.adopt.adopted import restore
from efficient_densenet.adopt.conversion import make_efficient
from efficient_densenet.adopt.report import entries_of
from efficient_densenet.adopt.step import StepMemory, step_memory
from efficient_densenet.errors import UserError
from efficient_densenet.execution import KEEP

Optimizer = Literal["none", "sgd", "adam"]
_STATES: dict[Optimizer, int] = {"none": 0, "sgd": 1, "adam": 2}  # values for each of a parameter; sgd with momentum
RECOMPUTE, ORDINARY = "recompute", "ordinary"
WAYS = (*KEEP, RECOMPUTE, ORDINARY)
"""The shared buffer's `keep`, the fastest first, and the two other ways."""

_MOST_TRIALS = 6  # a step's memory is nearly a straight line in its batch


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
            f"A training step of {self.batch_size} images, in MB: parameters {_mb(self.parameters)}, gradients "
            f"{_mb(self.gradients)}, optimizer {_mb(self.state)}, images {_mb(self.images)}, and what follows."
        )
        rows = [["", *(way.name for way in self.ways)]]
        for part in dict.fromkeys(part for way in self.ways for part in way.parts):
            rows.append([part or "(the model)", *(_mb(way.parts.get(part, 0)) for way in self.ways)])
        rows.append(["the rest, by difference", *(_mb(way.step.kept - sum(way.parts.values())) for way in self.ways)])
        rows.append(["kept for backward", *(_mb(way.step.kept) for way in self.ways)])
        rows.append(["peak of the step", *(_mb(way.step.peak) for way in self.ways)])
        rows.append(["everything", *(_mb(way.needed) for way in self.ways)])
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
    memory: int | None = None,
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
        memory: bytes that there are; a largest batch is told for each way.
        optimizer: what keeps state for each parameter: ``"none"``, ``"sgd"`` (with momentum) or ``"adam"``.
        autocast: the type of `torch.autocast`, if the step runs in it.

    Raises:
        UserError: the model has no dense blocks or cannot run on such an image, or an argument is not supported.
    """
    if optimizer not in _STATES:
        raise UserError(f"optimizer must be one of {', '.join(map(repr, get_args(Optimizer)))}, not {optimizer!r}")
    for name, value in (("batch_size", batch_size), ("memory", memory)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    gradients = _bytes([parameter for parameter in model.parameters() if parameter.requires_grad])
    parameters, state = _bytes([*model.parameters(), *model.buffers()]), _STATES[optimizer] * gradients
    like = next(model.parameters())
    per_image = torch.Size(image).numel() * like.element_size()
    shorter = (autocast or like.dtype).itemsize / 4  # parts are told in float32
    ways = []
    for name, twin in _as_every_way(model):
        step = cache(lambda n, twin=twin: step_memory(twin, image, n, autocast))

        def needed(n: int, step: Callable[[int], StepMemory] = step) -> int:
            return parameters + gradients + state + n * per_image + step(n).peak

        told = entries_of(twin, image=image)
        of_one = {e.name: (e.bytes_before if name == ORDINARY else e.bytes_after) or 0.0 for e in told}
        parts = {part: nbytes * shorter * batch_size for part, nbytes in of_one.items() if nbytes}
        largest = None if memory is None else _largest_batch(needed, batch_size, memory)
        ways.append(PlannedWay(name, parts, step(batch_size), needed(batch_size), largest))
    chosen = _recommended(ways, batch_size, memory)
    return Plan(batch_size, parameters, gradients, state, batch_size * per_image, tuple(ways), *chosen)


def _as_every_way(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    twin = copy.deepcopy(model)
    for keep in KEEP:
        yield keep, make_efficient(twin, keep)
    yield RECOMPUTE, make_efficient(twin, way="recompute")
    yield ORDINARY, restore(twin)


def _largest_batch(needed: Callable[[int], int], first: int, memory: int) -> int:
    """The largest batch that fits. Each is counted; where the line through two of them meets the limit is the next."""
    before, batch_size = first, first + 1
    for _ in range(_MOST_TRIALS):
        per_image = (needed(batch_size) - needed(before)) / (batch_size - before)
        following = max(1, batch_size + int((memory - needed(batch_size)) // max(per_image, 1)))
        if following in (before, batch_size):
            break
        before, batch_size = batch_size, following
    while batch_size and needed(batch_size) > memory:
        batch_size -= max(1, batch_size // 100)
    return batch_size


def _recommended(ways: Sequence[PlannedWay], batch_size: int, memory: int | None) -> tuple[str | None, str]:
    """A way, and why: the fastest of the shared buffer that fits."""
    shared = ways[: len(KEEP)]
    if memory is None:
        return shared[0].name, "the fastest; a memory limit would tell whether it fits"
    for i, way in enumerate(shared):
        if way.needed <= memory:
            reason = "the fastest" if i == 0 else f"for {shared[i - 1].name} needs {_mb(shared[i - 1].needed)} MB"
            return way.name, f"{reason}; {way.largest_batch} images fit into {_mb(memory)} MB"
    most = max(shared, key=lambda way: way.largest_batch or 0)
    return None, f"{batch_size} images do not fit into {_mb(memory)} MB; {most.largest_batch} do with {most.name}"


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f}"
