"""Time contenders against each other: each in processes of its own, taking turns, on the same machine and minute."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from typing import Any

from efficient_densenet.measure import contender
from efficient_densenet.measure.contenders import ORDINARY
from efficient_densenet.measure.machine import HELD
from efficient_densenet.measure.networks import Network
from efficient_densenet.measure.processes import Job, Team, progress

Result = dict[str, Any]
"""Raw measurements of one contender on one number of devices, as written to the result file."""


def job(network: Network, batch_size: int, warmup: int = 0, iterations: int = 1, **how: Any) -> Job:
    """What the workers of `contender` get, but for the name of the contender.

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
) -> list[Result]:
    """Let each contender measure its memory, then time it in `rounds` turns of each.

    Of several devices the slowest counts in every step, and the fullest.
    """
    with ExitStack() as stack:
        teams = [
            stack.enter_context(
                Team(contender.__name__, job | {"contender": n}, device_type, num_devices, threads, environment)
            )
            for n in names
        ]
        results: list[Result] = []
        for name, team in zip(names, teams, strict=True):
            progress(f"{num_devices} × {device_type}, memory: {name}")
            place = {"num_devices": num_devices, "threads": team.threads}
            results.append({"contender": name, **place, **_memory(team.ask("memory"))})
        for i in range(rounds):
            for result, team in zip(results, teams, strict=True):
                progress(f"{num_devices} × {device_type}, round {i + 1} of {rounds}: {result['contender']}")
                turns = team.ask("turn")
                for part in ("forward_ms", "backward_ms"):
                    slowest = [max(times) for times in zip(*(turn[part] for turn in turns), strict=True)]
                    result.setdefault(part, []).append(slowest)
    return results


def record(name: str, job: Job, names: Sequence[str], rounds: int, instructions: str | None = None) -> dict[str, Any]:
    """`run` on the CPU, held to `instructions` where these are given, with its summary, as it is kept in a file."""
    progress(f"{name}, batch {job['batch_size']}")
    results = run(names, job, rounds, environment=HELD.get(instructions or ""))
    return {"network": name, "batch_size": job["batch_size"], "results": results, "summary": summarize(results)}


def summarize(results: Sequence[Result]) -> list[Result]:
    """One row for each result: times in milliseconds, ratios to the first contender on the same number of devices.

    Ratios are ratios of medians. `F+B to ordinary` is to the faster of the ordinary contenders, None without any.
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
        row["F+B"] = statistics.median(f + b for f, b in zip(forward, backward, strict=True))
        row |= {key: result[key] for key in ("step_bytes", "step_bytes_per_image", "process_bytes")}
        first = next((r for r in rows if r["num_devices"] == row["num_devices"]), row)
        row["F+B ratio"] = row["F+B"] / first["F+B"]
        row["memory ratio"] = row["step_bytes"] / first["step_bytes"]
        rows.append(row)
    for row in rows:
        ordinary = [r["F+B"] for r in rows if r["contender"] in ORDINARY and r["num_devices"] == row["num_devices"]]
        row["F+B to ordinary"] = row["F+B"] / min(ordinary) if ordinary else None
    return rows


def _memory(answers: Sequence[dict[str, int]]) -> Result:
    fullest = max(answers, key=lambda answer: answer["step"])
    return {
        "step_bytes": fullest["step"],
        "step_bytes_per_image": fullest["step"] / fullest["images"],
        "process_bytes": max(answer["process"] for answer in answers),
    }
