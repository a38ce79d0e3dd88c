"""Programs that compile a network, or parts of it: the rows of docs/tools.md under "Compiled", by their names there.

Each is called with a network and with what compiles: `torch.compile`, or for the ordinary network nothing at all. It
returns what it computed, and how often something was compiled after each network's, part's or step's first call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from comparison import training_step
from tools import FEATURES
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounterWithBackend

from efficient_densenet import DenseNet, make_efficient
from efficient_densenet.adopt.adopted import Adopted

SIZES = [(5, 34, 33), (2, 40, 36), (4, 36, 50)]
COMPILED: dict[str, Callable[[nn.Module, Compiler], Any]] = {}


class Compiler:
    """`torch.compile` into one graph, which must fit all calls."""

    def __init__(self, really: bool) -> None:
        self.really, self.again = really, 0

    def learn(self, network: nn.Module, sizes: list[tuple], backend: str = "aot_eager") -> list[Tensor]:
        """A step of training for each size: the losses, and what was learned.

        The loss asks for no size, which would be a number in its graph.
        """
        optimiser = torch.optim.SGD(network.parameters(), lr=0.01)

        def learn(x: Tensor) -> Tensor:
            optimiser.zero_grad()
            loss = network(x).square().sum(0).mean()
            loss.backward()
            optimiser.step()
            return loss.detach()

        calls = [(marked(images(*size)),) for size in sizes]
        losses = self.run(lambda learn, x: learn(x), learn, calls, fullgraph=False, backend=backend)
        return [*losses, *[t.clone() for t in network.state_dict().values()]]

    def run(
        self, function: Callable, network: Callable, calls: list[tuple], backend: str = "aot_eager", **options: Any
    ) -> list:
        """What `function` returns for `network` in each of these calls."""
        if not self.really:
            return [function(network, *call) for call in calls]
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
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


def marked(x: Tensor) -> Tensor:
    """Where a size may be another one."""
    for dim in (0, 2, 3):
        torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


@row("a whole network, for batches and images of any size (`mark_dynamic`)")
def whole(network, compiler):
    calls = [(marked(images(*size)),) for size in SIZES]
    with torch.no_grad():
        return compiler.run(lambda network, x: network(x), network, calls)


@row("`model.features`, a block (`dynamic=True`)")
def parts(network, compiler):
    calls = [(images(*size),) for size in ((5, 34, 33), (2, 40, 36))]
    with torch.no_grad():
        found = compiler.run(lambda features, x: features(x), network.features, calls, dynamic=True)
    calls = [(images(*size, channels=6),) for size in ((3, 5, 4), (2, 7, 8))]
    return found + compiler.run(step, network.features.denseblock1, calls, dynamic=True)


@row("a step of training, with the optimiser")
def with_optimiser(network, compiler):
    return compiler.learn(network, SIZES)


@row('the same with `backend="inductor"`')
def by_inductor(network, compiler):
    """Small, for it calls a compiler of C++. Larger images come first: for growing ones PyTorch makes another graph."""
    torch.manual_seed(0)
    small = DenseNet(num_init_features=6, growth_rate=4, block_config=(1,), num_classes=5).double()
    if any(isinstance(module, Adopted) for module in network.modules()):
        make_efficient(small, "features")
    with torch._inductor.config.patch(layout_optimization=False):  # see docs/tools.md
        return compiler.learn(small, [(5, 40, 36), (2, 34, 33)], "inductor")


@row("a network under autocast")
def under_autocast(network, compiler):
    def types(network, x):
        with torch.autocast("cpu", torch.bfloat16):
            return {name: (t.dtype, t.shape) for name, t in step(network, x).items()}

    return compiler.run(types, network.float(), [(images(2, 34, 33, dtype=torch.float32),)])


@row("an empty batch, one image, one pixel")
def small(network, compiler):
    block = network.features.denseblock1
    found = [compiler.run(step, block, [(images(*size, channels=6),)]) for size in ((0, 3, 3), (1, 1, 2))]
    with pytest.raises((ValueError, TorchDynamoException), match="Expected more than 1 value per channel"):
        compiler.run(step, block, [(images(1, 1, 1, channels=6),)])
    return found


@row("a module inside a block, by itself (`module.compile()`)")
def inside(network, compiler):
    block = network.features.denseblock1
    if compiler.really:
        block.denselayer1.conv1.compile(backend="eager")
    return step(block, FEATURES)
