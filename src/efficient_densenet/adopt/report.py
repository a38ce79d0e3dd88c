"""What `make_efficient` did or would do to a model, as a table that can be read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch import Tensor, nn

from efficient_densenet.adopt.adopted import AdoptedPart, AdoptedSequence, adopted_modules, restore
from efficient_densenet.adopt.chain import Chain
from efficient_densenet.adopt.conversion import convert
from efficient_densenet.adopt.decide import ORDINARY, RECOMPUTE, SHARED, Decision, standing
from efficient_densenet.adopt.kinds import CONVOLUTIONS, modules_of, original_class
from efficient_densenet.adopt.memory import Values, of_part, of_stem
from efficient_densenet.adopt.step import count_step, without_values
from efficient_densenet.adopt.survey import Finding, survey
from efficient_densenet.adopt.trial import Tensors, on_trial
from efficient_densenet.errors import UserError
from efficient_densenet.execution import Keep, check_keep
from efficient_densenet.execution.plan import parts
from efficient_densenet.units import megabytes

_JOINS = "joins stem and transitions"
_BATCHES = (32, 64)  # each more than fits into the workspaces that do not grow


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
        values: that it keeps for the backward pass and needs in it, per pixel of its input; None if unknown.
        pixels: of its input for one image; None without an image, or where the model does not call the module.
    """

    name: str
    was: str
    now: str
    keep: str
    reason: str
    channels: str = ""
    values: Values | None = None
    pixels: int | None = None

    @property
    def bytes_before(self) -> float | None:
        """That are kept for one image, in float32."""
        return None if self.values is None or self.pixels is None else 4 * self.values.before * self.pixels

    @property
    def bytes_after(self) -> float | None:
        return None if self.values is None or self.pixels is None else 4 * self.values.after * self.pixels


