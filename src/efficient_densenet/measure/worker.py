"""The process of one contender: it times training steps, measures their memory, and compares them with float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from efficient_densenet.errors import UserError
from efficient_densenet.measure.contender import TrainingStep
from efficient_densenet.measure.contenders import CONTENDERS
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.exactness import errors
from efficient_densenet.measure.networks import Network
from efficient_densenet.measure.processes import Job, serve
from efficient_densenet.units import format_bytes


def limit_memory(limit: int) -> None:
    """Let the allocator of the GPU run out of memory at `limit` bytes."""
    free, total = torch.cuda.mem_get_info()
    if limit > free:
        raise UserError(
            f"{format_bytes(free)} of the GPU are free, not {format_bytes(limit)}: use a smaller --max-batch"
        )
    torch.cuda.set_per_process_memory_fraction(limit / total)


def start(job: Job, place: Place) -> dict[str, Callable[[], Any]]:
    if CONTENDERS[job["contender"]].graph:
        raise UserError(f"{job['contender']} takes part in benchmarks/gpu.py alone: leave it out of --contenders")
    if job["memory_limit"] is not None and place.device_type == "cuda":
        limit_memory(job["memory_limit"])
    how = {name: job[name] for name in ("dtype", "training") if name in job}
    step = TrainingStep(job["contender"], Network(**job["network"]), job["batch_size"], place, **how)
    return {
        "turn": lambda: step.turn(job["warmup"], job["iterations"]),
        "memory": step.memory,
        "process_bytes": step.process_bytes,
        "errors": lambda: errors(step),
    }


if __name__ == "__main__":
    serve(start)
