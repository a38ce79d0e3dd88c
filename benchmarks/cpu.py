"""Measure the native CPU backend against the ordinary network, compiled and not.

What is held to AVX2 is held to it in all contenders: our kernels, PyTorch's and oneDNN's.

    python benchmarks/cpu.py                                # everything: most of an hour, for compiling takes minutes
    python benchmarks/cpu.py --sections training            # this again; the other sections stay as they are
    python benchmarks/cpu.py --contenders ordinary,ordinary-channels-last,bottleneck,features   # without torch.compile
    python benchmarks/cpu.py --sections evaluation --contenders ordinary-channels-last,bottleneck,onnxruntime,openvino
    python benchmarks/cpu.py --sections                     # nothing: only write the tables again

The measurements go to ``results/cpu.json`` beside this file, by processor, each section with its hardware, versions,
commit and date; those of other processors stay. ``results/cpu.md`` is made from that file alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from efficient_densenet.measure import contest, tables
from efficient_densenet.measure.contenders import COMPILED, ORDINARY, contender_list
from efficient_densenet.measure.networks import Network, cifar, imagenet
from efficient_densenet.measure.results import Record
from efficient_densenet.measure.script import Script, Section

FOLDER = Path(__file__).parent / "results"
KEEPS = ("bottleneck", "features")


@dataclass(frozen=True)
class Row:
    """A network and a batch, and the timed steps of a turn."""

    name: str
    network: Network
    batch_size: int
    steps: int = 1


@dataclass(frozen=True)
class Plan:
    rows: tuple[Row, ...]
    contenders: tuple[str, ...]
    rounds: int
    evaluated: tuple[Row, ...] = ()  # besides `rows`


ROWS = (
    Row("L=40 k=12", cifar(40), 128),
    Row("L=40 k=12", cifar(40), 32),
    Row("BC L=100 k=12", cifar(100, bottleneck=True), 32),
    Row("DenseNet-121", imagenet("densenet121"), 8),
    Row("BC L=190 k=40", cifar(190, 40, bottleneck=True), 8),
)
ONE_IMAGE = Row("DenseNet-121", imagenet("densenet121"), 1, steps=20)
FULL = Plan(ROWS, (*ORDINARY, *COMPILED, *KEEPS), 7, (ONE_IMAGE,))
QUICK = Plan((Row("BC L=16 k=12", cifar(16, bottleneck=True), 2),), (*ORDINARY, *KEEPS), 2)


def race(title: str, dtype: str = "float32", training: bool = True, instructions: str | None = None) -> Section:
    """Every contender in a process of its own, taking turns."""

    def measure(plan: Plan) -> list[Record]:
        contenders = [name for name in plan.contenders if training or name != "features"]
        return [
            contest.record(
                row.name,
                contest.job(row.network, row.batch_size, 1, row.steps, dtype=dtype, training=training),
                contenders,
                plan.rounds,
                instructions,
            )
            for row in (plan.rows if training else (*plan.rows, *plan.evaluated))
        ]

    return Section(title, measure, tables.times, dtype)


SCRIPT = Script(
    "cpu",
    "The native CPU backend, measured",
    {
        "training": race("Forward and backward in float32"),
        "evaluation": race("Evaluation in float32", training=False),
        "bfloat16": race("Forward and backward in bfloat16", "bfloat16"),
        "autocast": race("Forward and backward under autocast to bfloat16", "amp-bf16"),
        "bfloat16-evaluation": race("Evaluation in bfloat16", "bfloat16", training=False),
        "avx2": race("Forward and backward in float32, held to AVX2", instructions="avx2"),
        "avx2-evaluation": race("Evaluation in float32, held to AVX2", training=False, instructions="avx2"),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = SCRIPT.parser(FOLDER, FULL)
    parser.add_argument("--contenders", type=contender_list, help="who takes part (None: all)")
    parser.add_argument("--rows", type=int, nargs="*", help=f"which of the {len(ROWS)} networks, from 1 (None: all)")
    arguments = parser.parse_args(argv)
    plan = SCRIPT.plan(arguments, FULL, QUICK)
    plan = replace(
        plan,
        rows=tuple(plan.rows[i - 1] for i in arguments.rows or range(1, len(plan.rows) + 1)),
        contenders=tuple(arguments.contenders or plan.contenders),
    )
    return SCRIPT.run(arguments, plan)


if __name__ == "__main__":
    sys.exit(main())
