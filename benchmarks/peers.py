"""Measure this library's networks beside other libraries', compiled ones, and runtimes for evaluation.

    python benchmarks/peers.py --sections training      # DenseNet-121: some five minutes on two cores
    python benchmarks/peers.py --sections evaluation    # the same in evaluation, with ONNX Runtime and OpenVINO
    python benchmarks/peers.py --sections compiled      # BC L=40: torch.compile with and without a memory budget
    python benchmarks/peers.py --sections max-batch     # the largest batch of DenseNet-121 in 2 GB

Every contender has a process of its own, and all take turns. At the end each is compared with the ordinary network in
float64, from the same weights. A package that is not installed is a named gap.

The measurements go to ``results/peers.json`` beside this file, by processor, each section with its hardware, versions,
commit and date; ``results/peers.md`` is made from that file alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from efficient_densenet.measure import contest, max_batch, tables
from efficient_densenet.measure.contenders import FORMS, PEERS, PEERS_IN_EVALUATION
from efficient_densenet.measure.networks import TINY, Network, cifar, imagenet
from efficient_densenet.measure.results import Record
from efficient_densenet.measure.script import Script, Section

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Plan:
    """How much is measured: an ImageNet network and a CIFAR network, each with its batch."""

    large: tuple[str, Network, int]
    small: tuple[str, Network, int]
    rounds: int
    limit: int


FULL = Plan(
    ("DenseNet-121", imagenet("densenet121"), 8), ("BC L=40 k=12", cifar(40, bottleneck=True), 64), 7, 2_000_000_000
)
QUICK = Plan(("tiny", TINY, 2), ("BC L=10", cifar(10, bottleneck=True), 2), 2, 1_000_000_000)


def race(contenders: Sequence[str], of: Callable[[Plan], tuple[str, Network, int]], training: bool = True) -> Callable:
    def measure(plan: Plan) -> list[Record]:
        name, network, batch_size = of(plan)
        job = contest.job(network, batch_size, warmup=1, training=training)
        return [contest.record(name, job, contenders, plan.rounds, check=True)]

    return measure


def largest_batch(plan: Plan) -> list[Record]:
    """In a fixed resident size of the process."""
    name, network, _ = plan.large
    contenders = ["ordinary", "torchvision-flag", "bottleneck", "features", "inputs"]
    gaps: list[dict[str, str]] = []
    found = max_batch.run(contenders, contest.job(network, 1), plan.limit, gaps=gaps)
    return [{"network": name, "limit_bytes": plan.limit, "results": found, "gaps": gaps}]


SCRIPT = Script(
    "peers",
    "Side by side with other libraries",
    {
        "training": Section(
            "Training: forward and backward", race(PEERS, lambda plan: plan.large), tables.side_by_side
        ),
        "evaluation": Section(
            "Evaluation", race(PEERS_IN_EVALUATION, lambda plan: plan.large, training=False), tables.side_by_side
        ),
        "compiled": Section(
            "Compiled, with and without a memory budget", race(FORMS, lambda plan: plan.small), tables.side_by_side
        ),
        "max-batch": Section("The largest batch in a fixed memory", largest_batch, tables.fitting),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    return SCRIPT.main(argv, FOLDER, FULL, QUICK)


if __name__ == "__main__":
    sys.exit(main())
