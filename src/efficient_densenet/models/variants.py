"""The DenseNets that have names: the ImageNet family, and those of the paper's CIFAR table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

from efficient_densenet.errors import UserError
from efficient_densenet.execution import Auto, Efficient, Keep
from efficient_densenet.models.densenet import DenseNet, check_count
from efficient_densenet.weights.loading import load_weights

Weights = str | os.PathLike[str] | None


class CifarArguments(TypedDict, total=False):
    """Those of `DenseNet`, which explains them; each may be given in place of what a variant has."""

    in_channels: int
    num_init_features: int
    block_config: Sequence[int]
    compression: float
    input_size: int
    bn_size: int | None
    drop_rate: float
    num_classes: int
    efficient: Efficient
    keep: Keep | Auto
    memory: int | str | None
    batch: Sequence[int] | None


class Arguments(CifarArguments, total=False):
    """Where the growth rate is not a parameter by itself."""

    growth_rate: int | None


def _imagenet(
    name: str,
    num_init_features: int,
    growth_rate: int,
    block_config: Sequence[int],
    weights: Weights,
    arguments: Arguments,
) -> DenseNet:
    usual: Arguments = {
        "num_init_features": num_init_features,
        "growth_rate": growth_rate,
        "block_config": block_config,
        "compression": 0.5,
        "input_size": 224,
        "bn_size": 4,
        "num_classes": 1000,
    }
    chosen: Arguments = {**usual, **arguments}
    return _with_weights(DenseNet(**chosen), weights, name)


def _with_weights(network: DenseNet, weights: Weights, name: str = "") -> DenseNet:
    if weights is not None:
        load_weights(network, weights, variant=name)
    return network


def densenet121(weights: Weights = None, **arguments: Unpack[Arguments]) -> DenseNet:
    """DenseNet-121 for ImageNet: growth rate 32, blocks (6, 12, 24, 16), 7,978,856 parameters at 1000 classes.

    Args:
        weights: a file in the format of any library, or a name such as ``DEFAULT``, ``timm:densenet121.ra_in1k``,
            ``hf:owner/name`` or a URL; see docs/checkpoints.md. Another `num_classes` gets a new classifier.
        arguments: any argument of `DenseNet` in place of its own, for example ``num_classes=10, efficient=True``.
    """
    return _imagenet("densenet121", 64, 32, (6, 12, 24, 16), weights, arguments)


def densenet161(weights: Weights = None, **arguments: Unpack[Arguments]) -> DenseNet:
    """DenseNet-161 for ImageNet: growth rate 48, blocks (6, 12, 36, 24), 28,681,000 parameters at 1000 classes."""
    return _imagenet("densenet161", 96, 48, (6, 12, 36, 24), weights, arguments)


def densenet169(weights: Weights = None, **arguments: Unpack[Arguments]) -> DenseNet:
    """DenseNet-169 for ImageNet: growth rate 32, blocks (6, 12, 32, 32), 14,149,480 parameters at 1000 classes."""
    return _imagenet("densenet169", 64, 32, (6, 12, 32, 32), weights, arguments)


def densenet201(weights: Weights = None, **arguments: Unpack[Arguments]) -> DenseNet:
    """DenseNet-201 for ImageNet: growth rate 32, blocks (6, 12, 48, 32), 20,013,928 parameters at 1000 classes."""
    return _imagenet("densenet201", 64, 32, (6, 12, 48, 32), weights, arguments)


def densenet264(weights: Weights = None, **arguments: Unpack[Arguments]) -> DenseNet:
    """DenseNet-264 for ImageNet: growth rate 48, blocks (6, 12, 64, 48), about 72.7 million parameters.

    This is the large one of the authors' memory report; MONAI's network of the same name has growth rate 32.
    """
    return _imagenet("densenet264", 96, 48, (6, 12, 64, 48), weights, arguments)


def densenet_cifar(
    depth: int = 40,
    growth_rate: int = 12,
    bottleneck: bool = False,
    weights: Weights = None,
    **arguments: Unpack[CifarArguments],
) -> DenseNet:
    """A DenseNet for 32×32 images, named by its depth L and growth rate k as in the paper's CIFAR table.

    Three blocks of ``n`` layers with ``depth = 3·n + 4``, or with a bottleneck (DenseNet-BC: two convolutions a layer,
    compression 0.5) ``depth = 6·n + 4``. The stem makes ``2·growth_rate`` channels, as in the paper's DenseNet-BC.

    Args:
        depth: convolutions and the classifier, counted along the network.
        growth_rate: channels that each dense layer adds.
        bottleneck: DenseNet-BC rather than plain DenseNet.
        weights: a file, a URL or ``hf:owner/name``.
        arguments: any further argument of `DenseNet`.

    Raises:
        UserError: no such network has this depth, or an argument is out of range.
    """
    check_count("depth", depth)
    check_count("growth_rate", growth_rate)
    per_layer = 6 if bottleneck else 3
    num_layers, rest = divmod(depth - 4, per_layer)
    if rest or num_layers < 1:
        kind = "DenseNet-BC" if bottleneck else "plain DenseNet"
        nearest = max(1, round((depth - 4) / per_layer)) * per_layer + 4
        raise UserError(f"a {kind} with three blocks has a depth of {per_layer}·n + 4: use {nearest}, not {depth}")
    usual: CifarArguments = {"num_init_features": 2 * growth_rate, "block_config": (num_layers,) * 3, "num_classes": 10}
    if bottleneck:
        usual |= {"bn_size": 4, "compression": 0.5}
    chosen: CifarArguments = {**usual, **arguments}
    return _with_weights(DenseNet(growth_rate=growth_rate, **chosen), weights)


VARIANTS: dict[str, Callable[..., DenseNet]] = {
    f.__name__: f for f in (densenet121, densenet161, densenet169, densenet201, densenet264, densenet_cifar)
}


def build(name: str, **arguments: Any) -> DenseNet:
    """The variant called `name`, built with `arguments`.

    Raises:
        UserError: there is no such variant.
    """
    if name not in VARIANTS:
        raise UserError(f"there is no network called {name!r}; there are: {', '.join(VARIANTS)}")
    return VARIANTS[name](**arguments)
