"""Look through a model for what can be made efficient: what each candidate is, how it would run, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn

from efficient_densenet.adopt import read
from efficient_densenet.adopt.adopted import (
    ORDINARY,
    RECOMPUTE,
    SHARED,
    Adopted,
    AdoptedBlock,
    AdoptedSequence,
    AdoptedTransition,
    disagreement,
    inside,
    runs_in_order,
)
from efficient_densenet.execution import Stem, obstacle
from efficient_densenet.execution.hooks import has_hooks, runs
from efficient_densenet.execution.parts import CONVOLUTIONS, stem_obstacle
from efficient_densenet.models import DenseBlock


class Finding(NamedTuple):
    """A module that looks like a part of a DenseNet.

    Attributes:
        name: in the model; empty for the model itself.
        module: the module.
        task: what it would become; None where it stays as it is.
        way: how it would run; empty where it stays as it is.
        reason: why it does not run on the shared buffer, if so.
    """

    name: str
    module: nn.Module
    task: type[Adopted] | None
    way: str
    reason: str = ""


def survey(model: nn.Module) -> list[Finding]:
    """Every dense block, every transition, and the sequences that run them, in the order of the model."""
    findings: list[Finding] = []
    taken: set[nn.Module] = set()  # with all inside, by a block or transition that was found
    left: set[nn.Module] = set()  # inside what was left, for the reason given there
    for name, module in model.named_modules():
        if module in taken:
            continue
        finding = _block(name, module) or _transition(name, module)
        if finding is not None and (finding.task is not None or module not in left):
            findings.append(finding)
            (left if finding.task is None else taken).update(module.modules())
    return [*findings, *_sequences(model, {f.module for f in findings if f.task is AdoptedBlock})]


def _block(name: str, module: nn.Module) -> Finding | None:
    if isinstance(module, DenseBlock):
        return Finding(name, module, None, "", "it is of this library: build the network with efficient=True")
    try:
        layers = read.block(module)
    except read.NotDenseError as error:
        return Finding(name, module, None, "", str(error)) if _looks_dense(module) else None
    differs = disagreement(module)
    if differs is not None:
        return Finding(name, module, None, "", differs)
    reason = obstacle(layers)
    return Finding(name, module, AdoptedBlock, _way(module, reason), reason or "")


def _transition(name: str, module: nn.Module) -> Finding | None:
    tail = read.transition(module) if runs_in_order(module) else None
    if tail is None:
        return None
    reason = obstacle([], tail)
    return Finding(name, module, AdoptedTransition, _way(module, reason), reason or "")


def _way(module: nn.Module, reason: str | None) -> str:
    if reason is None:
        return SHARED
    return ORDINARY if has_hooks(inside(module)) else RECOMPUTE


def _sequences(model: nn.Module, blocks: set[nn.Module]) -> Iterator[Finding]:
    for name, module in model.named_modules():
        if module not in blocks and runs_in_order(module) and blocks & set(module.children()):
            stem = stem_of(module)
            reason = "" if stem is None else stem_obstacle(stem) or ""
            yield Finding(name, module, AdoptedSequence, SHARED, reason and f"the stem keeps more: {reason}")


def stem_of(sequence: Any) -> Stem | None:
    """The stem that an adopted sequence runs as one."""
    modules = list(sequence)
    found = (read.stem(modules[i:]) for i in range(len(modules)))
    return next((stem for stem, _ in filter(None, found)), None)


def _looks_dense(module: nn.Module) -> bool:
    """Whether its parts read more and more channels, each at least one norm and one convolution: a near miss."""
    widths = []
    for child in module.children():
        convolutions = [m for m in child.modules() if isinstance(m, CONVOLUTIONS)]
        has_norm = any("norm" in type(m).__name__.lower() for m in child.modules())
        if not convolutions or not has_norm or runs(child, *CONVOLUTIONS):
            return False
        widths.append(convolutions[0].in_channels)
    return len(widths) > 1 and all(b > a for a, b in pairwise(widths))
