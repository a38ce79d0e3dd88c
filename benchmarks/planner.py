"""Compare what is planned for a training step with what it takes, and write what the documentation says about it.

    python benchmarks/planner.py            # some five minutes on two cores

The measurements go to ``results/planner.json`` beside this file; ``results/planner.md`` is made from that file alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from efficient_densenet import densenet121, densenet161, densenet264, densenet_cifar, make_efficient, restore
from efficient_densenet.adopt.planner import ORDINARY, RECOMPUTE, WAYS
from efficient_densenet.adopt.step import step_memory
from efficient_densenet.errors import require
from efficient_densenet.measure import tables
from efficient_densenet.measure.memory import peak_bytes
from efficient_densenet.measure.processes import progress
from efficient_densenet.measure.results import Record
from efficient_densenet.measure.script import Script, Section
from efficient_densenet.units import megabytes

FOLDER = Path(__file__).parent / "results"
AUTOCAST = {"float32": None, "autocast to bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """A network, the shape of one image, and the batch of the step."""

    name: str
    build: Callable[[], nn.Module]
    image: tuple[int, ...]
    batch_size: int


def _volumes() -> nn.Module:
    nets = require("monai.networks.nets", "peers")
    return nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=2)


def _unet() -> nn.Module:
    return require("segmentation_models_pytorch", "dev").Unet("densenet121", encoder_weights=None)


FULL = (
    Subject("L=40 k=12", partial(densenet_cifar, 40, 12), (3, 32, 32), 64),
    Subject("BC L=100 k=12", partial(densenet_cifar, 100, 12, bottleneck=True), (3, 32, 32), 32),
    Subject("DenseNet-121", densenet121, (3, 224, 224), 4),
    Subject("DenseNet-161", densenet161, (3, 224, 224), 2),
    Subject("DenseNet-264", densenet264, (3, 224, 224), 2),
    Subject("MONAI DenseNet121, 3D", _volumes, (1, 64, 64, 64), 2),
    Subject("U-Net of densenet121", _unet, (3, 224, 224), 2),
)
TRACED = (Subject("DenseNet-121", densenet121, (3, 224, 224), 16),)
"""Whose memory over a step is drawn, and at which batch; the longest trace is thinned to so many points."""
_POINTS = 200
QUICK = (Subject("tiny", partial(densenet_cifar, 10, 12), (3, 32, 32), 64),)


def peaks(plan: Sequence[Subject]) -> list[Record]:
    """Bytes that a step adds to model, gradients and images: planned, and alive when it ran."""
    records = []
    for subject in plan:
        model = subject.build()
        for way in WAYS:
            _run_as(model, way)
            for name, autocast in AUTOCAST.items():
                progress(f"{subject.name}, {way}, {name}")
                planned = step_memory(model, subject.image, subject.batch_size, autocast).peak
                found = {"planned": planned, "measured": peak_bytes(_step(model, subject, autocast))}
                about = {"network": subject.name, "image": subject.image, "batch_size": subject.batch_size}
                records.append({**about, "way": way, "dtype": name, **found})
    return records


def traces(plan: Sequence[Subject]) -> list[Record]:
    """Bytes alive over a step, forward and backward, as planned; of DenseNet-121, unless the plan is a quick one."""
    records = []
    for subject in plan if plan is QUICK else TRACED:
        model = subject.build()
        for way in WAYS:
            _run_as(model, way)
            step = step_memory(model, subject.image, subject.batch_size)
            halves = {"forward": step.trace[: step.forward], "backward": step.trace[step.forward :]}
            about = {"network": subject.name, "batch_size": subject.batch_size, "way": way}
            records.append({**about, "peak": step.peak, **{name: _thinned(half) for name, half in halves.items()}})
    return records


def _thinned(values: Sequence[int]) -> list[int]:
    """The largest of each run of them, and no more than `_POINTS`."""
    run = ceil(len(values) / _POINTS)
    return [max(values[i : i + run]) for i in range(0, len(values), run)]


def peaks_over_steps(records: list[Record]) -> str:
    """Where the traces are drawn, and their peaks."""
    rows = [[f"{r['network']}, batch {r['batch_size']}", r["way"], megabytes(r["peak"])] for r in records]
    return tables.markdown(["network", "way", "peak, MB"], rows, names=2)


def _run_as(model: nn.Module, way: Any) -> None:
    restore(model)
    if way == RECOMPUTE:
        make_efficient(model, way=way)
    elif way != ORDINARY:
        make_efficient(model, way)


def _step(model: nn.Module, subject: Subject, autocast: torch.dtype | None) -> Callable[[], None]:
    x = torch.randn(subject.batch_size, *subject.image)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(x).float().square().sum()
        loss.backward()

    return step


def error(record: Record) -> float:
    """Of what was planned, as a share of what was measured."""
    return record["planned"] / record["measured"] - 1


def table(records: list[Record]) -> str:
    """Measured megabytes, and the planner's error, by network and type."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        found.setdefault((f"{record['network']}, batch {record['batch_size']}", record["dtype"]), {})[record["way"]] = (
            record
        )
    rows = [
        [name, dtype, *(f"{megabytes(r[way]['measured'])} ({error(r[way]):+.1%})" for way in WAYS)]
        for (name, dtype), r in found.items()
    ]
    worst = max(records, key=lambda record: abs(error(record)))
    where = f"{worst['network']}, `{worst['way']}`, {worst['dtype']}"
    shown = tables.markdown(["network", "type", *WAYS], rows, names=2)
    return f"{shown}\n\nThe planner's largest error: {abs(error(worst)):.1%} ({where})."


SCRIPT = Script(
    "planner",
    "What is planned, and what it takes",
    {
        "peaks": Section("Peak of a training step in MB, and the planner's error", peaks, table),
        "traces": Section("Memory over a training step", traces, peaks_over_steps),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    return SCRIPT.main(argv, FOLDER, FULL, QUICK)


if __name__ == "__main__":
    sys.exit(main())
