"""What `make_efficient` did or would do to a model, as a table that can be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn

from efficient_densenet.adopt.adopted import AdoptedPart, AdoptedSequence, adopted_modules
from efficient_densenet.adopt.chain import Chain
from efficient_densenet.adopt.decide import ORDINARY, RECOMPUTE, SHARED, Decision, standing
from efficient_densenet.adopt.kinds import CONVOLUTIONS, modules_of, original_class
from efficient_densenet.adopt.survey import survey
from efficient_densenet.adopt.trial import Tensors, on_trial
from efficient_densenet.errors import UserError
from efficient_densenet.execution import Keep, check_keep
from efficient_densenet.execution.plan import parts

_JOINS = "joins stem and transitions"


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


def report(model: nn.Module, keep: Keep | None = None, image: Sequence[int] | None = None) -> Report:
    """What became of the parts of a model; or, for a model that was not made efficient, what would.

    Memory is what stems, dense blocks and transitions keep for the backward pass, by what they compute: an estimate,
    which leaves out what lies between them, the small statistics, dropout masks, and gradients.

    Args:
        keep: as in `make_efficient`; for a model that is not adopted yet.
        image: the shape ``(C, *spatial)`` of one image, to tell memory in MB per image, not in values per pixel.

    Raises:
        UserError: `keep` is no such word, or the model cannot run on such an image.
    """
    if keep is not None:
        check_keep(keep)
    found = _parts(model, keep or "bottleneck")
    pixels = None if image is None else _pixels(model, image)
    entries = []
    for part in found:
        if pixels is not None and part.way and part.module not in pixels:
            part = part._replace(way=ORDINARY, reason="the model does not call it in one piece")
        entries.append(_entry(part, None if pixels is None else pixels.get(part.first)))
    return Report(tuple(entries), None if image is None else tuple(image))


class _Part(NamedTuple):
    """A part of a model, as it is or would be.

    `first` is the module that gets its input; `stem` the convolution before a stem, of a sequence that joins parts.
    """

    name: str
    module: nn.Module
    first: nn.Module
    chain: Chain | None
    way: str
    keep: str
    reason: str
    stem: nn.Module | None = None


def _parts(model: nn.Module, keep: str) -> list[_Part]:
    found: list[_Part] = []
    joining: dict[nn.Module, _Part] = {}
    whole: set[nn.Module] = set()
    for name, module, segment, decision, kept in _findings(model, keep):
        way, reason, chain = decision.way, decision.reason or "", decision.chain
        if segment is None:
            whole.add(module)
            found.append(_Part(name, module, module, chain, way, kept, reason))
            continue
        children = modules_of(module)
        roots = children[slice(*segment)]
        sequence = joining.setdefault(module, _Part(name, module, module, None, _JOINS, "", ""))
        if chain is not None and not chain.made:
            before = children[segment[0] - 1] if segment[0] else None
            stem = before if isinstance(before, CONVOLUTIONS) else None
            note = reason and f"the stem keeps more: {reason}"
            joining[module] = sequence._replace(chain=chain, stem=stem, first=stem or roots[0], keep=kept, reason=note)
        elif not whole & set(roots):
            inside = f"{name}[{segment[0]}:{segment[1]}]"
            found.append(_Part(inside, roots[0], roots[0], chain, way, kept, reason))
    return [*found, *joining.values()]


def _findings(model: nn.Module, keep: str) -> Iterator[tuple[str, nn.Module, tuple[int, int] | None, Decision, str]]:
    """Name, module, its segment if it is a sequence, how that runs, and what it keeps."""
    if not adopted_modules(model):
        for name, module, looks, segment, reason in survey(model):
            way = "" if not looks else SHARED if reason is None else RECOMPUTE
            yield name, module, segment, Decision(way, reason, looks[0].chain if looks else None), keep
        return
    sequences = []
    for name, module in model.named_modules():
        if isinstance(module, AdoptedPart):
            adoption = module.adoption
            yield name, module, None, standing([module], adoption, own_hooks=True), adoption.keep
        elif isinstance(module, AdoptedSequence):
            sequences.append((name, module))
    for name, sequence in sequences:
        for start, stop, adoption in sequence.adoption.segments:
            roots = modules_of(sequence)[start:stop]
            yield name, sequence, (start, stop), standing(roots, adoption, own_hooks=False), adoption.keep
    for finding in survey(model):
        if not finding.looks:
            yield finding.name, finding.module, None, Decision("", finding.reason), keep


def _entry(part: _Part, pixels: int | None) -> Entry:
    original = original_class(part.module)
    was = f"{original.__module__.split('.')[0]} {original.__name__}"
    if part.chain is None:
        return Entry(part.name, was, part.way, "", part.reason)
    if part.stem is not None or part.way == _JOINS:
        if part.stem is None:
            return Entry(part.name, was, part.way, "", part.reason)
        values = _stem_values(part.stem, part.keep, bool(part.reason))
        return Entry(part.name, was, part.way, "", part.reason, *values, pixels)
    kept = part.keep if part.way == SHARED and part.chain.made else ""
    return Entry(part.name, was, part.way, kept, part.reason, *_values(part, part.chain), pixels)


def _values(part: _Part, chain: Chain) -> tuple[str, float, float]:
    """Channels, and the values that are kept per pixel of the input, before and after."""
    made, bottlenecks = chain.width + sum(chain.made), sum(chain.bottlenecks)
    reads = [chain.width + sum(chain.made[:i]) for i in range(len(chain.made))]
    # Of each layer its concatenated input, the bottleneck output, and both again as activations. Libraries that
    # checkpoint keep the inputs of the concatenation, and the rest of it for one layer at a time.
    checkpoints = any(getattr(module, flag, False) for module in part.module.modules() for flag in _CHECKPOINTED)
    before = after = 0.0
    if chain.made:
        before = (made if checkpoints else 2 * sum(reads)) + 2 * bottlenecks
        after = {"bottleneck": made + bottlenecks, "features": made, "inputs": chain.width}[part.keep]
        after = {SHARED: after, RECOMPUTE: made + bottlenecks}.get(part.way, before)
    if chain.tail:
        # What the block made is counted with the block, once it is kept there; an average pool keeps its input.
        of_tail = 2 * made + chain.tail
        before += of_tail
        after += {SHARED: 0, RECOMPUTE: chain.tail}.get(part.way, of_tail)
    return f"{chain.width} → {chain.tail or made}", before, after


_CHECKPOINTED = ("memory_efficient", "grad_checkpointing", "efficient")


def _stem_values(conv: Any, keep: str, keeps_more: bool) -> tuple[str, float, float]:
    reads, makes = conv.in_channels, conv.out_channels
    maps = makes / prod(conv.stride)
    # A max pool keeps indices of eight bytes, for a quarter of the pixels in two dimensions.
    indices = 2 * maps / 2 ** len(conv.stride)
    after = reads + maps + indices if keeps_more else reads + maps * (keep != "inputs")
    return f"{reads} → {makes}", reads + 2 * maps + indices, after


def _pixels(model: nn.Module, image: Sequence[int]) -> dict[nn.Module, int]:
    """The pixels that each module of `model` gets for one image; without those that are not called.

    Found without computing anything; where the model looks at the values of its images, from random ones.
    """
    found: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: tuple) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            found[module] = prod(inputs[0].shape[2:])

    modules = parts([model])
    for device in ("meta", "cpu"):
        tensors = Tensors(device)
        with on_trial(modules, tensors):
            for module in modules:
                module.__dict__["training"] = False
                module._forward_pre_hooks[0] = note
            try:
                model(tensors.activation(1, *image))
                return found
            except Exception as error:
                reason = str(error).partition("\n")[0]
    shape = "×".join(map(str, image))
    raise UserError(f"the model does not run on an image of {shape}: {reason}")
