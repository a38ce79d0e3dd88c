"""Parts of a network that are not trained, until an epoch or to the end."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from efficient_densenet.errors import UserError
from efficient_densenet.training.networks import head_of

STEM, BLOCKS, BACKBONE = "stem", "blocks", "backbone"
_STEM = re.compile(r"(?:.*\.)?(?:conv0|norm0)")
_BLOCKS = re.compile(r"(?:.*\.)?(?:dense_?block|transition)\d+", re.IGNORECASE)


class Frozen:
    """The parts of a network that `names` mean: their weights get no gradients, their norms are in evaluation mode.

    Args:
        network: the network.
        names: ``stem`` (the first convolution and norm of a DenseNet), ``blocks`` (its dense blocks and transitions),
            ``backbone`` (all but the last linear layer), or names of modules, such as ``features.denseblock1``.

    Raises:
        UserError: a name means nothing in this network, or nothing is left to train.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self.modules: list[nn.Module] = []
        for name in names:
            self.modules += _modules(network, name)
        parts = {module: None for part in self.modules for module in part.modules()}
        self.parameters = list(dict.fromkeys(p for part in parts for p in part.parameters(recurse=False)))
        if names and len(self.parameters) == len(list(network.parameters())):
            raise UserError(f"model.freeze {', '.join(names)} leaves nothing to train")

    def freeze(self, frozen: bool = True) -> None:
        """In evaluation mode, running statistics stay what they are."""
        for parameter in self.parameters:
            parameter.requires_grad_(not frozen)
        for module in self.modules:
            module.train(not frozen)


def _modules(network: nn.Module, name: str) -> list[nn.Module]:
    if name == BACKBONE:
        found = _all_but_the_head(network)
    elif name in (STEM, BLOCKS):
        pattern = {STEM: _STEM, BLOCKS: _BLOCKS}[name]
        found = [module for own, module in network.named_modules() if pattern.fullmatch(own)]
    else:
        found = [module for own, module in network.named_modules() if own == name != ""]
    if not found:
        raise UserError(
            f"model.freeze: there is no {name} in a {type(network).__name__}; write {STEM}, {BLOCKS}, {BACKBONE} or "
            f"names of its modules, such as {', '.join(own for own, _ in network.named_children())}"
        )
    return found


def _all_but_the_head(network: nn.Module) -> list[nn.Module]:
    head = head_of(network)
    return [module for module in network.modules() if head not in set(module.modules())]
