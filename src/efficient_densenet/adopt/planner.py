"""What a training step will need, for every way to run a network, and which of them to take: `plan`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from efficient_densenet.adopt.adopted import restore
from efficient_densenet.adopt.conversion import make_efficient
from efficient_densenet.adopt.report import Entry, entries_of
from efficient_densenet.adopt.step import Peak, peak_of_step
from efficient_densenet.errors import UserError
from efficient_densenet.execution import KEEP

Optimizer = Literal["none", "sgd", "adam"]
_STATES: dict[Optimizer, int] = {"none": 0, "sgd": 1, "adam": 2}  # values for each of a parameter; sgd with momentum
RECOMPUTE, ORDINARY = "recompute", "ordinary"
WAYS = (*KEEP, RECOMPUTE, ORDINARY)
"""The shared buffer's `keep`, the fastest first, and the two other ways."""


@dataclass(frozen=True)
class Way:
    """One way to run the network.

    Attributes:
        name: a `keep` of the shared buffer, ``"recompute"`` or ``"ordinary"``.
        parts: bytes that stem, dense blocks and transitions keep for the backward pass of one image, by their names.
        peak: of a training step.
        needed: bytes at the batch size: the peak, images, parameters, gradients and state; None without a batch size.
        largest_batch: that fits the memory; None without a limit.
    """

    name: str
    parts: dict[str, float]
    peak: Peak
    needed: int | None = None
    largest_batch: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a training step needs; ``print`` shows it as a table.

    Attributes:
        parameters, gradients, state: bytes; `parameters` with buffers, `state` of the optimizer.
        image: bytes of one.
        ways: in the order of `WAYS`.
        recommended: the name of a way; None: nothing fits.
        reason: for that.
    """

    parameters: int
    gradients: int
    state: int
    image: int
    ways: tuple[Way, ...]
    recommended: str | None
    reason: str

    @property
    def constant(self) -> int:
        """Bytes whatever the batch, besides workspaces."""
        return self.parameters + self.gradients + self.state

    def __str__(self) -> str:
        lines = [
            f"Parameters {_mb(self.parameters)}, gradients {_mb(self.gradients)}, optimizer {_mb(self.state)}, "
            f"an image {_mb(self.image)}.",
            "",
            "Kept for the backward pass of one image, in MB, by part:",
            "",
        ]
        names = [way.name for way in self.ways]
        parts = dict.fromkeys(part for way in self.ways for part in way.parts)
        rows = [["", *names]]
        rows += [
            [part or "(the model)", *(f"{way.parts.get(part, 0) / 1e6:.2f}" for way in self.ways)] for part in parts
        ]
        rows.append(["peak of a step, for each image", *(f"{way.peak.per_image / 1e6:.2f}" for way in self.ways)])
        rows.append(["and for a batch of any size", *(f"{way.peak.constant / 1e6:.2f}" for way in self.ways)])
        if self.ways[0].needed is not None:
            rows.append(["everything, at this batch size", *(f"{(way.needed or 0) / 1e6:.1f}" for way in self.ways)])
        if self.ways[0].largest_batch is not None:
            rows.append(["largest batch", *(str(way.largest_batch) for way in self.ways)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells).rstrip())
        where = [f"{way.name}: the peak falls in {way.peak.where}" for way in self.ways]
        chosen = (
            f"Recommended: {self.recommended}, {self.reason}" if self.recommended else f"Nothing fits: {self.reason}"
        )
        return "\n".join([*lines, "", *where, "", f"{chosen}."])


def plan(
    model: nn.Module,
    image: Sequence[int],
    *,
    batch_size: int | None = None,
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
        batch_size: for which the memory is told, and has to suffice.
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
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = _bytes(trained)
    parameters, state = _bytes([*model.parameters(), *model.buffers()]), _STATES[optimizer] * gradients
    like = next(model.parameters())
    per_image = torch.Size(image).numel() * like.element_size()
    ways = []
    for name, twin, told in _as_every_way(model, image):
        parts = {e.name: (e.bytes_before if name == ORDINARY else e.bytes_after) or 0.0 for e in told}
        shorter = (autocast or like.dtype).itemsize / 4  # the report tells float32
        way = Way(name, {k: v * shorter for k, v in parts.items() if v}, peak_of_step(twin, image, autocast))
        step, constant = way.peak.per_image + per_image, way.peak.constant + parameters + gradients + state
        if batch_size is not None:
            way = replace(way, needed=round(constant + batch_size * step))
        if memory is not None:
            way = replace(way, largest_batch=max(0, int((memory - constant) // step)))
        ways.append(way)
    return Plan(parameters, gradients, state, per_image, tuple(ways), *_recommended(ways, batch_size, memory))


def _as_every_way(model: nn.Module, image: Sequence[int]) -> Iterator[tuple[str, nn.Module, tuple[Entry, ...]]]:
    twin = copy.deepcopy(model)
    for keep in KEEP:
        make_efficient(twin, keep)
        yield keep, twin, entries_of(twin, image=image)
    make_efficient(twin, way="recompute")
    yield RECOMPUTE, twin, entries_of(twin, image=image)
    restore(twin)
    yield ORDINARY, twin, entries_of(twin, image=image)


def _recommended(ways: Sequence[Way], batch_size: int | None, memory: int | None) -> tuple[str | None, str]:
    """A way, and why: the fastest of the shared buffer that fits."""
    shared = ways[: len(KEEP)]
    if memory is None:
        return shared[0].name, "the fastest; a memory limit would tell whether it fits"
    wanted = batch_size or 1
    for i, way in enumerate(shared):
        if (way.largest_batch or 0) >= wanted:
            reason = (
                "the fastest" if i == 0 else f"for {shared[i - 1].name!r} holds {shared[i - 1].largest_batch} images"
            )
            return way.name, f"{reason}; {way.largest_batch} images fit into {_mb(memory)}"
    most = max(shared, key=lambda way: way.largest_batch or 0)
    return None, f"{wanted} images do not; {most.largest_batch} do with {most.name!r}"


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
