"""One contender of ``gpu.py``, in a process of its own: a network in one form, timed and weighed on a GPU."""

from __future__ import annotations

import functools
import importlib
import re
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_densenet import densenet_cifar
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.processes import Job, serve
from efficient_densenet.models import VARIANTS

_CONFIGURATIONS = {
    "densenet121": (32, (6, 12, 24, 16), 64),
    "densenet201": (32, (6, 12, 48, 32), 64),
    "densenet264": (48, (6, 12, 64, 48), 96),
}


def _ours(network: str, **arguments: Any) -> nn.Module:
    if network == "cifar":
        return densenet_cifar(40, 12, num_classes=10, **arguments)
    if network == "tiny":
        return densenet_cifar(10, 12, num_classes=10, **arguments)
    return VARIANTS[network](**arguments)


def _torchvision(network: str, memory_efficient: bool = False) -> nn.Module:
    import torchvision

    if network not in _CONFIGURATIONS:  # it has no network without a bottleneck: ours that concatenates
        assert not memory_efficient
        return _ours(network)
    growth_rate, blocks, features = _CONFIGURATIONS[network]
    return torchvision.models.DenseNet(growth_rate, blocks, features, memory_efficient=memory_efficient)


def _timm(network: str) -> nn.Module:
    import timm

    growth_rate, blocks, _ = _CONFIGURATIONS[network]
    return timm.models.densenet.DenseNet(growth_rate=growth_rate, block_config=blocks)


def _resnet(network: str) -> nn.Module:
    import torchvision

    return torchvision.models.resnet50()


@dataclass(frozen=True)
class Form:
    """How a network is built and run.

    Attributes:
        build: makes it.
        channels_last: its memory format.
        compile: the mode of `torch.compile`.
        budget: what share of the activations compiled code may keep for the backward pass.
        graph: whether a CUDA graph of the whole step is replayed.
        search: whether cuDNN tries its algorithms, and takes the fastest.
    """

    build: Callable[[str], nn.Module]
    channels_last: bool = True
    compile: str | None = None
    budget: float | None = None
    graph: bool = False
    search: bool = False


FORMS = {
    "ordinary": Form(_torchvision, channels_last=False),
    "ordinary, channels_last": Form(_torchvision),
    "ordinary, channels_last, cudnn.benchmark": Form(_torchvision, search=True),
    "memory_efficient": Form(partial(_torchvision, memory_efficient=True), channels_last=False),
    "memory_efficient, channels_last": Form(partial(_torchvision, memory_efficient=True)),
    "timm, channels_last": Form(_timm),
    "ResNet-50, channels_last": Form(_resnet),
    **{f"efficient, {keep}": Form(partial(_ours, efficient=True, keep=keep)) for keep in
       ("bottleneck", "features", "inputs")},
    "efficient, bottleneck, graph": Form(partial(_ours, efficient=True), graph=True),
    "efficient, bottleneck, reduce-overhead": Form(partial(_ours, efficient=True), compile="reduce-overhead"),
    "ordinary, channels_last, graph": Form(_torchvision, graph=True),
    "compiled": Form(_torchvision, compile="default"),
    **{f"compiled, budget {budget}": Form(_torchvision, compile="default", budget=budget) for budget in (0.5, 0.1)},
    "compiled, max-autotune": Form(_torchvision, compile="max-autotune"),
}  # fmt: skip


_NO_ROOM = re.compile("out of memory|ALLOC_FAILED|unable to find an engine", re.IGNORECASE)


