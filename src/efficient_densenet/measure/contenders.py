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


@dataclass(frozen=True)
class Contender:
    """A way to run a network.

    Attributes:
        description: in a few words.
        build: makes the module that maps images to logits.
        memory_format: of its weights and images.
        plain: whether no backend but plain PyTorch may run.
    """

    description: str
    build: Callable[[Network], nn.Module]
    memory_format: torch.memory_format = torch.contiguous_format
    plain: bool = False


def _compiled(network: Network) -> nn.Module:
    return cast(nn.Module, torch.compile(network.build()))


def _shared(keep: str) -> Callable[[Network], nn.Module]:
    return partial(Network.build, efficient=True, keep=keep)


CONTENDERS = {
    "ordinary": Contender("concatenates", Network.build),
    "ordinary-channels-last": Contender("the same in channels_last memory", Network.build, torch.channels_last),
    "compiled": Contender("the ordinary network under torch.compile", _compiled),
    "compiled-channels-last": Contender("the same in channels_last memory", _compiled, torch.channels_last),
    "recompute": Contender("efficient='recompute'", partial(Network.build, efficient="recompute")),
    **{keep: Contender(f"efficient=True, keep={keep!r}", _shared(keep)) for keep in KEEP},
    **{f"{keep}-plain": Contender("the same in plain PyTorch alone", _shared(keep), plain=True) for keep in KEEP},
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
