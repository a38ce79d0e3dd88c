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
from efficient_densenet.measure import peers
from efficient_densenet.measure.networks import Network

Build = Callable[[Network], nn.Module]


@dataclass(frozen=True)
class Contender:
    """A way to run a network.

    Attributes:
        description: in a few words.
        build: makes the module that maps images to logits.
        memory_format: of its weights and images.
        plain: whether no backend but plain PyTorch may run.
        evaluates_only: whether it cannot be trained, and takes float32 alone.
        compile: the mode of `torch.compile`; None: not compiled.
        budget: the share of the activations' memory that compiled code may keep for backward.
        graph: whether a CUDA graph of the whole step is replayed; ``benchmarks/gpu.py`` can do that.
        search: whether cuDNN tries its algorithms and takes the fastest.
    """

    description: str
    build: Build
    memory_format: torch.memory_format = torch.contiguous_format
    plain: bool = False
    evaluates_only: bool = False
    compile: str | None = None
    budget: float = 1.0
    graph: bool = False
    search: bool = False

    def compiled(self, module: nn.Module) -> nn.Module:
        """The module, under `torch.compile` where that is wanted."""
        if self.compile is None:
            return module
        from torch._functorch import config

        config.activation_memory_budget = self.budget  # in a process of its own: nobody sets it back
        return cast(nn.Module, torch.compile(module, mode=self.compile))


_last = partial(Contender, memory_format=torch.channels_last)


def _formats(name: str, build: Build, description: str) -> dict[str, Contender]:
    return {
        name: Contender(description, build),
        f"{name}-channels-last": _last("the same in channels_last memory", build),
    }


def _in_every_form(name: str, build: Build, description: str, prefix: str) -> dict[str, Contender]:
    """A network that concatenates, in both memory formats, compiled and not."""
    return {
        **_formats(name, build, description),
        f"{name}-cudnn-benchmark": _last("the same, with cuDNN's fastest algorithms", build, search=True),
        f"{name}-graph": _last("a CUDA graph of it", build, graph=True),
        f"{prefix}compiled": Contender(f"{name} under torch.compile", build, compile="default"),
        f"{prefix}compiled-channels-last": _last("the same in channels_last memory", build, compile="default"),
        **{
            f"{prefix}compiled-budget-{budget}": _last(
                f"the same with an activation_memory_budget of {budget}", build, compile="default", budget=budget
            )
            for budget in (0.5, 0.1, 0)
        },
        f"{prefix}compiled-max-autotune": _last("compiled in that mode", build, compile="max-autotune"),
    }


def _shared(keep: str) -> Build:
    return partial(Network.build, efficient=True, keep=keep)


CONTENDERS: dict[str, Contender] = {
    **_in_every_form("ordinary", Network.build, "concatenates", prefix=""),
    "checkpointing": Contender(
        "checkpoints each layer up to its bottleneck output, as torchvision does", peers.checkpointing
    ),
    "recompute": Contender("efficient='recompute'", partial(Network.build, efficient="recompute")),
    **{keep: Contender(f"efficient=True, keep={keep!r}", _shared(keep)) for keep in KEEP},
    **{f"{keep}-channels-last": _last("the same in channels_last memory", _shared(keep)) for keep in KEEP},
    **{f"{keep}-plain": Contender("the same in plain PyTorch alone", _shared(keep), plain=True) for keep in KEEP},
    "bottleneck-graph": _last("a CUDA graph of it", _shared("bottleneck"), graph=True),
    "bottleneck-reduce-overhead": _last(
        "under torch.compile in that mode", _shared("bottleneck"), compile="reduce-overhead"
    ),
    **_in_every_form("torchvision", peers.torchvision, "torchvision's", prefix="torchvision-"),
    **_formats("torchvision-flag", partial(peers.torchvision, memory_efficient=True), "with memory_efficient=True"),
    **_formats("timm", peers.timm, "timm's"),
    **_formats("timm-flag", partial(peers.timm, memory_efficient=True), "with memory_efficient=True"),
    **_formats("monai", peers.monai, "MONAI's"),
    "resnet50-channels-last": _last("torchvision's ResNet-50", peers.resnet50),
    "onnxruntime": Contender("ONNX Runtime, in evaluation", peers.ONNXRuntime, evaluates_only=True),
    "openvino": Contender("OpenVINO, in evaluation", peers.OpenVINO, evaluates_only=True),
}
ORDINARY = ("ordinary", "ordinary-channels-last")
"""The two usual ways to run a DenseNet; the faster depends on the network and the machine."""
COMPILED = ("compiled", "compiled-channels-last")
USUAL = (*ORDINARY, *KEEP)
"""Who takes part in the command where nobody is named."""
OURS = ("recompute", *KEEP)
PEERS = (
    *(*ORDINARY, *OURS, "torchvision", "torchvision-channels-last", "torchvision-flag"),
    *("timm", "timm-channels-last", "timm-flag", "monai"),
)
"""Ours in every mode, and other libraries' networks as they are and with their flags."""
PEERS_IN_EVALUATION = (*ORDINARY, "bottleneck", "torchvision", "timm", "monai", "onnxruntime", "openvino")
FORMS = (*ORDINARY, "checkpointing", "compiled-channels-last", "compiled-budget-0.5", *OURS)
"""Every way to trade time for memory."""


def contender_list(text: str) -> list[str]:
    """``"ordinary,recompute"`` → a list of names of contenders. A type for `argparse`."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in CONTENDERS:
            raise argparse.ArgumentTypeError(f"there is no contender {name!r}; there are: {', '.join(CONTENDERS)}")
    return names