class Step:
    """Forward (to the loss) and backward on one batch. The batch can be changed."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device, self.form = job, device, FORMS[job["contender"]]
        self.memory_format = torch.channels_last if self.form.channels_last else torch.contiguous_format
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = self.form.search
        network = self.form.build(job["network"]).to(device).train()
        self.network: Callable[[Tensor], Tensor] = network.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.parameters = list(network.parameters())
        if self.form.budget is not None:
            torch._functorch.config.activation_memory_budget = self.form.budget  # type: ignore[attr-defined]
        if self.form.compile:
            self.network = torch.compile(network, mode=self.form.compile)

    def set_batch(self, batch: int) -> None:
        self.images = self.labels = None
        size = self.job["size"]
        self.images = torch.randn(batch, 3, size, size, device=self.device).to(memory_format=self.memory_format)
        self.labels = torch.zeros(batch, dtype=torch.long, device=self.device)

    def forward(self) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.job["autocast"]):
            return F.cross_entropy(self.network(self.images), self.labels)

    def __call__(self) -> None:
        self.forward().backward()

    def forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def prepare(self) -> dict[str, Any]:
        """One step, for which code is compiled and algorithms are chosen; its memory is given back."""
        self.set_batch(self.job["batch"])
        self()
        self.forget_gradients()
        self.images = self.labels = None
        torch.cuda.empty_cache()
        return {}

    def times(self) -> dict[str, Any]:
        """Medians of milliseconds, images per second, and the peak of what was allocated."""
        batch = self.job["batch"]
        self.set_batch(batch)
        for _ in range(self.job["warmup"]):
            self.forget_gradients()
            self()
        torch.cuda.reset_peak_memory_stats(self.device)
        if self.form.graph:
            return self._summary(*self._graph_times())
        forward: list[float] = []
        whole: list[float] = []
        while self._wants_more(whole):
            self.forget_gradients()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            torch.cuda.synchronize(self.device)
            marks[0].record()
            loss = self.forward()
            marks[1].record()
            loss.backward()
            marks[2].record()
            torch.cuda.synchronize(self.device)
            forward.append(marks[0].elapsed_time(marks[1]))
            whole.append(marks[0].elapsed_time(marks[2]))
        return self._summary(forward, whole)

    def _graph_times(self) -> tuple[list[float], list[float]]:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.forget_gradients()
        with torch.cuda.graph(graph):
            self()
        whole: list[float] = []
        while self._wants_more(whole):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            graph.replay()
            marks[1].record()
            torch.cuda.synchronize(self.device)
            whole.append(marks[0].elapsed_time(marks[1]))
        return [], whole

    def _wants_more(self, whole: list[float]) -> bool:
        """Large networks have steps so long, and so even, that fewer do."""
        return len(whole) < self.job["iterations"] and (len(whole) < 5 or sum(whole) < 3000)

    def _summary(self, forward: list[float], whole: list[float]) -> dict[str, Any]:
        total = statistics.median(whole)
        return {
            "batch": self.job["batch"],
            "forward_ms": statistics.median(forward) if forward else None,
            "backward_ms": statistics.median(b - a for a, b in zip(forward, whole, strict=True)) if forward else None,
            "step_ms": total,
            "all_steps_ms": whole,
            "images_per_second": 1e3 * self.job["batch"] / total,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device),
        }

    def peak(self, batch: int) -> int | None:
        """Bytes that the allocator took for a step of so many images; None where they were not there."""
        try:
            self.forget_gradients()
            self.set_batch(batch)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self()
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_reserved(self.device)
        except RuntimeError as error:
            # Libraries whose own requests are refused say so in words of theirs.
            if isinstance(error, torch.OutOfMemoryError) or _NO_ROOM.search(str(error)):
                return None
            raise

    def largest(self) -> dict[str, Any]:
        """The largest batch, to 2 %, that fits `limit` bytes (0: the device), found along the line of the peaks."""
        free, total = torch.cuda.mem_get_info(self.device)
        limit = self.job["limit"] or int(0.95 * free)
        if limit > free:
            raise ValueError(f"{free} bytes of the GPU are free, not {limit}")
        torch.cuda.set_per_process_memory_fraction(limit / total, self.device)
        self.peak(2)  # libraries take their room
        trials = {n: self.peak(n) for n in (8, 16)}
        if None in trials.values():
            return {"largest_batch": 0, "limit_bytes": limit, "trials": trials}
        low, high = 16, None
        while high is None or high - low > max(1, low // 50):
            known = sorted(n for n, peak in trials.items() if peak is not None)[-2:]
            slope = (trials[known[1]] - trials[known[0]]) / (known[1] - known[0])  # type: ignore[operator]
            meets = int(low + (limit - trials[low]) / slope) if slope > 0 else 2 * low  # type: ignore[operator]
            if high is None:
                batch = min(max(low + 1, meets), 4 * low)
            else:
                batch = meets if low < meets < high and meets not in trials else (low + high) // 2
            trials[batch] = self.peak(batch)
            if trials[batch] is None:
                high = batch
            else:
                low = batch
        return {"largest_batch": low, "limit_bytes": limit, "trials": trials}


def start(job: Job, place: Place) -> dict[str, Any]:
    """Imports what takes time; on the GPU there is no more than a context before the first request."""
    if job["contender"] == "kernels":
        from gpu_kernels import speeds

        return {"speeds": lambda: speeds(job["quick"])}
    for library in (
        "torchvision",
        "timm",
        *["torch._inductor.compile_fx"] * (FORMS[job["contender"]].compile is not None),
    ):
        with suppress(ImportError):  # who needs it will say so
            importlib.import_module(library)
    step = functools.cache(lambda: Step(job, place.device))
    return {
        "prepare": lambda: step().prepare(),
        "times": lambda: step().times(),
        "largest": lambda: step().largest(),
    }


if __name__ == "__main__":
    serve(start)
