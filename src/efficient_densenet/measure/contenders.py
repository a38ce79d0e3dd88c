"""Who can take part in a benchmark: a name, and how to build it. A new contender is one more line here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn

from efficient_densenet.execution import KEEP
from efficient_densenet.measure.networks import Network
from efficient_densenet.measure.peers import ONNXRuntime, OpenVINO, checkpointing


@dataclass(frozen=True)
class Contender:
    """A way to run a network.

    Attributes:
        description: in a few words.
        build: makes the module that maps images to logits.
        memory_format: of its weights and images.
        plain: whether no backend but plain PyTorch may run.
        evaluates_only: whether it cannot be trained, and takes float32 alone.
    """

    description: str
    build: Callable[[Network], nn.Module]
    memory_format: torch.memory_format = torch.contiguous_format
    plain: bool = False
    evaluates_only: bool = False


def _compiled(network: Network, budget: float = 1.0) -> nn.Module:
    """With `budget`, the compiler computes activations again in backward until so much of their memory is left."""
    torch._functorch.config.activation_memory_budget = budget  # in a process of its own: nobody sets it back
    return cast(nn.Module, torch.compile(network.build()))


def _shared(keep: str) -> Callable[[Network], nn.Module]:
    return partial(Network.build, efficient=True, keep=keep)


CONTENDERS = {
    "ordinary": Contender("concatenates", Network.build),
    "ordinary-channels-last": Contender("the same in channels_last memory", Network.build, torch.channels_last),
    "compiled": Contender("the ordinary network under torch.compile", _compiled),
    "compiled-channels-last": Contender("the same in channels_last memory", _compiled, torch.channels_last),
    **{
        f"compiled-budget-{budget}": Contender(
            f"the same with an activation_memory_budget of {budget}",
            partial(_compiled, budget=budget),
            torch.channels_last,
        )
        for budget in (0.5, 0.1, 0)
    },
    "checkpointing": Contender(
        "checkpoints each layer up to its bottleneck output, as torchvision does", checkpointing
    ),
    "recompute": Contender("efficient='recompute'", partial(Network.build, efficient="recompute")),
    **{keep: Contender(f"efficient=True, keep={keep!r}", _shared(keep)) for keep in KEEP},
    **{f"{keep}-plain": Contender("the same in plain PyTorch alone", _shared(keep), plain=True) for keep in KEEP},
    "onnxruntime": Contender("ONNX Runtime, in evaluation", ONNXRuntime, evaluates_only=True),
    "openvino": Contender("OpenVINO, in evaluation", OpenVINO, evaluates_only=True),
}
ORDINARY = ("ordinary", "ordinary-channels-last")
"""The two usual ways to run a DenseNet; the faster depends on the network and the machine."""
COMPILED = ("compiled", "compiled-channels-last")


def contender_list(text: str) -> list[str]:
    """``"ordinary,recompute"`` → a list of names of contenders. A type for `argparse`."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in CONTENDERS:
            raise argparse.ArgumentTypeError(f"there is no contender {name!r}; there are: {', '.join(CONTENDERS)}")
    return names
