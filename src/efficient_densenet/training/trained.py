"""A network out of a checkpoint, ready to be used: what `predict` and `export` begin with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from efficient_densenet.checkpoints import network_of, read_densenet
from efficient_densenet.errors import UserError
from efficient_densenet.files import read_lines
from efficient_densenet.models import DenseNet
from efficient_densenet.training.data.photos import IMAGENET_MEAN, IMAGENET_STD
from efficient_densenet.training.data.preprocessing import Preprocessing
from efficient_densenet.training.networks import NAME_IN_CHECKPOINT, known_library_network, start_from
from efficient_densenet.weights.published import get_published
from efficient_densenet.weights.shards import read_content


class TrainedNetwork(NamedTuple):
    """A network in evaluation mode, its classes in the order of its outputs, what its images go through first, and
    whether an image can have several of the classes.
    """

    network: nn.Module
    class_names: list[str]
    preprocessing: Preprocessing
    multi_label: bool = False

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each class, ``(N, classes)``: they sum to one, or are independent of each other where there are labels."""
        return logits.sigmoid() if self.multi_label else logits.softmax(1)


def load_trained(path: str, class_names: Path | None = None, **reading: Any) -> TrainedNetwork:
    """Read a checkpoint of `fit`, or the weights of any DenseNet that `convert` can read.

    Weights alone say nothing of classes and images: the classes are then numbered, and the images prepared as
    ImageNet's, or as 32×32 pixels for a network with the stem for small images.

    Args:
        path: the file.
        class_names: a file with the names of the classes, one a line; None: those in the checkpoint.
        reading: what can be said about it, see `read_densenet`.

    Raises:
        UserError: there is no such file, or it does not hold a complete DenseNet with a classifier.
    """
    published = get_published(path)
    content = read_content(published.path).value
    content = content if isinstance(content, dict) else {}
    network, classes = _network(path, published.path, content, reading)
    description = _description(content, classes)
    if published.preprocessing and getattr(network, "in_channels", 3) == 3:
        description["preprocessing"] = Preprocessing(in_channels=3, **published.preprocessing)
    if published.class_names and len(published.class_names) == classes:
        description["class_names"] = published.class_names
    if class_names is not None:
        description["class_names"] = _names_in(class_names, classes)
    description["class_names"] = _distinct(description.get("class_names") or [str(i) for i in range(classes)])
    if "preprocessing" not in description:
        description["preprocessing"] = _usual_preprocessing(network)
    return TrainedNetwork(network, **description)


def _network(name: str, path: Path, content: dict[str, Any], reading: dict[str, Any]) -> tuple[nn.Module, int]:
    """The network in a file, and the number of its classes."""
    library_name, names = content.get(NAME_IN_CHECKPOINT), content.get("class_names")
    if isinstance(library_name, str) and isinstance(names, list):
        if any(reading.values()):
            raise UserError(f"{name} is of a network of another library: leave --prefix, --ema and the like out")
        preprocessing = content.get("preprocessing") or {}
        network = known_library_network(library_name, preprocessing.get("in_channels", 3), len(names))
        start_from(network, str(path), "", new_head=False)
        return network.eval(), len(names)
    network = network_of(read_densenet(path, **reading)).eval()
    if network.num_classes == 0:
        raise UserError(
            f"{name} holds a network without a linear classifier for its features: train one, with fit --model.weights"
        )
    return network, network.num_classes


def _description(content: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """What `Classifier` adds to its checkpoints."""
    found: dict[str, Any] = {}
    names, preprocessing = content.get("class_names"), content.get("preprocessing")
    if isinstance(names, list) and len(names) == num_classes and all(isinstance(name, str) for name in names):
        found["class_names"] = names
    if isinstance(preprocessing, dict):
        found["preprocessing"] = Preprocessing.from_dict(preprocessing)
    found["multi_label"] = content.get("multi_label") is True
    return found


def _distinct(names: list[str]) -> list[str]:
    """The names, with a number behind those that are there twice, as ImageNet's cranes: ``crane (134)``."""
    count = Counter(names)
    return [f"{name} ({i})" if count[name] > 1 else name for i, name in enumerate(names)]


def _names_in(file: Path, num_classes: int) -> list[str]:
    names = read_lines(file)
    if len(names) != num_classes:
        raise UserError(f"{file} has {len(names)} names, one a line, and the network {num_classes} classes")
    return names


def _usual_preprocessing(network: nn.Module) -> Preprocessing:
    if not isinstance(network, DenseNet):
        return Preprocessing(3, size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, resize=256)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if network.in_channels == 3 else ((0.449,), (0.226,))
    if hasattr(network.features, "pool0"):
        return Preprocessing(network.in_channels, size=224, mean=mean, std=std, resize=256)
    return Preprocessing(network.in_channels, size=32, mean=mean, std=std)
