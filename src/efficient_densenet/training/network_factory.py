"""The network that a configuration names: what makes it, and what the data decide about it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from efficient_densenet.errors import UserError
from efficient_densenet.training.facts import DataFacts
from efficient_densenet.training.networks import library_network

# What the data decide, and how the parameters for it are called: here and in torchvision, timm and MONAI.
DECIDED_BY_DATA = {
    "in_channels": ("in_channels", "in_chans"),
    "num_classes": ("num_classes", "out_channels"),
    "input_size": ("input_size",),
}
_NAMES_DECIDED = frozenset(name for names in DECIDED_BY_DATA.values() for name in names)


@dataclass(frozen=True)
class NetworkFactory:
    """A function or class that makes a network, with the arguments that a configuration gives it.

    Attributes:
        make: the function or class.
        arguments: what the configuration says.
        takes: the names of further parameters, among those of `DECIDED_BY_DATA`.
    """

    make: Callable[..., nn.Module]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    takes: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """What the network is called where its weights are published: ``densenet121``, ``torchvision:resnet50``."""
        return self.arguments["name"] if self.make is library_network else getattr(self.make, "__name__", "")

    @property
    def is_known_library_network(self) -> bool:
        """Whether `known_library_network` makes the same from its name."""
        return self.make is library_network and not self.arguments.get("arguments") and "monai" not in self.name

    @property
    def number_of_classes(self) -> int | None:
        """What the configuration says; None: nothing."""
        given = [self.arguments.get(name) for name in DECIDED_BY_DATA["num_classes"]]
        return next((number for number in given if number is not None), None)

    def __call__(self, facts: DataFacts) -> nn.Module:
        """The network for the data.

        Raises:
            UserError: the configuration contradicts the data, or what it names makes no network.
        """
        decided = self.decided(facts)
        self._refuse_ignored()
        for name in self._required() - {*decided, *self.arguments}:
            raise UserError(f"the data do not say what {name} of model.network is: set it there")
        network = self.make(**{**self.arguments, **decided})
        if not isinstance(network, nn.Module):
            raise UserError(f"model.network must make a torch.nn.Module, not a {type(network).__name__}")
        if not any(True for _ in network.parameters()):
            raise UserError(f"model.network makes a {type(network).__name__}, which has no parameters to train")
        return network

    def decided(self, facts: DataFacts, required: bool = False) -> dict[str, Any]:
        """The arguments that the data decide; of these, those without which nothing can be made.

        Raises:
            UserError: the configuration contradicts them.
        """
        values = {
            "in_channels": facts.in_channels,
            "num_classes": None if facts.class_names is None else len(facts.class_names),
            "input_size": facts.input_size,
        }
        decided: dict[str, Any] = {}
        for meaning, value in values.items():
            for name in DECIDED_BY_DATA[meaning]:
                given = self.arguments.get(name)
                if given is None and name in self.takes and value is not None:
                    decided[name] = value
                elif None not in (given, value) and given != value and meaning != "input_size":
                    raise UserError(
                        f"model.network.{name} is {given}, and the data have {value}: leave it out, the data decide it"
                    )
        return {name: value for name, value in decided.items() if not required or name in self._required()}

    def _required(self) -> set[str]:
        parameters = inspect.signature(self.make).parameters.values()
        return {p.name for p in parameters if p.name in _NAMES_DECIDED and p.default is p.empty}

    def _refuse_ignored(self) -> None:
        keep, efficient = self.arguments.get("keep", "bottleneck"), self.arguments.get("efficient")
        if keep != "bottleneck" and efficient in (False, "recompute"):
            raise UserError(
                f"model.network.keep {keep} is for networks that run efficiently: set model.network.efficient to true"
            )


def factory_of(make: Callable[..., nn.Module]) -> NetworkFactory:
    """Of a function, a class, or a `functools.partial` of one. What takes any arguments takes those of `DenseNet`."""
    if isinstance(make, NetworkFactory):
        return make
    takes = _takes(inspect.signature(make).parameters)
    arguments = dict(getattr(make, "keywords", {}))
    return NetworkFactory(getattr(make, "func", make), arguments, frozenset(takes - arguments.keys()))


def _takes(parameters: Mapping[str, inspect.Parameter]) -> set[str]:
    """What the data decide, of a function's arguments."""
    takes = {name for name in _NAMES_DECIDED if name in parameters}
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        takes |= {"in_channels", "num_classes"}
    return takes


def add_placeholders(given: Any) -> None:
    """Add to an entry ``class_path`` and ``init_args`` what a network requires and the data decide: the parser refuses
    a configuration without it.
    """
    try:
        parameters = inspect.signature(_imported(given["class_path"])).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError):  # the parser says it better
        return
    own = given.get("init_args") or {}
    added = {p.name for p in parameters if p.name in _NAMES_DECIDED - set(own.keys()) and p.default is p.empty}
    for name in added:
        given[f"init_args.{name}"] = 1


def remove_what_data_decide(network: Any, given: set[str]) -> frozenset[str]:
    """Remove from a parsed ``class_path`` and ``init_args`` what the data decide and nobody has given.

    Args:
        network: with the parser's defaults; is changed.
        given: the names of the arguments that somebody has given.

    Returns:
        The names of what the data are to decide.
    """
    arguments = network.get("init_args") or {}
    parameters = inspect.signature(_imported(network["class_path"])).parameters
    removed = set(arguments.keys()) & _NAMES_DECIDED - given
    if "input_size" not in parameters:
        removed.discard("input_size")  # densenet121 passes it on: the stem is part of what this name means
    for name in removed:
        del arguments[name]
    return frozenset((removed | _takes(parameters)) - given)


def factory_of_configuration(network: Any, takes: frozenset[str]) -> NetworkFactory:
    """Of ``class_path`` and ``init_args``, without what it `takes` from the data."""
    arguments = dict(network.get("init_args") or {}) | dict(network.get("dict_kwargs") or {})
    return NetworkFactory(_imported(network["class_path"]), arguments, takes)


def _imported(path: str) -> Callable[..., nn.Module]:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
