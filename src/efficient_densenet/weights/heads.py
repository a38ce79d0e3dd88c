"""The classifier among the tensors of a network: one linear layer, whatever it is called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from efficient_densenet.weights.finding import Leaf
from efficient_densenet.weights.pickles import Stub

_NAMES = "classifier|classification_head|fc|_fc|head|cls_head|last_linear|linear|logits|output"
_WEIGHT = re.compile(rf"(?:{_NAMES})(?:\.[a-z0-9_]+)*\.weight")


def find_head(places: Iterable[Mapping[str, Leaf]], num_features: int) -> dict[str, Leaf]:
    """The classifier's weight and, if it has one, bias, by their canonical names.

    Empty where no single linear layer takes `num_features` features, where it is one of several layers with weights,
    and where another layer gives as many: that may stand between the features and the linear layer.

    Args:
        places: where to look, one after the other, until there are weights under the name of a classifier.
        num_features: channels of the last norm.
    """
    for tensors in places:
        weights = [name for name in tensors if _WEIGHT.fullmatch(name)]
        if weights:
            return _linear(tensors, weights, num_features)
    return {}


def _linear(tensors: Mapping[str, Leaf], weights: list[str], num_features: int) -> dict[str, Leaf]:
    between = [name for name in tensors if name.endswith(".weight") and _shape(tensors[name])[:1] == (num_features,)]
    weight, *others = weights
    shape = _shape(tensors[weight])
    if others or set(between) - {weight} or len(shape) != 2 or shape[1] != num_features:
        return {}
    bias = f"{weight.removesuffix('weight')}bias"
    return {"classifier.weight": tensors[weight]} | ({"classifier.bias": tensors[bias]} if bias in tensors else {})


def _shape(leaf: Leaf) -> tuple[int, ...]:
    return () if isinstance(leaf, Stub) else tuple(leaf.shape)
