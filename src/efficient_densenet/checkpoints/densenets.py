"""Files that hold a DenseNet, in whatever dialect: the weights under our names, or the network itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from efficient_densenet.checkpoints.architecture import Architecture, architecture_of
from efficient_densenet.errors import UserError
from efficient_densenet.models import DenseNet
from efficient_densenet.weights.canonical import Weights, read_weights


@dataclass(frozen=True)
class DenseNetFile:
    """What a file holds: where and under which names, the weights under the canonical names, and their network."""

    weights: Weights
    state: dict[str, Tensor]
    architecture: Architecture

    @property
    def dialect(self) -> str:
        """The names in the file, a key of `DIALECTS`."""
        return self.weights.dialect


def read_densenet(
    path: str | os.PathLike[str], prefix: str | None = None, ema: bool = False, allow_non_finite: bool = False
) -> DenseNetFile:
    """Read the weights of the DenseNet in a file, and check that they are complete.

    Args:
        path: a file of `torch.save` or safetensors; names in any dialect, wherever they stand in it.
        prefix: which network, where there are several: the one whose names begin so.
        ema: take the averaged copy of the weights.
        allow_non_finite: do not refuse weights that are infinite or not a number.

    Raises:
        UserError: the file cannot be read, is damaged, or holds no complete DenseNet or several; see `read_weights`.
    """
    weights = read_weights(path, prefix, ema)
    try:
        architecture = architecture_of(weights.tensors)  # before anything is read: of these sizes they really are
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return DenseNetFile(weights, weights.load(allow_non_finite), architecture)


def load_network(path: str | os.PathLike[str], **arguments: Any) -> DenseNet:
    """The network in a file, with its weights, in single precision on the CPU, in training mode as a new one.

    Args:
        path: a checkpoint in any dialect.
        arguments: what the file does not say, for example ``efficient=True, drop_rate=0.2``.

    Raises:
        UserError: the file holds no complete 2D DenseNet, or fixes one of `arguments`.
    """
    return network_of(read_densenet(path), **arguments)


def network_of(file: DenseNetFile, **arguments: Any) -> DenseNet:
    """The network in a file that has been read; see `load_network`."""
    path, architecture = file.weights.content.path, file.architecture
    if architecture.dimensions != 2:
        raise UserError(f"{path} holds a {architecture.dimensions}D network; this library's networks are 2D")
    if fixed := sorted(arguments.keys() & architecture.arguments.keys()):
        raise UserError(
            f"{', '.join(fixed)} cannot be chosen for the network in {path}, because its weights fix it; "
            "for other classes, load the network and call reset_classifier"
        )
    network = DenseNet(**architecture.arguments, **arguments)
    network.load_state_dict(file.state)
    return network
