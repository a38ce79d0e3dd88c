"""Who can take part in a benchmark: a name, and how to build it. A new contender is one more line here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from efficient_densenet.measure.networks import Network


@dataclass(frozen=True)
class Contender:
    """A way to run a network.

    Attributes:
        build: makes the module that maps images to logits.
        memory_format: of its weights and images.
    """

    build: Callable[[Network], nn.Module]
    memory_format: torch.memory_format = torch.contiguous_format


CONTENDERS = {
    "ordinary": Contender(lambda network: network.build(efficient=False)),
    "ordinary-channels-last": Contender(lambda network: network.build(efficient=False), torch.channels_last),
    "recompute": Contender(lambda network: network.build(efficient="recompute")),
}


def contender_list(text: str) -> list[str]:
    """``"ordinary,recompute"`` → a list of names of contenders. A type for `argparse`."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in CONTENDERS:
            raise argparse.ArgumentTypeError(f"there is no contender {name!r}; there are: {', '.join(CONTENDERS)}")
    return names
