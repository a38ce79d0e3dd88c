"""Weights into a network that is there: another number of classes or input channels is no obstacle."""

from __future__ import annotations

import os
import warnings
from math import ceil

from torch import Tensor, nn

from efficient_densenet.errors import UserError
from efficient_densenet.weights.canonical import read_weights
from efficient_densenet.weights.formats import first_few
from efficient_densenet.weights.published import get_published

_STEM = "features.conv0.weight"
_HEAD = ("classifier.weight", "classifier.bias")


def load_weights(network: nn.Module, weights: str | os.PathLike[str], variant: str = "", new_head: bool = True) -> None:
    """Load a DenseNet's weights into `network`, whose names are the canonical ones.

    Where the network has another number of classes, or the file no classifier, the network keeps its own, new one, and
    a warning says so. Where it has other than 3 input channels, the stem's weights are adapted as timm does it.

    Args:
        network: a DenseNet of this library.
        weights: a file, or a name of `get_published`.
        variant: the name of the network, for names of weights that do not say it.
        new_head: whether another number of classes is no error.

    Raises:
        UserError: there are no such weights, or they are of another network.
    """
    path = get_published(weights, variant).path
    state, own = read_weights(path).load(), network.state_dict()
    if _STEM in state and _STEM in own:
        state[_STEM] = adapt_input_channels(state[_STEM], own[_STEM].shape[1])
    reason = _reason_for_new_head(state, own)
    if reason and new_head:
        state |= {name: own[name] for name in _HEAD}
    elif _HEAD[0] not in own:
        state = {name: tensor for name, tensor in state.items() if name not in _HEAD}
    different = [name for name in own if name not in state or state[name].shape != own[name].shape]
    different += [name for name in state if name not in own]
    if different:
        raise UserError(
            f"{path} holds the weights of another network: {len(different)} tensors differ or are missing "
            f"({first_few(different)}); build the network that they are of, or load it with checkpoints.load_network"
        )
    network.load_state_dict(state)
    if reason:
        warnings.warn(f"the classifier is a new one, because {path} {reason}: train it", stacklevel=5)


def adapt_input_channels(weight: Tensor, channels: int) -> Tensor:
    """The weights ``(O, 3, K, K)`` of a first convolution for images of so many channels ``(O, channels, K, K)``.

    One channel gets the sum of the three; several get them in turn, scaled by ``3 / channels``, so that an image whose
    channels are alike gives what it gave before. Weights for other than 3 channels are left as they are.
    Source: timm, ``adapt_input_conv``.
    """
    if weight.dim() != 4 or weight.shape[1] != 3 or channels == 3:
        return weight
    exact = weight.float()
    if channels == 1:
        exact = exact.sum(1, keepdim=True)
    else:
        exact = exact.repeat(1, ceil(channels / 3), 1, 1)[:, :channels] * (3 / channels)
    return exact.to(weight.dtype)


def _reason_for_new_head(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    weight = _HEAD[0]
    if weight not in own:
        return ""
    if weight not in state:
        return "holds no linear classifier for its features"
    there, here = len(state[weight]), len(own[weight])
    return f"has {there} classes and the network {here}" if there != here else ""
