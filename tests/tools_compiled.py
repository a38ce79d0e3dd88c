"""Programs that compile a network, or parts of it: the rows of docs/tools.md under "Compiled", by their names there.

Each is called with a network and with what compiles: `torch.compile`, or for the ordinary network nothing at all. It
returns what it computed, and how often something was compiled after each network's, part's or step's first call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comparison import training_step, weighted_sum
from tools import FEATURES, outcome
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

COMPILED: dict[str, Callable[[nn.Module, Compiler], Any]] = {}


class Compiler:
    """`torch.compile` into one graph, which must fit all calls."""

    def __init__(self, really: bool) -> None:
        self.really, self.again = really, 0

    def run(self, function: Callable, network: Callable, calls: list[tuple], **options: Any) -> list:
        """What `function` returns for `network` in each of these calls."""
        if not self.really:
            return [function(network, *call) for call in calls]
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(network, backend=counter, **{"fullgraph": True, **options})
        found = [function(compiled, *calls[0])]
        first = counter.frame_count
        found += [function(compiled, *call) for call in calls[1:]]
        self.again += counter.frame_count - first
        assert first > 0
        return found


def row(name: str) -> Callable[[Callable], Callable]:
    def remember(program: Callable) -> Callable:
        assert name not in COMPILED
        COMPILED[name] = program
        return program

    return remember


def images(n: int, height: int, width: int, channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, channels, height, width, dtype=dtype, generator=torch.Generator().manual_seed(height))


def step(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): t for name, t in training_step(network, x).items()}


@row("a whole network, for batches and images of any size (`mark_dynamic`)")
def whole(network, compiler):
    def marked(network, x):
        for dim in (0, 2, 3):
            torch._dynamo.mark_dynamic(x, dim)
        return network(x)

    calls = [(images(*size),) for size in ((5, 34, 33), (2, 40, 36), (4, 36, 50))]
    with torch.no_grad():
        return compiler.run(marked, network, calls)


@row("`model.features`, a block (`dynamic=True`)")
def parts(network, compiler):
    calls = [(images(*size),) for size in ((5, 34, 33), (2, 40, 36))]
    with torch.no_grad():
        found = compiler.run(lambda features, x: features(x), network.features, calls, dynamic=True)
    calls = [(images(*size, channels=6),) for size in ((3, 5, 4), (2, 7, 8))]
    return found + compiler.run(step, network.features.denseblock1, calls, dynamic=True)


@row("a step of training, with the optimiser")
def with_optimiser(network, compiler):
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01)

    def learn(x):
        optimiser.zero_grad()
        loss = weighted_sum(network(x))
        loss.backward()
        optimiser.step()
        return loss.detach()

    loss = compiler.run(lambda learn, x: learn(x), learn, [(images(2, 34, 33),)], fullgraph=False)
    return loss, {name: t.clone() for name, t in network.state_dict().items()}


@row("a network under autocast")
def under_autocast(network, compiler):
    def types(network, x):
        with torch.autocast("cpu", torch.bfloat16):
            return {name: (t.dtype, t.shape) for name, t in step(network, x).items()}

    return compiler.run(types, network.float(), [(images(2, 34, 33, dtype=torch.float32),)])


@row("an empty batch, one image, one pixel")
def small(network, compiler):
    def called(network, x):
        return outcome(step, network, x)

    sizes = (0, 3, 3), (1, 1, 2)
    block = network.features.denseblock1
    return [compiler.run(called, block, [(images(*size, channels=6),)]) for size in sizes]


@row("a module inside a block, by itself (`module.compile()`)")
def inside(network, compiler):
    block = network.features.denseblock1
    if compiler.really:
        block.denselayer1.conv1.compile(backend="eager")
    return step(block, FEATURES)
