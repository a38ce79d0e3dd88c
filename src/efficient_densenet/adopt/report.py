"""What `make_efficient` did or would do to a model, as a table that can be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from efficient_densenet.adopt import read
from efficient_densenet.adopt.adopted import (
    ORDINARY,
    RECOMPUTE,
    SHARED,
    Adopted,
    AdoptedBlock,
    AdoptedSequence,
    AdoptedTransition,
    original_class,
)
from efficient_densenet.adopt.survey import Finding, stem_of, survey
from efficient_densenet.errors import UserError
from efficient_densenet.execution import Stem
from efficient_densenet.execution.hooks import modes_kept, no_hooks
from efficient_densenet.execution.parts import MAX_POOLS


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
        pixels: of its input for one image; None without an image, or where the model does not call the module.
    """

    name: str
    was: str
    now: str
    keep: str
    reason: str
    channels: str = ""
    values_before: float | None = None
    values_after: float | None = None
    pixels: int | None = None

    @property
    def bytes_before(self) -> float | None:
        """For one image, in float32."""
        return None if self.values_before is None or self.pixels is None else 4 * self.values_before * self.pixels

    @property
    def bytes_after(self) -> float | None:
        return None if self.values_after is None or self.pixels is None else 4 * self.values_after * self.pixels


@dataclass(frozen=True)
class Report:
    """What became of each module; ``print`` shows it as a table."""

    entries: tuple[Entry, ...]
    image: tuple[int, ...] | None = None  # the shape (C, *spatial) for which memory is told

    @property
    def adopted(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.now]

    def __str__(self) -> str:
        shape = "" if self.image is None else "×".join(map(str, self.image))
        unit = f"MB per image of {shape}, float32" if shape else "values per pixel of the module's input"
        rows = [("module", "was", "now", "channels", "before", "after"), *(self._row(e) for e in self.entries)]
        if self.image is not None:
            known = [(e.bytes_before, e.bytes_after) for e in self.entries]
            totals = (sum(filter(None, column)) for column in zip(*known, strict=True))
            rows.append(("together", "", "", "", *(f"{total / 1e6:.2f}" for total in totals)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"Kept for the backward pass, before and after: {unit}.", ""]
        for row in rows:
            texts = (cell.ljust(w) for cell, w in zip(row[:4], widths[:4], strict=True))
            numbers = (cell.rjust(w) for cell, w in zip(row[4:], widths[4:], strict=True))
            lines.append("  ".join([*texts, *numbers]).rstrip())
        reasons: dict[str, list[str]] = {}
        for entry in self.entries:
            if entry.reason:
                reasons.setdefault(entry.reason, []).append(entry.name or "the model")
        notes = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join([*lines, "", *notes] if notes else lines)

    def _row(self, entry: Entry) -> tuple[str, ...]:
        now = f"{entry.now}, {entry.keep}" if entry.keep else entry.now or "left as it is"
        if self.image is None:
            memory = ["" if v is None else f"{v:g}" for v in (entry.values_before, entry.values_after)]
        else:
            memory = ["" if b is None else f"{b / 1e6:.2f}" for b in (entry.bytes_before, entry.bytes_after)]
        return (entry.name or "(the model)", entry.was, now, entry.channels, *memory)


def report(model: nn.Module, keep: str | None = None, image: Sequence[int] | None = None) -> Report:
    """What became of the parts of a model; or, for a model that was not made efficient, what would.

    Memory is what stems, dense blocks and transitions keep for the backward pass, by the structure of their parts: an
    estimate, which leaves out what lies between them, the small statistics, dropout masks, and gradients.

    Args:
        keep: as in `make_efficient`; for parts that are not adopted yet.
        image: the shape ``(C, *spatial)`` of one image, to tell memory in MB per image, not in values per pixel.

    Raises:
        UserError: the model cannot run on such an image.
    """
    findings = survey(model)
    if image is None:
        return Report(tuple(_entry(finding, keep) for finding in findings))
    pixels = _pixels(model, [f.module for f in findings if f.task] + list(_stem_convolutions(findings)), image)
    entries = []
    for finding in findings:
        if finding.task is None or finding.module in pixels:
            entries.append(_entry(finding, keep, pixels))
        else:
            entries.append(
                _entry(finding._replace(way=ORDINARY, reason="the model does not call it in one piece"), keep)
            )
    return Report(tuple(entries), tuple(image))


def _entry(finding: Finding, keep: str | None, all_pixels: dict[nn.Module, int] | None = None) -> Entry:
    name, module, task, way, reason = finding
    original = original_class(module)
    was = f"{original.__module__.split('.')[0]} {original.__name__}"
    if task is None:
        return Entry(name, was, "", "", reason)
    pixels = None if all_pixels is None else all_pixels[module]
    kept = module.adoption.keep if isinstance(module, Adopted) else keep or "bottleneck"
    if task is AdoptedBlock:
        return Entry(name, was, way, kept if way == SHARED else "", reason, *_block_values(module, way, kept), pixels)
    if task is AdoptedTransition:
        return Entry(name, was, way, "", reason, *_transition_values(module, way), pixels)
    stem = stem_of(module)
    now = ORDINARY if way == ORDINARY else "joins stem and transitions"
    if stem is None:
        return Entry(name, was, now, "", reason)
    pixels = None if all_pixels is None else all_pixels[stem.conv]
    return Entry(name, was, now, "", reason, *_stem_values(stem, kept, bool(reason)), pixels)


def _stem_convolutions(findings: Sequence[Finding]) -> Iterator[nn.Module]:
    stems = (stem_of(finding.module) for finding in findings if finding.task is AdoptedSequence)
    return (stem.conv for stem in stems if stem is not None)


def _block_values(module: nn.Module, way: str, keep: str) -> tuple[str, float, float]:
    layers = read.block(module)
    reads = [layer.readers[0].conv.in_channels for layer in layers]
    middle = sum(layer.readers[0].conv.out_channels for layer in layers if len(layer.readers) == 2)
    made = reads[-1] + layers[-1].readers[-1].conv.out_channels
    # Of each layer its concatenated input, the bottleneck output, and both again as activations. Libraries that
    # checkpoint keep the inputs of the concatenation, and the rest of it for one layer at a time.
    checkpointed = any(getattr(layer.module, flag, False) for layer in layers for flag in _CHECKPOINTED)
    before = (made if checkpointed else 2 * sum(reads)) + 2 * middle
    after = {
        SHARED: {"bottleneck": made + middle, "features": made, "inputs": reads[0]}[keep],
        RECOMPUTE: made + middle,
        ORDINARY: before,
    }
    return f"{reads[0]} → {made}", before, after[way]


_CHECKPOINTED = ("memory_efficient", "grad_checkpointing", "efficient")


def _transition_values(module: nn.Module, way: str) -> tuple[str, float, float]:
    tail: Any = read.transition(module)
    reads, makes = tail.conv.in_channels, tail.conv.out_channels
    # What the block made is counted with the block, once it is kept there; an average pool keeps its input.
    before = 2 * reads + makes
    return f"{reads} → {makes}", before, {SHARED: 0, RECOMPUTE: makes, ORDINARY: before}[way]


def _stem_values(stem: Stem, keep: str, keeps_more: bool) -> tuple[str, float, float]:
    reads, makes = stem.conv.in_channels, stem.conv.out_channels
    maps = makes / prod(stem.conv.stride)
    # A max pool keeps indices of eight bytes, for a quarter of the pixels in two dimensions.
    indices = 2 * maps / 2 ** len(stem.conv.stride) if isinstance(stem.pool, MAX_POOLS) else 0
    after = reads + maps + indices if keeps_more else reads + maps * (keep != "inputs")
    return f"{reads} → {makes}", reads + 2 * maps + indices, after


def _pixels(model: nn.Module, modules: Sequence[nn.Module], image: Sequence[int]) -> dict[nn.Module, int]:
    """The pixels that these modules of `model` get for one image.

    Found without computing anything; where the model looks at the values of its images, from an image of zeros.
    """
    found: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: tuple) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor):
            found[module] = prod(inputs[0].shape[2:])

    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad(), modes_kept(model), no_hooks(model):
        model.eval()
        hooks = [module.register_forward_pre_hook(note) for module in modules]
        try:
            state = {name: t.to("meta") for name, t in tensors.items()}
            functional_call(model, state, (torch.empty(1, *image, device="meta"),))
        except Exception:
            like = next((t for t in tensors.values() if t.is_floating_point()), torch.empty(0))
            try:
                model(like.new_zeros(1, *image))
            except Exception as error:
                shape, reason = "×".join(map(str, image)), str(error).partition("\n")[0]
                raise UserError(f"the model does not run on an image of {shape}: {reason}") from error
        finally:
            for hook in hooks:
                hook.remove()
    return found
