"""Measure the native CPU backend against the ordinary network, compiled and not, and where its time goes.

What is held to AVX2 is held to it in all contenders: our kernels, PyTorch's and oneDNN's.

    python benchmarks/cpu.py                                # everything: most of an hour, for compiling takes minutes
    python benchmarks/cpu.py --sections training            # this again; the other sections stay as they are
    python benchmarks/cpu.py --contenders ordinary,ordinary-channels-last,bottleneck,features   # without torch.compile
    python benchmarks/cpu.py --sections evaluation --contenders ordinary-channels-last,bottleneck,onnxruntime,openvino
    python benchmarks/cpu.py --sections                     # nothing: only write the table again

The measurements go to ``results/cpu.json`` beside this file, by processor, each section with its hardware, versions,
commit and date; those of other processors stay. ``results/cpu.md`` is made from that file alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine import bottleneck, job_of, plain, progress
from engine_report import source, table

from efficient_densenet.files import replacing
from efficient_densenet.measure import contest, machine
from efficient_densenet.measure.contender import TrainingStep
from efficient_densenet.measure.contenders import COMPILED, ORDINARY, contender_list
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.machine import HELD
from efficient_densenet.measure.networks import Network, positive_int
from efficient_densenet.measure.report import write_json
from efficient_densenet.ops import cpu

Record = dict[str, Any]
KEEPS = ("bottleneck", "features")


@dataclass(frozen=True)
class Row:
    """A network and a batch."""

    name: str
    network: Network
    batch_size: int


@dataclass(frozen=True)
class Plan:
    rows: tuple[Row, ...]
    contenders: tuple[str, ...]
    rounds: int


ROWS = (
    Row("L=40 k=12", plain(40), 128),
    Row("L=40 k=12", plain(40), 32),
    Row("BC L=100 k=12", bottleneck(100), 32),
    Row("DenseNet-121", Network("densenet121", {}, 224, 1000), 8),
    Row("BC L=190 k=40", bottleneck(190, 40), 8),
)
FULL = Plan(ROWS, (*ORDINARY, *COMPILED, *KEEPS), 7)
QUICK = Plan((Row("BC L=16 k=12", bottleneck(16), 2),), (*ORDINARY, *KEEPS), 2)


@dataclass(frozen=True)
class Contest:
    """Every contender in a process of its own, taking turns of one step.

    Attributes:
        title: in the results.
        how: of the job, beside the network and the batch: ``dtype``, and ``training``, False for forward alone under
            `torch.inference_mode`.
        instructions: the level that all contenders are held to; empty: the best there is.
    """

    title: str
    how: dict[str, Any]
    instructions: str = ""

    def __call__(self, plan: Plan) -> list[Record]:
        if not self.how.get("training", True):
            plan = replace(plan, contenders=tuple(name for name in plan.contenders if name != "features"))
        return [self._row(plan, row) for row in plan.rows]

    def _row(self, plan: Plan, row: Row) -> Record:
        progress(f"{row.name}, batch {row.batch_size} {self.title}")
        job = job_of(row.network, row.batch_size) | {"warmup": 1} | self.how
        results = contest.run(
            plan.contenders,
            job,
            plan.rounds,
            "cpu",
            num_devices=1,
            threads=None,
            environment=HELD.get(self.instructions),
        )
        return {
            "network": row.name,
            "batch_size": row.batch_size,
            "results": results,
            "summary": contest.summarize(results),
        }


def profile(plan: Plan) -> list[Record]:
    """Milliseconds of a training step in norm–relu–convolutions, in the passes by themselves, and elsewhere.

    Elsewhere are the first convolution, the classifier, PyTorch's and Python's own time; and page faults are counted.
    """
    records = []
    for row in plan.rows:
        for keep in KEEPS:
            progress(f"profile: {row.name}, batch {row.batch_size}, {keep}")
            records.append(
                {"network": row.name, "batch_size": row.batch_size, "contender": keep, **_profile(row, keep)}
            )
        faults = _page_faults(TrainingStep("ordinary-channels-last", row.network, row.batch_size, Place("cpu")))
        records.append(
            {"network": row.name, "batch_size": row.batch_size, "contender": "ordinary-channels-last", **faults}
        )
    return records


CONTESTS = {
    "training": Contest("Forward and backward in float32", {}),
    "evaluation": Contest("Evaluation in float32", {"training": False}),
    "bfloat16": Contest("Forward and backward in bfloat16", {"dtype": "bfloat16"}),
    "autocast": Contest("Forward and backward under autocast to bfloat16", {"dtype": "amp-bf16"}),
    "bfloat16-evaluation": Contest("Evaluation in bfloat16", {"dtype": "bfloat16", "training": False}),
    "avx2": Contest("Forward and backward in float32, held to AVX2", {}, "avx2"),
    "avx2-evaluation": Contest("Evaluation in float32, held to AVX2", {"training": False}, "avx2"),
}
PROFILE_TITLE = "Where the time of a step goes, in float32"
SECTIONS: dict[str, Callable[[Plan], list[Record]]] = {**CONTESTS, "profile": profile}
_CONVOLUTIONS = ("norm_relu_conv", "norm_relu_conv_backward")
_PASSES = (
    *("fold_norm", "statistics", "finish", "norm_relu_max_pool", "norm_relu_max_pool_backward"),
    *("norm_relu_mean", "norm_relu_mean_backward"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="measure the native CPU backend against the ordinary network")
    parser.add_argument("--sections", nargs="*", choices=tuple(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="a tiny network, to try this program")
    parser.add_argument("--rounds", type=positive_int, help=f"turns of each contender (None: {FULL.rounds})")
    parser.add_argument("--contenders", type=contender_list, help="who takes part (None: all)")
    parser.add_argument("--rows", type=int, nargs="*", help=f"which of the {len(ROWS)} networks, from 1 (None: all)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args(argv)
    plan = QUICK if arguments.quick else FULL
    if arguments.rows:
        plan = replace(plan, rows=tuple(plan.rows[i - 1] for i in arguments.rows))
    plan = replace(
        plan,
        rounds=arguments.rounds or plan.rounds,
        contenders=tuple(arguments.contenders or plan.contenders),
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "cpu.json"
    found: Record = json.loads(file.read_text()) if file.exists() else {}
    here = found.setdefault(_processor(), {}) if arguments.sections else {}
    for name in arguments.sections:
        here[name] = {"quick": arguments.quick, **machine.describe("cpu"), "records": SECTIONS[name](plan)}
        write_json(file, found)  # at once: what comes later may fail
    text = tables(json.loads(file.read_text()))
    print(text, end="")
    with replacing(file.with_suffix(".md")) as beside:
        beside.write_text(text)
    return 0


def _processor() -> str:
    """Its name, and the best instructions that the kernels find on it: what figures are kept by."""
    return f"{machine.describe('cpu')['hardware']['cpu']}, {cpu.library.load().instructions.option}"


def tables(found: Record) -> str:
    parts = ["# The native CPU backend, measured\n\nMade by `python benchmarks/cpu.py` from `cpu.json`."]
    for processor, sections in found.items():
        parts.append(f"## {processor}")
        for name in SECTIONS:
            if name not in sections:
                continue
            title = CONTESTS[name].title if name in CONTESTS else PROFILE_TITLE
            type_ = CONTESTS[name].how.get("dtype", "float32") if name in CONTESTS else "float32"
            records = sections[name]["records"]
            lines = _times(records) if name in CONTESTS else _profile_table(records)
            parts.append(f"### {title}\n\n{lines}\n\n{source(sections[name], type_)}")
    return "\n\n".join(parts) + "\n"


def _profile(row: Row, keep: str) -> Record:
    """Of the fastest of five steps."""
    step = TrainingStep(keep, row.network, row.batch_size, Place("cpu"))
    faults = _page_faults(step)
    spent: Counter[str] = Counter()
    originals = {name: getattr(cpu, name) for name in (*_CONVOLUTIONS, *_PASSES)}

    def timed(name: str, function: Callable) -> Callable:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            spent["convolutions" if name in _CONVOLUTIONS else "passes"] += time.perf_counter() - start
            return result

        return run

    best: Record = {}
    try:
        for name, function in originals.items():
            setattr(cpu, name, timed(name, function))
        for _ in range(5):
            spent.clear()
            whole = sum(step())
            if not best or whole < best["whole_ms"]:
                best = {"whole_ms": whole, **{f"{part}_ms": 1e3 * s for part, s in spent.items()}}
    finally:
        for name, function in originals.items():
            setattr(cpu, name, function)
    return best | faults


def _page_faults(step: TrainingStep, steps: int = 3) -> Record:
    for _ in range(2):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "page_faults": (after.ru_minflt - before.ru_minflt) / steps,
        "system_ms": 1e3 * (after.ru_stime - before.ru_stime) / steps,
    }


def _times(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        ordinary = [r["F+B"] for r in record["summary"] if r["contender"] in (*ORDINARY, *COMPILED)]
        for r in record["summary"]:
            times = [f"{r[part]['median']:,.0f}" for part in ("F", "B")]
            ratio = f"{r['F+B'] / min(ordinary):.3f}"
            rows.append([f"{record['network']}, batch {record['batch_size']}", r["contender"], *times, ratio])
    return table(["network", "contender", "F ms", "B ms", "F+B to the fastest ordinary"], rows)


def _profile_table(records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        whole = r.get("whole_ms")
        parts = [f"{r['convolutions_ms']:,.0f}", f"{r['passes_ms']:,.0f}"] if whole else ["", ""]
        rest = f"{whole - r['convolutions_ms'] - r['passes_ms']:,.0f}" if whole else ""
        rows.append(
            [
                f"{r['network']}, batch {r['batch_size']}",
                r["contender"],
                f"{whole:,.0f}" if whole else "",
                *parts,
                rest,
                f"{r['page_faults']:,.0f}",
                f"{r['system_ms']:,.0f}",
            ]
        )
    heads = [
        "network",
        "contender",
        "F+B ms",
        "norm–relu–convolutions",
        "other passes",
        "elsewhere",
        "page faults",
        "ms in the system",
    ]
    return table(heads, rows)


if __name__ == "__main__":
    sys.exit(main())
