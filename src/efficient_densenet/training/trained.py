"""A network out of a checkpoint, ready to be used: what `predict` and `export` begin with."""

from __future__ import annotations

from typing import Any, NamedTuple

from efficient_densenet.checkpoints import network_of, read_densenet
from efficient_densenet.errors import UserError
from efficient_densenet.models import DenseNet
from efficient_densenet.training.data.folder import IMAGENET_MEAN, IMAGENET_STD
from efficient_densenet.training.data.preprocessing import Preprocessing
from efficient_densenet.weights.published import get_published


class TrainedNetwork(NamedTuple):
    """A network in evaluation mode, its classes in the order of its outputs, and what its images go through first."""

    network: DenseNet
    class_names: list[str]
    preprocessing: Preprocessing


def load_trained(path: str, **reading: Any) -> TrainedNetwork:
    """Read a checkpoint of `fit`, or the weights of any DenseNet that `convert` can read.

    Weights alone say nothing of classes and images: the classes are then numbered, and the images prepared as
    ImageNet's, or as 32×32 pixels for a network with the stem for small images.

    Args:
        path: the file.
        reading: what can be said about it, see `read_densenet`.

    Raises:
        UserError: there is no such file, or it does not hold a complete DenseNet with a classifier.
    """
    published = get_published(path)
    file = read_densenet(published.path, **reading)
    network = network_of(file).eval()
    if network.num_classes == 0:
        raise UserError(
            f"{path} holds a network without a linear classifier for its features: train one, with fit --model.weights"
        )
    description = _description(file.weights.content.value, network.num_classes)
    if published.preprocessing and network.in_channels == 3:
        description["preprocessing"] = Preprocessing(in_channels=3, **published.preprocessing)
    if published.class_names and len(published.class_names) == network.num_classes:
        description["class_names"] = published.class_names
    defaults = {
        "class_names": [str(i) for i in range(network.num_classes)],
        "preprocessing": _usual_preprocessing(network),
    }
    return TrainedNetwork(network, **(defaults | description))


def _description(content: Any, num_classes: int) -> dict[str, Any]:
    """What `Classifier` adds to its checkpoints."""
    found: dict[str, Any] = {}
    if isinstance(content, dict):
        names, preprocessing = content.get("class_names"), content.get("preprocessing")
        if isinstance(names, list) and len(names) == num_classes and all(isinstance(name, str) for name in names):
            found["class_names"] = names
        if isinstance(preprocessing, dict):
            found["preprocessing"] = Preprocessing.from_dict(preprocessing)
    return found


def _usual_preprocessing(network: DenseNet) -> Preprocessing:
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if network.in_channels == 3 else ((0.449,), (0.226,))
    if hasattr(network.features, "pool0"):
        return Preprocessing(network.in_channels, size=224, mean=mean, std=std, resize=256)
    return Preprocessing(network.in_channels, size=32, mean=mean, std=std)
