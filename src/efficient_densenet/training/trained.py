"""A network out of a checkpoint, ready to be used: what `predict` and `export` begin with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from efficient_densenet.checkpoints import load_network
from efficient_densenet.errors import UserError
from efficient_densenet.models import DenseNet
from efficient_densenet.training.data.folder import IMAGENET_MEAN, IMAGENET_STD
from efficient_densenet.training.data.preprocessing import Preprocessing


class TrainedNetwork(NamedTuple):
    """A network in evaluation mode, its classes in the order of its outputs, and what its images go through first."""

    network: DenseNet
    class_names: list[str]
    preprocessing: Preprocessing


def load_trained(path: Path) -> TrainedNetwork:
    """Read a checkpoint of `fit`, or the weights of any DenseNet that `convert` can read.

    Weights alone say nothing of classes and images: the classes are then numbered, and the images prepared as
    ImageNet's, or as 32×32 pixels for a network with the stem for small images.

    Raises:
        UserError: there is no such file, or it does not hold a complete DenseNet with a classifier.
    """
    network = load_network(path).eval()
    if network.num_classes == 0:
        raise UserError(f"{path} holds a network without a classifier: train one first")
    described = _description(path)
    if described:
        return TrainedNetwork(network, described["class_names"], Preprocessing.from_dict(described["preprocessing"]))
    return TrainedNetwork(network, [str(i) for i in range(network.num_classes)], _usual_preprocessing(network))


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="a checkpoint of fit, or weights of a DenseNet"
    )


def _description(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return {}
    content = torch.load(path, map_location="cpu", weights_only=True)  # load_network has found it readable
    return content if {"class_names", "preprocessing"} <= content.keys() else {}


def _usual_preprocessing(network: DenseNet) -> Preprocessing:
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if network.in_channels == 3 else ((0.449,), (0.226,))
    if hasattr(network.features, "pool0"):
        return Preprocessing(network.in_channels, size=224, mean=mean, std=std, resize=256)
    return Preprocessing(network.in_channels, size=32, mean=mean, std=std)
