"""An ordinary network and an efficient one with the same weights: what most tests of execution begin with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from efficient_densenet import DenseNet
from efficient_densenet.execution import Efficient

PLAIN = {"num_init_features": 6, "growth_rate": 5, "block_config": (3, 2), "num_classes": 7}
BOTTLENECK = PLAIN | {"bn_size": 2, "compression": 0.5}
IMAGENET = BOTTLENECK | {"input_size": 64}
NETWORKS = {"plain": PLAIN, "bottleneck": BOTTLENECK, "imagenet stem": IMAGENET}


def efficient_network(arguments: dict, keep: str = "bottleneck", efficient: Efficient = True) -> DenseNet:
    """A copy of one that is made once and never runs: to look for dense blocks takes longer than a training step."""
    return copy.deepcopy(_made(tuple(arguments.items()), keep, efficient))


@functools.cache
def _made(arguments: tuple[tuple[str, Hashable], ...], keep: str, efficient: Efficient) -> DenseNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DenseNet(**dict(arguments), efficient=efficient, keep=keep)  # type: ignore[arg-type]


def pair(
    arguments: dict,
    keep: str = "bottleneck",
    training: bool = True,
    change: Callable[[nn.Module], object] = lambda network: None,
    dtype: torch.dtype = torch.float64,
    efficient: Efficient = True,
) -> tuple[DenseNet, DenseNet]:
    """An ordinary and an efficient network with the same weights and mode, both passed through `change`."""
    torch.manual_seed(0)
    ordinary = DenseNet(**arguments)
    for norm in norms(ordinary):  # nothing trivial: no gain of one, no mean of zero
        for tensor in (norm.weight, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            nn.init.uniform_(tensor, -0.5, 0.5)
    twin = efficient_network(arguments, keep, efficient)
    twin.load_state_dict(ordinary.state_dict(), strict=True)
    for network in (ordinary, twin):
        torch.manual_seed(1)
        change(network.train(training).to(dtype))
    return ordinary, twin


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


def images(n: int = 3, height: int = 19, width: int = 22, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(n, 3, height, width, dtype=dtype)


# What may be different about a network's norms, or frozen: for `change`, and for the tests of every way to run.


def momentum_none(network: nn.Module) -> None:
    for norm in norms(network):
        norm.momentum = None


def without_running_statistics(network: nn.Module) -> None:
    for norm in norms(network):
        norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = (
            False,
            None,
            None,
            None,
        )


def without_affine(network: nn.Module) -> None:
    for norm in norms(network):
        norm.weight = norm.bias = None


def frozen_norms(network: nn.Module) -> None:
    for norm in norms(network):
        norm.eval().requires_grad_(False)


def frozen_first_block(network: nn.Module) -> None:
    network.features.conv0.requires_grad_(False)
    network.features.denseblock1.requires_grad_(False)


def frozen_convolutions(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)
