"""Time contenders against each other: each in processes of its own, taking turns, on the same machine and minute."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from typing import Any

from efficient_densenet.errors import UserError
from efficient_densenet.measure import worker
from efficient_densenet.measure.contenders import ORDINARY
from efficient_densenet.measure.machine import HELD
from efficient_densenet.measure.networks import Network
from efficient_densenet.measure.processes import Job, Team, progress

Result = dict[str, Any]
"""Raw measurements of one contender on one number of devices, as written to the result file."""


def job(network: Network, batch_size: int, warmup: int = 0, iterations: int = 1, **how: Any) -> Job:
    """What the workers get, but for the name of the contender.

    Args:
        network: which network.
        batch_size: images over all devices.
        warmup: steps in each turn that do not count; the one whose memory is measured comes before all turns.
        iterations: timed steps in each turn.
        how: ``dtype`` and ``training`` of `TrainingStep`; ``memory_limit`` in bytes, which a GPU is held to.
    """
    return {
        "network": asdict(network),
        "batch_size": batch_size,
        "warmup": warmup,
        "iterations": iterations,
        "memory_limit": None,
        **how,
    }


def run(
    names: Sequence[str],
    job: Job,
    rounds: int,
    device_type: str = "cpu",
    num_devices: int = 1,
    threads: int | None = None,
    environment: Mapping[str, str] | None = None,
    check: bool = False,
    gaps: list[dict[str, str]] | None = None,
) -> list[Result]:
    """Let each contender measure its memory, then time it in `rounds` turns of each.

    Of several devices the slowest counts in every step, and the fullest.

    Args:
        names: of the contenders.
        job: see `job`.
        rounds: turns of each.
        device_type: ``"cpu"`` or ``"cuda"``.
        num_devices: how many share the batch.
        threads: of each process; None: the cores are shared out.
        environment: variables that the workers have besides those of this process.
        check: at the end, compare each on one device with the network in float64, see `exactness`.
        gaps: takes those that cannot take part, with the reason; None: that is an error.
    """
    with ExitStack() as stack:
        results: list[Result] = []
        teams: list[Team] = []
        for name in names:
            progress(f"{num_devices} × {device_type}, memory: {name}")
            own = job | {"contender": name}
            try:
                team = stack.enter_context(Team(worker.__name__, own, device_type, num_devices, threads, environment))
                memory = _memory(team.ask("memory"))
            except UserError as error:
                if gaps is None:
                    raise
                gaps.append({"contender": name, "reason": str(error)})
                continue
            teams.append(team)
            results.append({"contender": name, "num_devices": num_devices, "threads": team.threads, **memory})
        for i in range(rounds):
            for result, team in zip(results, teams, strict=True):
                progress(f"{num_devices} × {device_type}, round {i + 1} of {rounds}: {result['contender']}")
                turns = team.ask("turn")
                for part in ("forward_ms", "backward_ms"):
                    slowest = [max(times) for times in zip(*(turn[part] for turn in turns), strict=True)]
                    result.setdefault(part, []).append(slowest)
        for result, team in zip(results, teams if check else [], strict=check):
            progress(f"compared with float64: {result['contender']}")
            (result["errors"],) = team.ask("errors")
            team.close()  # what it needed for that
    return results


def record(
    name: str, job: Job, names: Sequence[str], rounds: int, instructions: str | None = None, check: bool = False
) -> dict[str, Any]:
    """`run` on the CPU, held to `instructions` where these are given, with its summary, as it is kept in a file.

    With `check`, contenders that cannot take part are noted as gaps.
    """
    progress(f"{name}, batch {job['batch_size']}")
    gaps: list[dict[str, str]] = []
    environment = HELD.get(instructions or "")
    results = run(names, job, rounds, environment=environment, check=check, gaps=gaps if check else None)
    found = {"network": name, "batch_size": job["batch_size"], "results": results, "summary": summarize(results)}
    return found | ({"gaps": gaps} if check else {})


def summarize(results: Sequence[Result]) -> list[Result]:
    """One row for each result: times in milliseconds, ratios to the first contender on the same number of devices.

    Ratios are ratios of medians. `F+B to ordinary` is to the faster of the ordinary contenders, None without any;
    `pairs` are the ratios to the same of one step after the other: quartiles and median.
    """
    rows: list[Result] = []
    for result in results:
        forward, backward = (list(chain.from_iterable(result[part])) for part in ("forward_ms", "backward_ms"))
        row: Result = {key: result[key] for key in ("contender", "num_devices")}
        for name, times in (("F", forward), ("B", backward)):
            row[name] = {
                "median": statistics.median(times),
                "mean": statistics.fmean(times),
                "std": statistics.stdev(times) if len(times) > 1 else 0.0,
            }
        row["B/F"] = row["B"]["median"] / row["F"]["median"]
        row["F+B"] = statistics.median(_steps(result))
        row |= {key: result[key] for key in ("step_bytes", "step_bytes_per_image", "process_bytes")}
        first = next((r for r in rows if r["num_devices"] == row["num_devices"]), row)
        row |= {key: result[key] for key in ("ready_s", "errors") if key in result}
        row["F+B ratio"] = row["F+B"] / first["F+B"]
        row["memory ratio"] = row["step_bytes"] / first["step_bytes"]
        rows.append(row)
    for row, result in zip(rows, results, strict=True):
        ordinary = [
            i for i, r in enumerate(rows) if r["contender"] in ORDINARY and r["num_devices"] == row["num_devices"]
        ]
        best = min(ordinary, key=lambda i: rows[i]["F+B"], default=None)
        row["F+B to ordinary"] = None if best is None else row["F+B"] / rows[best]["F+B"]
        row["pairs"] = None if best is None else _pairs(result, results[best])
    return rows


def _pairs(result: Result, ordinary: Result) -> dict[str, float]:
    """Steps of the same turn in pairs, so that a machine that changes its speed changes both."""
    ratios = [a / b for a, b in zip(_steps(result), _steps(ordinary), strict=False)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"low": low, "median": median, "high": high}


def _steps(result: Result) -> list[float]:
    forward, backward = (chain.from_iterable(result[part]) for part in ("forward_ms", "backward_ms"))
    return [f + b for f, b in zip(forward, backward, strict=True)]


def _memory(answers: Sequence[dict[str, float]]) -> Result:
    fullest = max(answers, key=lambda answer: answer["step"])
    return {
        "step_bytes": fullest["step"],
        "step_bytes_per_image": fullest["step"] / fullest["images"],
        "process_bytes": max(answer["process"] for answer in answers),
        "ready_s": max(answer["ready_s"] for answer in answers),
    }
