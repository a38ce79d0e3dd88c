"""What a DenseNet is: layers, blocks, transitions, the network, and the variants that have names."""

from efficient_densenet.models.densenet import DenseBlock, DenseLayer, DenseNet, Transition
from efficient_densenet.models.variants import (
    VARIANTS,
    build,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_cifar,
)

__all__ = [
    "VARIANTS",
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "Transition",
    "build",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_cifar",
]
