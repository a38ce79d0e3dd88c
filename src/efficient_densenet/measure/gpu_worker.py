"""The process of one contender of ``benchmarks/gpu.py``: a training step, timed and weighed on a GPU."""

from __future__ import annotations

import functools
import importlib
import re
import statistics
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from efficient_densenet.measure.clock import Clock
from efficient_densenet.measure.contender import TrainingStep
from efficient_densenet.measure.contenders import CONTENDERS
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.max_batch import largest_batch
from efficient_densenet.measure.networks import Network
from efficient_densenet.measure.processes import Job, serve
from efficient_densenet.measure.worker import limit_memory

KERNELS = "kernels"
"""In place of a contender: every kernel of the Triton backend by itself."""
_NO_MEMORY = re.compile("out of memory|ALLOC_FAILED|unable to find an engine", re.IGNORECASE)


class GpuStep(TrainingStep):
    """A training step whose gradients begin as nothing, as they do when networks are trained."""

    def forget_gradients(self) -> None:
        self.network.zero_grad(set_to_none=True)

    def prepare(self) -> dict[str, Any]:
        """One step, for which code is compiled and algorithms are chosen; its memory is given back."""
        self.forget_gradients()
        self()
        self.forget_gradients()
        del self.images, self.labels
        torch.cuda.empty_cache()
        return {}

    def times(self, warmup: int, iterations: int) -> dict[str, Any]:
        """Medians of milliseconds, images per second, and the peak of what was allocated."""
        self.set_batch(self.batch_size)
        for _ in range(warmup):
            self.forget_gradients()
            self()
        torch.cuda.reset_peak_memory_stats(self.place.device)
        step = self._captured() if self.made.graph else self
        forward: list[float] = []
        whole: list[float] = []
        # Large networks have steps so long, and so even, that fewer do.
        while len(whole) < iterations and (len(whole) < 5 or sum(whole) < 3000):
            if not self.made.graph:
                self.forget_gradients()
            parts = step()
            forward.append(parts[0])
            whole.append(sum(parts))
        total = statistics.median(whole)
        backward = [b - a for a, b in zip(forward, whole, strict=True)]
        return {
            "batch": self.batch_size,
            "forward_ms": None if self.made.graph else statistics.median(forward),
            "backward_ms": None if self.made.graph else statistics.median(backward),
            "step_ms": total,
            "all_steps_ms": whole,
            "images_per_second": 1e3 * self.batch_size / total,
            "peak_bytes": torch.cuda.max_memory_allocated(self.place.device),
        }

    def _captured(self) -> Callable[[], tuple[float, float]]:
        """Replays a CUDA graph of the whole step, whose time counts as that of forward."""
        device = self.place.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self.loss().backward()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.forget_gradients()
        with torch.cuda.graph(graph):
            self.loss().backward()

        def replay() -> tuple[float, float]:
            clock = Clock(self.place)
            clock.mark()
            graph.replay()
            clock.mark()
            return clock.milliseconds()[0], 0.0

        return replay

    def peak(self, batch_size: int) -> int | None:
        """Bytes that the allocator took for a step of so many images; None where they were not there."""
        try:
            self.forget_gradients()
            self.set_batch(batch_size)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.place.device)
            self()
            self.place.synchronize()
            return torch.cuda.max_memory_reserved(self.place.device)
        except RuntimeError as error:
            # Libraries whose own requests are refused say so in words of theirs.
            if isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY.search(str(error)):
                return None
            raise

    def largest(self, limit: int | None) -> dict[str, Any]:
        """The largest batch that fits `limit` bytes (None: the device)."""
        limit = limit or int(0.95 * torch.cuda.mem_get_info(self.place.device)[0])
        limit_memory(limit)
        self.peak(2)  # libraries take memory for themselves
        trials = largest_batch(self.peak, limit)
        largest = max((n for n, peak in trials.items() if peak is not None and peak <= limit), default=0)
        return {"largest_batch": largest, "limit_bytes": limit, "trials": trials}


def start(job: Job, place: Place) -> dict[str, Callable[[], Any]]:
    """Imports what takes time; on the GPU there is no more than a context before the first request."""
    if job["contender"] == KERNELS:
        from efficient_densenet.ops.triton.speeds import speeds

        return {"speeds": lambda: speeds(job["quick"])}
    contender = CONTENDERS[job["contender"]]
    compiler = ["torch._inductor.compile_fx"] * (contender.compile is not None)
    for library in ("torchvision", "timm", *compiler):
        with suppress(ImportError):  # who needs it will say so
            importlib.import_module(library)
    step = functools.cache(
        lambda: GpuStep(job["contender"], Network(**job["network"]), job["batch_size"], place, job["dtype"])
    )
    return {
        "prepare": lambda: step().prepare(),
        "times": lambda: step().times(job["warmup"], job["iterations"]),
        "largest": lambda: step().largest(job["memory_limit"]),
    }


if __name__ == "__main__":
    serve(start)
