"""The classifier among the tensors of a network: one linear layer, whatever it is called."""

from __future__ import annotations

import re
from collections.abc import Mapping

from efficient_densenet.weights.finding import Leaf
from efficient_densenet.weights.pickles import Stub

_WEIGHT = re.compile(r"(?:classifier|fc|_fc|head|last_linear|linear|logits|output)(?:\.[a-z0-9_]+)*\.weight")


def find_head(tensors: Mapping[str, Leaf], num_features: int) -> dict[str, str]:
    """The names of the classifier's weight and, if it has one, bias, by their canonical names.

    Empty where no single linear layer takes `num_features` features, or where it is one of several layers with weights.
    """
    outside = {name: leaf for name, leaf in tensors.items() if not name.startswith("features.")}
    weights = [name for name in outside if _WEIGHT.fullmatch(name)]
    if len(weights) != 1:
        return {}
    (weight,) = weights
    leaf, bias = outside[weight], weight.removesuffix("weight") + "bias"
    if isinstance(leaf, Stub) or len(leaf.shape) != 2 or leaf.shape[1] != num_features:
        return {}
    return {"classifier.weight": weight} | ({"classifier.bias": bias} if bias in outside else {})
