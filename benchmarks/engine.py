"""Measure the shared buffer against the ordinary network, and write what the documentation says about it.

    python benchmarks/engine.py                      # everything: about a quarter of an hour on two quiet cores
    python benchmarks/engine.py --sections time      # this again; the other sections stay as they are
    python benchmarks/engine.py --sections           # nothing: only write the tables again

The measurements go to ``results/engine.json`` beside this file, by processor, each section with its hardware, versions,
commit and date; ``results/engine.md`` is made from that file alone. `redraw.py` draws the pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression

from torch import nn

from efficient_densenet.execution import KEEP
from efficient_densenet.measure import contest, max_batch, tables, worker
from efficient_densenet.measure.contender import TrainingStep
from efficient_densenet.measure.contenders import ORDINARY
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.memory import bytes_per_image, peak_bytes
from efficient_densenet.measure.networks import Network, cifar, imagenet
from efficient_densenet.measure.processes import Team, progress
from efficient_densenet.measure.results import Record
from efficient_densenet.measure.script import Script, Section

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Subject:
    """A network, and the batches at which it is measured: two for each kind of memory, one for time.

    Those for memory are large enough that the workspace of the shared buffer, a few megabytes, no longer grows.
    """

    name: str
    network: Network
    memory_batches: tuple[int, int]
    resident_batches: tuple[int, int]
    time_batch: int


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        subjects: the networks; the largest batch is searched for the first one.
        depths: of plain networks with k=12, each with the two batches at which its memory is measured: large enough
            that the workspace of the shared buffer no longer grows.
        rounds: turns of one step that each contender gets.
        limit: bytes for the largest batch.
    """

    subjects: tuple[Subject, ...]
    depths: dict[int, tuple[int, int]]
    rounds: int
    limit: int


FULL = Plan(
    subjects=(
        Subject("L=40 k=12", cifar(40), (64, 96), (16, 128), 128),
        Subject("BC L=100 k=12", cifar(100, bottleneck=True), (48, 64), (8, 64), 32),
        Subject("DenseNet-121", imagenet("densenet121"), (4, 8), (2, 16), 8),
    ),
    depths={40: (48, 64), 100: (24, 32), 190: (24, 32), 250: (24, 32)},
    rounds=7,
    limit=2_000_000_000,
)
QUICK = Plan(
    subjects=(Subject("BC L=16 k=12", cifar(16, bottleneck=True), (4, 8), (2, 4), 2),),
    depths={10: (2, 4), 16: (2, 4), 22: (2, 4)},
    rounds=2,
    limit=1_000_000_000,
)


def memory(plan: Plan) -> list[Record]:
    """Bytes of live tensors that a training step adds."""
    records = []
    for subject in plan.subjects:
        for name in ("ordinary", "recompute", *KEEP):
            progress(f"memory: {subject.name}, {name}")
            found = bytes_per_image(_live_bytes(name, subject.network), subject.memory_batches)
            records.append({"network": subject.name, "contender": name, **found})
    return records


def resident(plan: Plan) -> list[Record]:
    """The peak resident size of a fresh process that runs one training step."""
    records = []
    for subject in plan.subjects:
        for name in ("ordinary", *KEEP):
            progress(f"resident: {subject.name}, {name}")

            def peak_of(batch_size: int, name: str = name, network: Network = subject.network) -> int:
                with Team(worker.__name__, contest.job(network, batch_size) | {"contender": name}) as team:
                    return team.ask("process_bytes")[0]

            found = bytes_per_image(peak_of, subject.resident_batches)
            records.append({"network": subject.name, "contender": name, **found})
    return records


def depth(plan: Plan) -> list[Record]:
    """Bytes per image of plain networks with k=12 of several depths, and the straight line nearest to them.

    Without a bottleneck, to keep the features is the same as to keep the bottleneck outputs.
    """
    records = []
    for name in ("ordinary", "bottleneck", "inputs"):
        points = {}
        for layers, batches in plan.depths.items():
            progress(f"depth: L={layers}, {name}")
            if name == "ordinary":  # which has no workspace, and would be too large at those batches
                points[layers] = bytes_per_image(_live_bytes(name, cifar(layers)), (1, 2))
            else:
                points[layers] = bytes_per_image(_live_bytes(name, cifar(layers), _freeze_convolutions), batches)
        values = [point["bytes_per_image"] for point in points.values()]
        line = linear_regression(list(plan.depths), values)
        residuals = [abs(line.slope * x + line.intercept - y) / y for x, y in zip(plan.depths, values, strict=True)]
        records.append(
            {
                "contender": name,
                "points": points,
                "bytes_per_layer": line.slope,
                "bytes_at_depth_0": line.intercept,
                "largest_residual": max(residuals),
            }
        )
    return records


def time(plan: Plan) -> list[Record]:
    """Forward and backward in plain PyTorch: every contender in a process of its own, taking turns of one step."""
    contenders = [*ORDINARY, *(f"{keep}-plain" for keep in KEEP)]
    return [
        contest.record(s.name, contest.job(s.network, s.time_batch), contenders, plan.rounds) for s in plan.subjects
    ]


def largest_batch(plan: Plan) -> list[Record]:
    """The largest batch of the first network whose process stays within a fixed resident size."""
    subject = plan.subjects[0]
    found = max_batch.run(["ordinary", *KEEP], contest.job(subject.network, 1), plan.limit)
    return [{"network": subject.name, "limit_bytes": plan.limit, "results": found}]


def _live_bytes(
    name: str, network: Network, prepare: Callable[[nn.Module], None] = lambda network: None
) -> Callable[[int], int]:
    def peak_of(batch_size: int) -> int:
        step = TrainingStep(name, network, batch_size, Place("cpu"))
        prepare(step.network)
        return peak_bytes(step)

    return peak_of


def _freeze_convolutions(network: nn.Module) -> None:
    """Leave out the gradients of their weights, which would outweigh the activations of a deep block at few images.

    What the shared buffer keeps does not depend on it.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)


SCRIPT = Script(
    "engine",
    "The shared buffer, measured",
    {
        "memory": Section(
            "Activation memory: live tensor bytes over a training step; for each image, without constant workspace",
            memory,
            tables.memory,
        ),
        "resident": Section("The same, as peak resident memory of a process", resident, tables.memory),
        "depth": Section("Memory against depth: plain networks, k=12, 32×32", depth, tables.depth),
        "time": Section(
            "Time of forward and backward in plain PyTorch, without native kernels: medians", time, tables.times
        ),
        "max-batch": Section("The largest batch in a fixed memory", largest_batch, tables.fitting),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    return SCRIPT.main(argv, FOLDER, FULL, QUICK)


if __name__ == "__main__":
    sys.exit(main())
