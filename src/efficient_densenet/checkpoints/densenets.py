"""Files that hold a DenseNet, in whatever dialect: the weights under our names, or the network itself."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from torch import Tensor

from efficient_densenet.checkpoints.architecture import Architecture, architecture_of
from efficient_densenet.checkpoints.dialects import recognise, to_canonical
from efficient_densenet.checkpoints.files import read_state_dict
from efficient_densenet.errors import UserError
from efficient_densenet.models import DenseNet


class DenseNetFile(NamedTuple):
    """What a file holds: the weights under the canonical names, the dialect they were in, and the network."""

    state: dict[str, Tensor]
    dialect: str
    architecture: Architecture


def read_densenet(path: str | os.PathLike[str]) -> DenseNetFile:
    """Read the weights of a DenseNet in any dialect of `dialects.DIALECTS`, and check that they are complete.

    Raises:
        UserError: the file cannot be read (see `read_state_dict`), or holds no complete DenseNet.
    """
    state = read_state_dict(path)
    try:
        dialect = recognise(state)
        state = to_canonical(state, dialect)
        return DenseNetFile(state, dialect, architecture_of(state))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def load_network(path: str | os.PathLike[str], **arguments: Any) -> DenseNet:
    """The network in a file, with its weights, in single precision on the CPU, in training mode as a new one.

    Args:
        path: a checkpoint in any dialect.
        arguments: what the file does not say, for example ``efficient=True, drop_rate=0.2``.

    Raises:
        UserError: the file holds no complete 2D DenseNet, or fixes one of `arguments`.
    """
    state, _, architecture = read_densenet(path)
    if architecture.dimensions != 2:
        raise UserError(f"{path} holds a {architecture.dimensions}D network; this library's networks are 2D")
    if fixed := sorted(arguments.keys() & architecture.arguments.keys()):
        raise UserError(
            f"{', '.join(fixed)} cannot be chosen for the network in {path}, because its weights fix it; "
            "for other classes, load the network and call reset_classifier"
        )
    network = DenseNet(**architecture.arguments, **arguments)
    network.load_state_dict(state)
    return network
