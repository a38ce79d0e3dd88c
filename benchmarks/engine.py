"""Measure the shared buffer against the ordinary network, and write what the documentation says about it.

    python benchmarks/engine.py                      # everything: about a quarter of an hour on two quiet cores
    python benchmarks/engine.py --sections time      # this again; the other sections stay as they are
    python benchmarks/engine.py --sections           # nothing: only write the table and the plot again

The measurements go to ``results/engine.json`` beside this file, each section with its hardware, versions, commit and
date; ``results/engine.md`` and ``results/engine.png`` are made from that file alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

from engine_report import plot, tables
from torch import nn

from efficient_densenet.execution import KEEP
from efficient_densenet.files import replacing
from efficient_densenet.measure import contender, contest, machine, max_batch
from efficient_densenet.measure.contender import TrainingStep
from efficient_densenet.measure.contenders import ORDINARY
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.memory import peak_bytes
from efficient_densenet.measure.networks import Network, positive_int
from efficient_densenet.measure.processes import Job, Team
from efficient_densenet.measure.report import write_json

Record = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A network, and the batches at which it is measured: two for each kind of memory, one for time.

    Those for memory are large enough that the scratch of the shared buffer, a few megabytes, no longer grows.
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
            that the scratch of the shared buffer no longer grows.
        rounds: turns of one step that each contender gets on the clock.
        limit: bytes for the largest batch.
    """

    subjects: tuple[Subject, ...]
    depths: dict[int, tuple[int, int]]
    rounds: int
    limit: int


def plain(depth: int) -> Network:
    return Network("densenet_cifar", {"depth": depth, "growth_rate": 12, "num_classes": 10}, 32, 10)


def bottleneck(depth: int, growth_rate: int = 12) -> Network:
    arguments = {"depth": depth, "growth_rate": growth_rate, "bottleneck": True, "num_classes": 10}
    return Network("densenet_cifar", arguments, 32, 10)


FULL = Plan(
    subjects=(
        Subject("L=40 k=12", plain(40), (64, 96), (16, 128), 128),
        Subject("BC L=100 k=12", bottleneck(100), (48, 64), (8, 64), 32),
        Subject("DenseNet-121", Network("densenet121", {}, 224, 1000), (4, 8), (2, 16), 8),
    ),
    depths={40: (48, 64), 100: (24, 32), 190: (24, 32), 250: (24, 32)},
    rounds=7,
    limit=2_000_000_000,
)
QUICK = Plan(
    subjects=(Subject("BC L=16 k=12", bottleneck(16), (4, 8), (2, 4), 2),),
    depths={10: (2, 4), 16: (2, 4), 22: (2, 4)},
    rounds=2,
    limit=1_000_000_000,
)


def memory(plan: Plan) -> list[Record]:
    """Bytes of live tensors that a training step adds, at two batches; their slope leaves out constant scratch."""
    records = []
    for subject in plan.subjects:
        for name in ("ordinary", "recompute", *KEEP):
            progress(f"memory: {subject.name}, {name}")
            peaks = _live_bytes(name, subject.network, subject.memory_batches)
            records.append({"network": subject.name, "contender": name, **_slope(peaks)})
    return records


def resident(plan: Plan) -> list[Record]:
    """The peak resident size of a fresh process that runs one training step, at a small and at a large batch."""
    records = []
    for subject in plan.subjects:
        for name in ("ordinary", *KEEP):
            progress(f"resident: {subject.name}, {name}")
            peaks = {}
            for batch_size in subject.resident_batches:
                with Team(contender.__name__, job_of(subject.network, batch_size) | {"contender": name}) as team:
                    (peaks[batch_size],) = team.ask("process_bytes")
            records.append({"network": subject.name, "contender": name, **_slope(peaks)})
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
            if name == "ordinary":  # which has no scratch, and would be too large at those batches
                points[layers] = _slope(_live_bytes(name, plain(layers), (1, 2)))
            else:
                points[layers] = _slope(_live_bytes(name, plain(layers), batches, _freeze_convolutions))
        values = [point["bytes_per_image"] for point in points.values()]
        line = linear_regression(list(plan.depths), values)
        records.append(
            {
                "contender": name,
                "points": points,
                "bytes_per_layer": line.slope,
                "bytes_at_depth_0": line.intercept,
                "largest_residual": max(
                    abs(line.slope * x + line.intercept - y) / y for x, y in zip(plan.depths, values, strict=True)
                ),
            }
        )
    return records


