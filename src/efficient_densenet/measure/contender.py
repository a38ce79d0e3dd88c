"""One contender of a benchmark, in a process of its own: it times training steps, or measures their memory."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from efficient_densenet.errors import UserError
from efficient_densenet.measure.contenders import CONTENDERS
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.memory import format_bytes, peak_bytes, resident_peak_bytes
from efficient_densenet.measure.networks import Network
from efficient_densenet.measure.processes import serve
from efficient_densenet.ops import plain_pytorch

DTYPES = ("float32", "bfloat16", "float16", "amp-bf16")


class TrainingStep:
    """Forward (to the loss) and backward on one batch, again and again, without a step of an optimiser.

    Args:
        contender: its name.
        network: which network.
        batch_size: images over all devices.
        place: where; its share of the batch is used.
        dtype: of the network and the images, one of `DTYPES`; ``"amp-bf16"`` is float32 under autocast to bfloat16.
        training: False: evaluation, forward alone, under `torch.inference_mode`.
    """

    def __init__(
        self,
        contender: str,
        network: Network,
        batch_size: int,
        place: Place,
        dtype: str = "float32",
        training: bool = True,
    ) -> None:
        self.place, self.training = place, training
        made = CONTENDERS[contender]
        if made.evaluates_only and (training or dtype != "float32"):
            raise UserError(
                f"{contender} takes part with --evaluation and in float32 alone: leave it out of --contenders"
            )
        self.autocast = partial(torch.autocast, place.device_type, torch.bfloat16, enabled=dtype == "amp-bf16")
        type_ = torch.float32 if dtype == "amp-bf16" else getattr(torch, dtype)
        self.backends = plain_pytorch if made.plain else nullcontext
        torch.manual_seed(0)
        module = made.build(network).to(place.device, memory_format=made.memory_format)  # type: ignore[call-overload]
        self.network = place.wrap(module.to(type_).train(training))
        images, self.labels = (place.share(x) for x in network.batch(batch_size))
        self.images = images.to(type_).contiguous(memory_format=made.memory_format)
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)  # there before the first step, so that it is not counted

    def __call__(self) -> tuple[float, float]:
        """Run one step; return the milliseconds of forward and of backward."""
        with self.backends():
            return self._train() if self.training else (self._evaluate(), 0.0)

    def _train(self) -> tuple[float, float]:
        self.network.zero_grad(set_to_none=False)
        self.place.meet()
        start = time.perf_counter()
        with self.autocast():
            loss = F.cross_entropy(self.network(self.images), self.labels)
        self.place.synchronize()
        middle = time.perf_counter()
        loss.backward()
        self.place.synchronize()
        return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3

    @torch.inference_mode()
    def _evaluate(self) -> float:
        self.place.meet()
        start = time.perf_counter()
        with self.autocast():
            self.network(self.images)
        self.place.synchronize()
        return (time.perf_counter() - start) * 1e3

    def turn(self, warmup: int, iterations: int) -> dict[str, list[float]]:
        """Milliseconds of `iterations` steps, after `warmup` steps that do not count."""
        times = [self() for _ in range(warmup + iterations)][warmup:]
        if self.place.device_type == "cuda":
            torch.cuda.empty_cache()  # the next contender may need the room
        return {"forward_ms": [forward for forward, _ in times], "backward_ms": [backward for _, backward in times]}

    def process_bytes(self) -> int:
        """Run one step; return the most memory that this process has used so far.

        On a CPU that is its peak resident size, on a GPU the most that was allocated for tensors at one time.
        """
        self()
        if self.place.device_type == "cuda":
            return torch.cuda.max_memory_allocated(self.place.device)
        return resident_peak_bytes()

    def memory(self) -> dict[str, int]:
        """Bytes of the process, and of live tensors that a step adds; the images that the step had."""
        process = self.process_bytes()  # first: the recording of allocations takes memory too
        return {"process": process, "step": peak_bytes(self, self.place.device), "images": len(self.images)}


def start(job: dict[str, Any], place: Place) -> dict[str, Any]:
    if job["memory_limit"] is not None and place.device_type == "cuda":
        _limit_memory(job["memory_limit"])
    how = {name: job[name] for name in ("dtype", "training") if name in job}
    step = TrainingStep(job["contender"], Network(**job["network"]), job["batch_size"], place, **how)
    return {
        "turn": lambda: step.turn(job["warmup"], job["iterations"]),
        "memory": step.memory,
        "process_bytes": step.process_bytes,
    }


def _limit_memory(limit: int) -> None:
    free, total = torch.cuda.mem_get_info()
    if limit > free:
        raise UserError(
            f"{format_bytes(free)} of the GPU are free, not {format_bytes(limit)}: use a smaller --max-batch"
        )
    torch.cuda.set_per_process_memory_fraction(limit / total)


if __name__ == "__main__":
    serve(start)
