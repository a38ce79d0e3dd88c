"""Measure the native CPU backend against the ordinary network, compiled and not, and where its time goes.

    python benchmarks/cpu.py                                # everything: most of an hour, for compiling takes minutes
    python benchmarks/cpu.py --sections training            # this again; the other sections stay as they are
    python benchmarks/cpu.py --contenders ordinary,ordinary-channels-last,bottleneck,features   # without torch.compile
    python benchmarks/cpu.py --sections                     # nothing: only write the table again

The measurements go to ``results/cpu.json`` beside this file, each section with its hardware, versions, commit and
date; ``results/cpu.md`` is made from that file alone.
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
from efficient_densenet.measure.networks import Network, positive_int
from efficient_densenet.measure.report import write_json
from efficient_densenet.ops import cpu

Record = dict[str, Any]
KEEPS = ("bottleneck", "features")


@dataclass(frozen=True)
class Row:
    """A network and a batch, and the most that the time may be, as a share of the fastest ordinary form."""

    name: str
    network: Network
    batch_size: int
    bars: dict[str, float]


@dataclass(frozen=True)
class Plan:
    rows: tuple[Row, ...]
    contenders: tuple[str, ...]
    rounds: int


ROWS = (
    Row("L=40 k=12", plain(40), 128, {"bottleneck": 0.55, "features": 0.55}),
    Row("L=40 k=12", plain(40), 32, {"bottleneck": 0.65, "features": 0.65}),
    Row("BC L=100 k=12", bottleneck(100), 32, {"bottleneck": 0.65, "features": 0.80}),
    Row("DenseNet-121", Network("densenet121", {}, 224, 1000), 8, {"bottleneck": 0.80, "features": 0.95}),
    Row("BC L=190 k=40", bottleneck(190, 40), 8, {"bottleneck": 0.70, "features": 0.85}),
)
FULL = Plan(ROWS, (*ORDINARY, *COMPILED, *KEEPS), 7)
QUICK = Plan((Row("BC L=16 k=12", bottleneck(16), 2, {}),), (*ORDINARY, *KEEPS), 2)
EVALUATION_BAR = 0.7


def training(plan: Plan) -> list[Record]:
    """Forward and backward in float32: every contender in a process of its own, taking turns of one step."""
    return [_contest(plan, row, {}) for row in plan.rows]


def evaluation(plan: Plan) -> list[Record]:
    """Forward alone, under `torch.inference_mode`."""
    plan = replace(plan, contenders=tuple(name for name in plan.contenders if name != "features"))
    return [_contest(plan, row, {"training": False}) for row in plan.rows]


def bfloat16(plan: Plan) -> list[Record]:
    """Forward and backward of networks in bfloat16."""
    return [_contest(plan, row, {"dtype": "bfloat16"}) for row in plan.rows]


def profile(plan: Plan) -> list[Record]:
    """Milliseconds of a training step in norm–relu–convolutions, in the passes by themselves, and elsewhere.

    Elsewhere are the first convolution, the head, PyTorch's and Python's own time; and page faults are counted.
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


SECTIONS: dict[str, tuple[str, Callable[[Plan], list[Record]]]] = {
    "training": ("Forward and backward in float32", training),
    "evaluation": ("Evaluation in float32", evaluation),
    "bfloat16": ("Forward and backward in bfloat16", bfloat16),
    "profile": ("Where the time of a step goes, in float32", profile),
}
_CONVOLUTIONS = ("norm_relu_conv", "norm_relu_conv_backward")
_PASSES = ("statistics", "finish", "norm_relu_max_pool", "norm_relu_max_pool_backward")


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
    for name in arguments.sections:
        records = SECTIONS[name][1](plan)
        found[name] = {"quick": arguments.quick, **machine.describe("cpu"), "records": records}
        write_json(file, found)  # at once: what comes later may fail
    text = tables(json.loads(file.read_text()))
    print(text, end="")
    with replacing(file.with_suffix(".md")) as beside:
        beside.write_text(text)
    return 0


def tables(found: Record) -> str:
    parts = ["# The native CPU backend, measured\n\nMade by `python benchmarks/cpu.py` from `cpu.json`."]
    for name, (title, _) in SECTIONS.items():
        if name in found:
            lines = (
                _profile_table(found[name]["records"]) if name == "profile" else _times(name, found[name]["records"])
            )
            parts.append(
                f"## {title}\n\n{lines}\n\n{source(found[name], 'bfloat16' if name == 'bfloat16' else 'float32')}"
            )
    return "\n\n".join(parts) + "\n"


def _contest(plan: Plan, row: Row, how: dict[str, Any]) -> Record:
    progress(f"{row.name}, batch {row.batch_size} {how or ''}")
    job = job_of(row.network, row.batch_size) | {"warmup": 1} | how
    results = contest.run(plan.contenders, job, plan.rounds, "cpu", num_devices=1, threads=None)
    return {
        "network": row.name,
        "batch_size": row.batch_size,
        "bars": row.bars,
        "results": results,
        "summary": contest.summarize(results),
    }


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


def _times(section: str, records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        others = [r["F+B"] for r in record["summary"] if r["contender"] in (*ORDINARY, *COMPILED)]
        for r in record["summary"]:
            ratio = r["F+B"] / min(others)
            bar = record["bars"].get(r["contender"]) if section == "training" else None
            if section == "evaluation" and r["contender"] in KEEPS:
                bar = EVALUATION_BAR
            at_most = "" if bar is None else f"{bar:.2f} {'reached' if ratio <= bar else 'MISSED'}"
            times = [f"{r[part]['median']:,.0f}" for part in ("F", "B")]
            rows.append(
                [f"{record['network']}, batch {record['batch_size']}", r["contender"], *times, f"{ratio:.3f}", at_most]
            )
    return table(["network", "contender", "F ms", "B ms", "F+B to the fastest other", "at most"], rows)


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
