"""One contender of a benchmark: a training step that is timed, and whose memory is measured."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_densenet.errors import UserError
from efficient_densenet.measure.clock import Clock
from efficient_densenet.measure.contenders import CONTENDERS
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.memory import peak_bytes, resident_peak_bytes
from efficient_densenet.measure.networks import Network
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
        self._begun = time.perf_counter()
        self.made, self.described, self.place, self.training = CONTENDERS[contender], network, place, training
        if self.made.evaluates_only and (training or dtype != "float32" or place.device_type != "cpu"):
            raise UserError(
                f"{contender} takes part with --evaluation on a CPU in float32 alone: leave it out of --contenders"
            )
        self.autocast = partial(torch.autocast, place.device_type, torch.bfloat16, enabled=dtype == "amp-bf16")
        self.type = torch.float32 if dtype == "amp-bf16" else getattr(torch, dtype)
        self.backends = plain_pytorch if self.made.plain else nullcontext
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = self.made.search
        module = self.made.build(network).to(place.device, memory_format=self.made.memory_format)  # type: ignore[call-overload]
        self.network = place.wrap(self.made.compiled(module.to(self.type).train(training)))
        self.set_batch(batch_size)
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)  # there before the first step, so that it is not counted

    def set_batch(self, batch_size: int) -> None:
        """Take another batch of so many images over all devices."""
        self.batch_size = batch_size
        images, self.labels = (self.place.share(x) for x in self.described.batch(batch_size))
        self.images = images.to(self.type).contiguous(memory_format=self.made.memory_format)

    def __call__(self) -> tuple[float, float]:
        """Run one step; return the milliseconds of forward and of backward."""
        with self.backends():
            return self._train() if self.training else (self._evaluate(), 0.0)

    def output(self) -> Tensor:
        with self.backends(), self.autocast():
            return self.network(self.images)

    def loss(self) -> Tensor:
        with self.autocast():
            return F.cross_entropy(self.network(self.images), self.labels)

    def _train(self) -> tuple[float, float]:
        self.network.zero_grad(set_to_none=False)
        clock = self._started()
        loss = self.loss()
        clock.mark()
        loss.backward()
        clock.mark()
        forward, backward = clock.milliseconds()
        return forward, backward

    @torch.inference_mode()
    def _evaluate(self) -> float:
        clock = self._started()
        with self.autocast():
            self.network(self.images)
        clock.mark()
        return clock.milliseconds()[0]

    def _started(self) -> Clock:
        self.place.meet()
        clock = Clock(self.place)
        clock.mark()
        return clock

    def turn(self, warmup: int, iterations: int) -> dict[str, list[float]]:
        """Milliseconds of `iterations` steps, after `warmup` steps that do not count."""
        times = [self() for _ in range(warmup + iterations)][warmup:]
        if self.place.device_type == "cuda":
            torch.cuda.empty_cache()  # the next contender may need the memory
        return {"forward_ms": [forward for forward, _ in times], "backward_ms": [backward for _, backward in times]}

    def process_bytes(self) -> int:
        """Run one step; return the most memory that this process has used so far.

        On a CPU that is its peak resident size, on a GPU the most that was allocated for tensors at one time.
        """
        self()
        if self.place.device_type == "cuda":
            return torch.cuda.max_memory_allocated(self.place.device)
        return resident_peak_bytes()

    def memory(self) -> dict[str, float]:
        """Bytes of the process, and of live tensors that a step adds; the images that the step had.

        ``ready_s`` are the seconds until the first step was done: to build, export and compile.
        """
        process = self.process_bytes()  # first: the recording of allocations takes memory too
        ready = time.perf_counter() - self._begun
        step = peak_bytes(self, self.place.device)
        return {"process": process, "step": step, "images": len(self.images), "ready_s": ready}
