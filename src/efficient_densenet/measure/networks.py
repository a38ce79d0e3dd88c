"""Which network at which size: the options that every measuring command shares, and what they describe.

A `Network` is plain data, so that it travels to worker processes and into result files as JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efficient_densenet.errors import UserError
from efficient_densenet.execution import Efficient
from efficient_densenet.models import VARIANTS, DenseNet

_CIFAR = "densenet_cifar"
_ABSENT = argparse.SUPPRESS  # an option that was not given leaves the network's own default in force


@dataclass(frozen=True)
class Network:
    """A DenseNet described by the arguments that build it.

    Attributes:
        variant: the name of a variant, or None for `DenseNet` itself.
        arguments: what it is built with, besides `efficient` and `keep`.
        input_size: height and width of its images.
        num_classes: outputs of its classifier.
    """

    variant: str | None
    arguments: dict[str, Any]
    input_size: int
    num_classes: int

    def build(self, efficient: Efficient = False, keep: str = "bottleneck") -> DenseNet:
        """A new network; `torch.manual_seed` decides its weights."""
        return _builder(self.variant)(**self.arguments, efficient=efficient, keep=keep)

    def batch(self, num_images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random images ``(N, 3, input_size, input_size)`` and labels ``(N,)`` on the CPU, the same for one seed."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(num_images, 3, self.input_size, self.input_size, generator=generator)
        return images, torch.randint(self.num_classes, (num_images,), generator=generator)

    def check_images(self, num_images: int, training: bool = True) -> None:
        """Raise `UserError` where `num_images` on one device do not fit the network. Computes nothing."""
        with torch.device("meta"):
            features = self.build().eval().forward_features(torch.empty(1, 3, self.input_size, self.input_size))
        if training and num_images * features[0, 0].numel() == 1:
            raise UserError(
                f"one image of {self.input_size}×{self.input_size} pixels on a device leaves batch norm a single value "
                "to normalise: use more images on each device, or larger ones"
            )

    def __str__(self) -> str:
        arguments = ", ".join(f"{k}={v}" for k, v in self.arguments.items())
        return f"{self.variant or 'DenseNet'}({arguments}) on images of {self.input_size}×{self.input_size}"


TINY = Network(
    None,
    {"num_init_features": 8, "growth_rate": 4, "block_config": [1, 2], "bn_size": 2, "compression": 0.5,
     "input_size": 36, "num_classes": 10},
    36,
    10,
)  # fmt: skip
"""A network that every library has, to try programs with."""


def cifar(depth: int, growth_rate: int = 12, bottleneck: bool = False) -> Network:
    """The network of the paper's CIFAR table with that depth, for ten classes."""
    kind = {"bottleneck": True} if bottleneck else {}
    return Network(_CIFAR, {"depth": depth, "growth_rate": growth_rate, **kind, "num_classes": 10}, 32, 10)


def imagenet(name: str) -> Network:
    """A network of the ImageNet family, such as ``"densenet121"``, at 224×224 pixels."""
    return Network(name, {}, 224, 1000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe a network."""
    group = parser.add_argument_group("network", "plain DenseNet with L=40, k=12 where nothing is given")

    def add(name: str, help: str, **kwargs: Any) -> None:
        group.add_argument(f"--{name}", default=_ABSENT, help=help, **kwargs)

    add("network", "a named network, in place of one built from the options below", choices=tuple(VARIANTS))
    add("depth", f"layers of {_CIFAR}", type=positive_int)
    add("bottleneck", f"bottleneck layers: --bn-size 4, and for {_CIFAR} compression 0.5", action="store_true")
    add("num-init-features", "channels that the stem makes (24)", type=positive_int)
    add("growth-rate", "channels that each layer adds (half of --num-init-features)", type=positive_int)
    add("block-config", "layers in each dense block (12,12,12)", type=int_list)
    add("compression", "share of channels that a transition passes on (1)", type=float)
    add("input-size", "height and width of the images (32); above 32 with the ImageNet stem", type=positive_int)
    add("bn-size", "bottleneck channels in multiples of the growth rate, or 'none' (none)", type=_int_or_none)
    add("drop-rate", "dropout after each layer (0)", type=float)
    add("num-classes", "outputs of the classifier (100)", type=positive_int)


def from_arguments(arguments: argparse.Namespace) -> Network:
    """The network that the options describe.

    Raises:
        UserError: the options contradict each other, or there can be no such network.
    """
    names = ("depth", "bottleneck", "num_init_features", "growth_rate", "block_config", "compression", "input_size",
             "bn_size", "drop_rate", "num_classes")  # fmt: skip
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    variant = getattr(arguments, "network", None)
    if variant == _CIFAR:
        unfit = {"block_config": "use --depth"}
    elif variant is not None:
        shape = ("depth", "num_init_features", "growth_rate", "block_config")
        unfit = dict.fromkeys(shape, "leave one of the two away")
    else:
        unfit = {"depth": f"use --network {_CIFAR}"}
    for name in given:
        if name in unfit:
            of = f"--network {variant}" if variant else "a network without a name"
            raise UserError(f"--{name.replace('_', '-')} does not go with {of}: {unfit[name]}")
    if variant != _CIFAR and given.pop("bottleneck", False):
        given.setdefault("bn_size", 4)
    with torch.device("meta"):
        num_classes = _builder(variant)(**given).num_classes
    return Network(variant, given, given.get("input_size", 32 if variant in (None, _CIFAR) else 224), num_classes)


def positive_int(text: str) -> int:
    """A whole number of at least 1. A type for `argparse`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def int_list(text: str) -> list[int]:
    """``"12,12,12"`` → ``[12, 12, 12]``. A type for `argparse`."""
    return [positive_int(part.strip()) for part in text.split(",")]


def _int_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else positive_int(text)


def _builder(variant: str | None) -> Callable[..., DenseNet]:
    return DenseNet if variant is None else VARIANTS[variant]
