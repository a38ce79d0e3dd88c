"""Compare the ordinary and the efficient network with float64, in every type, and write what the documentation says.

    python benchmarks/exactness.py            # some two minutes on two cores

The errors go to ``results/exactness.json`` beside this file, and `redraw.py` draws them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from efficient_densenet.measure import tables
from efficient_densenet.measure.contender import DTYPES, TrainingStep
from efficient_densenet.measure.contenders import ORDINARY, OURS
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.exactness import errors
from efficient_densenet.measure.networks import Network, cifar
from efficient_densenet.measure.processes import progress
from efficient_densenet.measure.results import Record
from efficient_densenet.measure.script import Script, Section

FOLDER = Path(__file__).parent / "results"
WAYS = (*ORDINARY, *OURS)


@dataclass(frozen=True)
class Plan:
    """Which network, and how many images."""

    name: str
    network: Network
    batch_size: int


FULL = Plan("BC L=100 k=12", cifar(100, bottleneck=True), 16)
QUICK = Plan("BC L=10", cifar(10, bottleneck=True), 2)


def every_type(plan: Plan) -> list[Record]:
    """Of each way and type: the error of the output in evaluation, and of the gradient of a training step."""
    records = []
    for dtype in DTYPES:
        for way in WAYS:
            progress(f"{dtype}, {way}")
            found: dict[str, float] = {}
            for training in (False, True):
                found |= errors(TrainingStep(way, plan.network, plan.batch_size, Place("cpu"), dtype, training))
            about = {"network": plan.name, "batch_size": plan.batch_size, "dtype": dtype, "contender": way}
            records.append({**about, "output": found["output"], "gradient": found["gradient"]})
    return records


def table(records: list[Record]) -> str:
    """Both errors, by type and way."""
    found = {(r["dtype"], r["contender"]): f"{r['output']:.1e}, {r['gradient']:.1e}" for r in records}
    types = dict.fromkeys(r["dtype"] for r in records)
    rows = [[way, *(found[dtype, way] for dtype in types)] for way in dict.fromkeys(r["contender"] for r in records)]
    return tables.markdown([f"{records[0]['network']}, batch {records[0]['batch_size']}", *types], rows, names=1)


SCRIPT = Script(
    "exactness",
    "How far results are from float64",
    {
        "every-type": Section(
            "Errors of the output in evaluation, and of the gradient of a training step, as shares of their norms",
            every_type,
            table,
            "every type",
        )
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    return SCRIPT.main(argv, FOLDER, FULL, QUICK)


if __name__ == "__main__":
    sys.exit(main())