@dataclass(frozen=True)
class Report:
    """What became of each module; ``print`` shows it as a table."""

    entries: tuple[Entry, ...]
    image: tuple[int, ...] | None = None  # the shape (C, *spatial) for which memory is told
    peak: tuple[float, float] | None = None  # bytes of a training step for one such image, before and after

    @property
    def adopted(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.now]

    def __str__(self) -> str:
        shape = "" if self.image is None else "×".join(map(str, self.image))
        if not self.entries:
            return "Nothing in this model looks like a part of a DenseNet."
        reasons: dict[str, list[str]] = {}
        for entry in self.entries:
            if entry.reason:
                reasons.setdefault(entry.reason, []).append(entry.name or "the model")
        notes = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
        if not self.adopted:
            return "\n".join(["Nothing in this model can be converted. It is left as it is:", "", *notes])
        unit = f"MB per image of {shape}, float32" if shape else "values per pixel of the module's input"
        rows = [("module", "was", "now", "channels", "before", "after"), *(self._row(e) for e in self.entries)]
        if self.image is not None:
            known = [(e.bytes_before, e.bytes_after) for e in self.entries]
            totals = (sum(filter(None, column)) for column in zip(*known, strict=True))
            rows.append(("together", "", "", "", *(megabytes(total, 2) for total in totals)))
        if self.peak is not None:
            rows.append(("peak of a training step", "", "", "", *(megabytes(total, 2) for total in self.peak)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"Kept for the backward pass, before and after: {unit}.", ""]
        for row in rows:
            texts = (cell.ljust(w) for cell, w in zip(row[:4], widths[:4], strict=True))
            numbers = (cell.rjust(w) for cell, w in zip(row[4:], widths[4:], strict=True))
            lines.append("  ".join([*texts, *numbers]).rstrip())
        return "\n".join([*lines, "", *notes] if notes else lines)

    def _row(self, entry: Entry) -> tuple[str, ...]:
        now = f"{entry.now}, {entry.keep}" if entry.keep else entry.now or "left as it is"
        if self.image is None:
            memory = ["", ""] if entry.values is None else [f"{v:g}" for v in entry.values[:2]]
        else:
            memory = ["" if b is None else megabytes(b, 2) for b in (entry.bytes_before, entry.bytes_after)]
        return (entry.name or "(the model)", entry.was, now, entry.channels, *memory)


def report(model: nn.Module, keep: Keep | None = None, image: Sequence[int] | None = None) -> Report:
    """What became of the parts of a model; or, for a model that was not made efficient, what would.

    Memory is what stems, dense blocks and transitions keep for the backward pass, by what they compute: an estimate,
    which leaves out what lies between them, the small statistics, dropout masks, parameters and a scratch of constant
    size. With an image, the peak of a training step is told too, which gradients and temporary tensors belong to: see
    `plan`, which tells more of it.

    Args:
        keep: as in `make_efficient`; for a model that is not adopted yet.
        image: the shape ``(C, *spatial)`` of one image, to tell memory in MB per image, not in values per pixel.

    Raises:
        UserError: `keep` is no such word, or the model cannot run on such an image.
    """
    if keep is not None:
        check_keep(keep)
    keep = keep or "bottleneck"
    findings = survey(model)
    if image is None:
        return Report(entries_of(model, findings, keep))
    entries = entries_of(model, findings, keep, pixels_of(model, image))
    return Report(entries, tuple(image), _peaks(model, findings, keep, image))


def entries_of(
    model: nn.Module, findings: Sequence[Finding], keep: Keep, pixels: dict[nn.Module, int] | None = None
) -> tuple[Entry, ...]:
    """Those of `report`.

    Args:
        model: adopted, or not.
        findings: of `survey`, of this model; of one that is adopted, what is left.
        keep: for a model that is not adopted.
        pixels: see `pixels_of`.
    """
    entries = []
    for part in _parts(model, findings, keep):
        if pixels is not None and part.way and part.module not in pixels:
            part = part._replace(way=ORDINARY, reason="the model does not call it in one piece")
        entries.append(_entry(part, None if pixels is None else pixels.get(part.first)))
    return tuple(entries)


def _peaks(
    model: nn.Module, findings: Sequence[Finding], keep: Keep, image: Sequence[int]
) -> tuple[float, float] | None:
    """Bytes of a training step for one image, before and after; None where that needs values of tensors."""
    try:
        twin = copy.deepcopy(model).float()
        if not adopted_modules(twin):
            convert(twin, keep, findings=[f._replace(module=twin.get_submodule(f.name)) for f in findings])
        after = _peak_of_one(without_values(twin), image)
        return _peak_of_one(restore(twin), image), after
    except (UserError, RuntimeError):  # the latter where a module holds what PyTorch cannot copy
        return None


def _peak_of_one(model: nn.Module, image: Sequence[int]) -> float:
    """Of a larger batch, without what does not grow with it."""
    few, many = (count_step(model, image, n) for n in _BATCHES)
    return (many.peak - few.peak) / (many.batch_size - few.batch_size)


class _Part(NamedTuple):
    """A part of a model, as it is or would be.

    `first` is the module that gets its input; `stem` the convolutions of the stem, of a sequence that joins parts, and
    `stem_way` how that runs.
    """

    name: str
    module: nn.Module
    first: nn.Module
    chain: Chain | None
    way: str
    keep: str
    reason: str
    stem: tuple[nn.Module, ...] = ()
    stem_way: str = ""


def _parts(model: nn.Module, findings: Sequence[Finding], keep: str) -> list[_Part]:
    found: list[_Part] = []
    joining: dict[nn.Module, _Part] = {}
    whole: set[nn.Module] = set()
    for name, module, segment, decision, kept in _each(model, findings, keep):
        way, reason, chain = decision.way, decision.reason or "", decision.chain
        if segment is None:
            whole.add(module)
            found.append(_Part(name, module, module, chain, way, kept, reason))
            continue
        children = modules_of(module)
        roots = children[slice(*segment)]
        sequence = joining.setdefault(module, _Part(name, module, module, None, _JOINS, "", ""))
        if chain is not None and not chain.made:
            stem = tuple(m for root in roots for m in root.modules() if isinstance(m, CONVOLUTIONS))
            note = reason and f"the stem keeps more: {reason}"
            joining[module] = sequence._replace(chain=chain, stem=stem, stem_way=way, first=roots[0], reason=note)
        elif not whole & set(roots):
            inside = f"{name}[{segment[0]}:{segment[1]}]"
            found.append(_Part(inside, roots[0], roots[0], chain, way, kept, reason))
    return [*found, *joining.values()]


def _each(
    model: nn.Module, findings: Sequence[Finding], keep: str
) -> Iterator[tuple[str, nn.Module, tuple[int, int] | None, Decision, str]]:
    """Name, module, its segment if it is a sequence, how that runs, and what it keeps."""
    if not adopted_modules(model):
        for one in findings:
            way = "" if one.left else SHARED if one.reason is None else RECOMPUTE
            decision = Decision(way, one.reason, one.looks[0].chain if one.looks else None)
            yield one.name, one.module, one.segment, decision, keep
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
    for finding in findings:
        if finding.left:
            yield finding.name, finding.module, None, Decision("", finding.reason), keep


def _entry(part: _Part, pixels: int | None) -> Entry:
    original = original_class(part.module)
    was = f"{original.__module__.split('.')[0]} {original.__name__}"
    if part.chain is None:
        return Entry(part.name, was, part.way, "", part.reason)
    if part.way == _JOINS:
        if not part.stem:
            return Entry(part.name, was, part.way, "", part.reason)
        channels = f"{part.chain.width} → {part.chain.tail}"
        values = of_stem(part.stem, part.stem_way != SHARED)
        return Entry(part.name, was, part.way, "", part.reason, channels, values, pixels)
    kept = part.keep if part.way == SHARED and part.chain.made else ""
    channels = f"{part.chain.width} → {part.chain.tail or part.chain.width + sum(part.chain.made)}"
    values = of_part(part.chain, part.module, part.way, part.keep)
    return Entry(part.name, was, part.way, kept, part.reason, channels, values, pixels)


def pixels_of(model: nn.Module, image: Sequence[int]) -> dict[nn.Module, int]:
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
