"""What `make_efficient` did or would do to a model, as a table that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from efficient_densenet.adopt import read
from efficient_densenet.adopt.adopted import RECOMPUTE, Adopted, AdoptedBlock, AdoptedTransition, original_class
from efficient_densenet.adopt.survey import Finding, survey
from efficient_densenet.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        name: in the model.
        was: its class, and the package that it is from.
        now: how it runs; empty if it was left alone.
        keep: as in `make_efficient`; empty where it was left alone, or where nothing can be chosen.
        reason: why it was left, or why it does not run on the shared buffer.
        channels: that it reads and makes; empty where that is unknown.
        values_before, values_after: that are kept for the backward pass, per pixel of its input; None if unknown.
        pixels: of its input for one image; None without an image.
    """

    name: str
    was: str
    now: str
    keep: str
    reason: str
    channels: str = ""
    values_before: int | None = None
    values_after: int | None = None
    pixels: int | None = None


@dataclass(frozen=True)
class Report:
    """What became of each module; ``print`` shows it as a table."""

    entries: tuple[Entry, ...]
    image: tuple[int, ...] | None = None  # the shape (C, *spatial) for which memory is told

    @property
    def adopted(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.now]

    def __str__(self) -> str:
        rows = [("module", "was", "now", "channels", *self._memory_heads()), *(self._row(e) for e in self.entries)]
        if self.image is not None:
            known = [e for e in self.entries if e.values_before is not None]
            total = [
                sum(v * (e.pixels or 0) for e, v in ((e, v) for e in known for v in (pick(e),))) for pick in _PICKS
            ]
            rows.append(("together", "", "", "", *(_megabytes(t) for t in total)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        reasons = [f"{e.name or 'the model'}: {e.reason}" for e in self.entries if e.reason]
        return "\n".join([*lines, "", *reasons] if reasons else lines)

    def _memory_heads(self) -> tuple[str, str]:
        unit = "values per pixel" if self.image is None else "MB per image"
        return f"kept before ({unit})", "after"

    def _row(self, entry: Entry) -> tuple[str, ...]:
        now = f"{entry.now}, {entry.keep}" if entry.keep else entry.now or "left as it is"
        memory = []
        for value in (pick(entry) for pick in _PICKS):
            if value is None or (self.image is not None and entry.pixels is None):
                memory.append("")
            else:
                memory.append(str(value) if self.image is None else _megabytes(value * (entry.pixels or 0)))
        return (entry.name or "(the model)", entry.was, now, entry.channels, *memory)


_PICKS = (lambda e: e.values_before, lambda e: e.values_after)


def report(model: nn.Module, keep: str | None = None, image: Sequence[int] | None = None) -> Report:
    """What became of the parts of a model; or, for a model that was not made efficient, what would.

    Memory is what dense blocks and transitions keep for the backward pass, in float32, by the structure of their
    parts: an estimate, which leaves out what lies between them, and gradients.

    Args:
        keep: as in `make_efficient`; for parts that are not adopted yet.
        image: the shape ``(C, *spatial)`` of one image, to tell memory in MB per image, not in values per pixel.

    Raises:
        UserError: the model cannot run on such an image.
    """
    findings = survey(model)
    pixels = {} if image is None else _pixels(model, [f.module for f in findings if f.task], image)
    entries = [_entry(finding, keep, pixels.get(finding.module)) for finding in findings]
    return Report(tuple(entries), None if image is None else tuple(image))


def _entry(finding: Finding, keep: str | None, pixels: int | None) -> Entry:
    name, module, task, way, reason = finding
    original = original_class(module)
    was = f"{original.__module__.split('.')[0]} {original.__name__}"
    if task is None:
        return Entry(name, was, "", "", reason)
    kept = module.adoption.keep if isinstance(module, Adopted) else keep or "bottleneck"
    if task is AdoptedBlock:
        return Entry(
            name, was, way, "" if way == RECOMPUTE else kept, reason, *_block_values(module, way, kept), pixels
        )
    if task is AdoptedTransition:
        return Entry(name, was, way, "", reason, *_transition_values(module), pixels)
    return Entry(name, was, "joins stem and transitions", "", reason)


def _block_values(module: nn.Module, way: str, keep: str) -> tuple[str, int, int]:
    layers = read.block(module)
    reads = [layer.readers[0].conv.in_channels for layer in layers]
    middles = [layer.readers[0].conv.out_channels for layer in layers if len(layer.readers) == 2]
    made = reads[-1] + layers[-1].readers[-1].conv.out_channels
    before = 2 * sum(reads) + 2 * sum(
        middles
    )  # concatenation and activation; what the bottleneck makes, and activation
    after = made + sum(middles)
    if way != RECOMPUTE:
        after = {"bottleneck": after, "features": made, "inputs": reads[0]}[keep]
    return f"{reads[0]} → {made}", before, after


def _transition_values(module: nn.Module) -> tuple[str, int, int]:
    tail: Any = read.transition(module)
    makes = tail.conv.out_channels
    # What the block made is counted with the block, once it is kept there.
    return f"{tail.conv.in_channels} → {makes}", 2 * tail.conv.in_channels + makes, 0


def _pixels(model: nn.Module, modules: Sequence[nn.Module], image: Sequence[int]) -> dict[nn.Module, int]:
    """The pixels that these modules of `model` get for one image, found without computing anything."""
    found: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: tuple) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor):
            found[module] = prod(inputs[0].shape[2:])

    modes = [(module, module.training) for module in model.modules()]
    hooks = [module.register_forward_pre_hook(note) for module in modules]
    state = {name: t.to("meta") for name, t in (*model.named_parameters(), *model.named_buffers())}
    try:
        with torch.no_grad():
            functional_call(model.eval(), state, (torch.empty(1, *image, device="meta"),))
    except Exception as error:
        shape = "×".join(map(str, image))
        raise UserError(f"the model does not run on an image of {shape}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return found


def _megabytes(values: int) -> str:
    return f"{4 * values / 1e6:.2f}"
