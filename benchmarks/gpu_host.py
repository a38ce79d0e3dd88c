"""What the host does in a training step on a GPU, counted and timed without one: launches that do nothing.

    python benchmarks/gpu_host.py             # DenseNet-121 under bfloat16 autocast, and L = 40, k = 12

A CPU takes the GPU's place, everything is recorded, and every recording is a graph. Counted are operations that PyTorch
dispatches, and launches; the time is the least of many steps, on small images. What a driver takes for a launch, and
what a GPU's allocator takes for a tensor, is not in it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_densenet import densenet121, densenet_cifar
from efficient_densenet.execution import KEEP, buffers, operators, shared, transforms
from efficient_densenet.execution.stem_operators import StemArguments
from efficient_densenet.ops import triton as kernels
from efficient_densenet.ops.triton import launch, recording
from efficient_densenet.ops.triton.recording import Recording

_STEPS = 60


class Operations(TorchDispatchMode):
    """Counts what PyTorch dispatches."""

    __module__ = "torch.utils.flop_counter"  # by which the library takes it for a counter, which changes nothing
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def nothing_launched(keep: str) -> Iterator[list[Recording]]:
    """Tensors of a CPU are taken for those of a GPU; the list gets each recording that would be started."""
    started: list[Recording] = []

    def start(self: Recording, given: Sequence[Tensor], addresses: Sequence[int]) -> None:
        if self._scratch:
            torch.empty(self._scratch, dtype=torch.uint8)
        recording._graphs._kept.get((self, (*addresses,)))
        started.append(self)

    def compiled(kernel: Any, programs: int, tile: Any, arguments: tuple) -> Any:
        return launch.functools.partial(launch._nothing, *arguments)

    with (
        mock.patch.object(kernels, "supports", lambda x: x.dtype in kernels._TYPES),
        mock.patch.object(launch, "_compiled_for", compiled),
        mock.patch.object(Recording, "start", start),
        # As on a GPU, a stem keeps what its convolution makes, and nothing is copied when somebody writes.
        mock.patch.object(shared, "StemArguments", lambda *a: StemArguments(*a[:-1], keep == "bottleneck")),
        mock.patch.object(buffers, "_can_share", lambda x: False),
        # The mode that counts changes nothing.
        mock.patch.object(operators, "is_watched", lambda: False),
        mock.patch.object(transforms, "is_watched", lambda: False),
    ):
        yield started


def step_of(network: nn.Module, size: int, autocast: bool) -> Callable[[], None]:
    """A training step of a network in training mode."""
    network.train().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    parameters = list(network.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = network(images).float().sum()
        loss.backward()

    return step


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description="count what the host does in a training step on a GPU").parse_args(argv)
    torch.set_num_threads(1)
    for keep in KEEP:
        for name, build, size, autocast in (
            ("DenseNet-121", lambda keep=keep: densenet121(efficient=True, keep=keep, num_classes=10), 64, True),
            ("L40", lambda keep=keep: densenet_cifar(40, 12, efficient=True, keep=keep), 32, False),
        ):
            with nothing_launched(keep) as started:
                step = step_of(build(), size, autocast)
                for _ in range(3):  # what is found out once
                    step()
                started.clear()
                with Operations() as operations:
                    step()
                launches, times = len(started), []
                for _ in range(_STEPS):
                    begin = time.perf_counter()
                    step()
                    times.append(time.perf_counter() - begin)
            print(f"{name}, {keep}: {operations.count} operations, {launches} launches, {1e3 * min(times):.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
