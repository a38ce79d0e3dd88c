"""From a file to the weights of its DenseNet, under the canonical names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from efficient_densenet.errors import UserError
from efficient_densenet.weights.dialects import number_of_blocks, recognise, to_canonical
from efficient_densenet.weights.finding import Leaf, find_densenet
from efficient_densenet.weights.formats import Content, first_few, shortened
from efficient_densenet.weights.heads import find_head
from efficient_densenet.weights.pickles import Stub
from efficient_densenet.weights.shards import read_content
from efficient_densenet.weights.stored import StoredTensor

_TENSORS_OF_LAYERS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# What thop's profiler leaves in every module.
_COUNTS = (".total_ops", ".total_params")
# What `torch.nn.utils` keeps instead of a weight: prune, weight_norm and spectral_norm, parametrize.
_COMPUTED = re.compile(r"features\..*(?:weight_(?:orig|mask|g|v|u)|parametrizations\.weight\.\w+)")


@dataclass(frozen=True)
class Weights:
    """The tensors of one DenseNet in a file; they are read by `load`.

    Attributes:
        content: all that the file holds.
        prefix: what came before the names in the file.
        dialect: the names in the file, a key of `dialects.DIALECTS`.
        tensors: by their canonical names; ``features.…`` and, where there is a classifier, ``classifier.…``.
        left_behind: names of the same network that are neither.
    """

    content: Content
    prefix: str
    dialect: str
    tensors: dict[str, StoredTensor | Tensor]
    left_behind: list[str]

    def load(self, allow_non_finite: bool = False) -> dict[str, Tensor]:
        """Read the tensors, on the CPU, in the file's dtypes.

        Raises:
            UserError: their bytes are damaged, or some are infinite or not a number and that is not allowed.
        """
        state = {name: self.content.load(tensor) for name, tensor in self.tensors.items()}
        wrong = [name for name, tensor in state.items() if not allow_non_finite and not _is_finite(tensor)]
        if wrong:
            raise UserError(
                f"{self.content.path} has weights that are infinite or not a number: {first_few(wrong)}; it is "
                "damaged, or its training diverged: take another file, or allow them with --allow-non-finite"
            )
        return state


def read_weights(path: str | os.PathLike[str], prefix: str | None = None, ema: bool = False) -> Weights:
    """Find the DenseNet in a file, in any dialect of `dialects.DIALECTS`.

    A norm without ``num_batches_tracked`` (files older than PyTorch 0.4.1) gets a zero, and a classifier without a bias
    gets zeros: both compute the same.

    Args:
        path: the file.
        prefix: which network, where there are several: the one whose names begin so.
        ema: take the averaged copy of the weights.

    Raises:
        UserError: the file cannot be read (see `read_content`), or it holds no DenseNet, or several.
    """
    content = read_content(path)
    try:
        found = find_densenet(content.value, prefix, ema)
        dialect = recognise(found.tensors)
        leaves = to_canonical(found.tensors, dialect)
        last_norm = leaves.get(f"features.norm{number_of_blocks(leaves) + 1}.weight")
        outside = {name: leaf for name, leaf in leaves.items() if not name.startswith("features.")}
        head = find_head(chain([outside], found.around()), _length(last_norm))
        own = {name: leaf for name, leaf in leaves.items() if name not in outside and not name.endswith(_COUNTS)} | head
        tensors = _tensors(own)
    except UserError as error:
        raise UserError(f"{content.path}: {error}") from error
    content.check_size(tensors.values())
    taken = {id(leaf) for leaf in own.values()}
    left_behind = [name for name, leaf in leaves.items() if id(leaf) not in taken]
    return Weights(content, found.prefix, dialect, tensors, left_behind)


def read_state_dict(path: str | os.PathLike[str], prefix: str | None = None, ema: bool = False) -> dict[str, Tensor]:
    """The tensors of the DenseNet in a file, under the file's own names without what wrappers put before them.

    Arguments and errors are those of `read_weights`. What is not a tensor is left out.
    """
    content = read_content(path)
    try:
        found = find_densenet(content.value, prefix, ema)
    except UserError as error:
        raise UserError(f"{content.path}: {error}") from error
    return {name: content.load(leaf) for name, leaf in found.tensors.items() if not isinstance(leaf, Stub)}


def _tensors(leaves: dict[str, Leaf]) -> dict[str, StoredTensor | Tensor]:
    computed = next(filter(_COMPUTED.fullmatch, leaves), None)
    if computed is not None:
        raise UserError(
            f"{shortened(computed)} is not a weight but what one is computed from: save the weights again after "
            "remove_parametrizations, remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils"
        )
    tensors: dict[str, StoredTensor | Tensor] = {}
    for name, leaf in leaves.items():
        if not isinstance(leaf, Stub):
            tensors[name] = leaf
        elif name.endswith(_TENSORS_OF_LAYERS):
            raise UserError(f"{shortened(name)} is not an ordinary tensor but a {shortened(leaf.name)}")
    for norm in [name.removesuffix(".running_var") for name in tensors if name.endswith(".running_var")]:
        tensors.setdefault(f"{norm}.num_batches_tracked", torch.zeros((), dtype=torch.int64))
    if "classifier.weight" in tensors:
        weight = tensors["classifier.weight"]
        tensors.setdefault("classifier.bias", torch.zeros(1, dtype=weight.dtype).expand(weight.shape[0]))
    return tensors


def _length(leaf: Leaf | None) -> int:
    """Of the first dimension; 0 for what has none."""
    return leaf.shape[0] if isinstance(leaf, StoredTensor | Tensor) and leaf.shape else 0


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.dtype.is_floating_point or bool(tensor.isfinite().all())