def time(plan: Plan) -> list[Record]:
    """Forward and backward in plain PyTorch: every contender in a process of its own, taking turns of one step."""
    records = []
    for subject in plan.subjects:
        progress(f"time: {subject.name}, batch {subject.time_batch}")
        job = job_of(subject.network, subject.time_batch)
        names = [*ORDINARY, *(f"{keep}-plain" for keep in KEEP)]
        results = contest.run(names, job, plan.rounds, "cpu", num_devices=1, threads=None)
        summary = contest.summarize(results)
        records.append(
            {"network": subject.name, "batch_size": subject.time_batch, "results": results, "summary": summary}
        )
    return records


def largest_batch(plan: Plan) -> list[Record]:
    """The largest batch of the first network whose process stays within a fixed resident size."""
    subject = plan.subjects[0]
    results = max_batch.run(["ordinary", *KEEP], job_of(subject.network, 1), plan.limit, "cpu", threads=None)
    return [{"network": subject.name, "limit_bytes": plan.limit, "results": results}]


SECTIONS: dict[str, Callable[[Plan], list[Record]]] = {
    "memory": memory,
    "resident": resident,
    "depth": depth,
    "time": time,
    "max-batch": largest_batch,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="measure the shared buffer against the ordinary network, on the CPU")
    parser.add_argument(
        "--sections", nargs="*", choices=tuple(SECTIONS), default=list(SECTIONS), help="what to measure"
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks, to try this program")
    parser.add_argument("--rounds", type=positive_int, help=f"turns of each contender (None: {FULL.rounds})")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args(argv)
    plan = QUICK if arguments.quick else FULL
    if arguments.rounds is not None:
        plan = Plan(**(vars(plan) | {"rounds": arguments.rounds}))
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "engine.json"
    found: Record = json.loads(file.read_text()) if file.exists() else {}
    for name in arguments.sections:
        records = SECTIONS[name](plan)
        found[name] = {"quick": arguments.quick, **machine.describe("cpu"), "records": records}
        write_json(file, found)  # at once: what comes later may fail
    found = json.loads(file.read_text())
    text = tables(found)
    print(text, end="")
    with replacing(file.with_suffix(".md")) as beside:
        beside.write_text(text)
    if "depth" in found:
        with replacing(file.with_suffix(".png")) as beside:
            plot(found["depth"]["records"], beside)
    return 0


def job_of(network: Network, batch_size: int) -> Job:
    return {
        "network": asdict(network),
        "batch_size": batch_size,
        "warmup": 0,  # the step whose memory is measured was one
        "iterations": 1,
        "memory_limit": None,
    }


def _live_bytes(
    name: str, network: Network, batches: Sequence[int], prepare: Callable[[nn.Module], None] = lambda network: None
) -> dict[int, int]:
    peaks = {}
    for n in batches:
        step = TrainingStep(name, network, n, Place("cpu"))
        prepare(step.network)
        peaks[n] = peak_bytes(step)
    return peaks


def _freeze_convolutions(network: nn.Module) -> None:
    """Leave out the gradients of their weights, which would outweigh the activations of a deep block at few images.

    What the shared buffer keeps does not depend on it.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)


def _slope(peaks: dict[int, int]) -> Record:
    (small, fewer), (large, more) = peaks.items()
    return {"peak_bytes": peaks, "bytes_per_image": (more - fewer) / (large - small)}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
