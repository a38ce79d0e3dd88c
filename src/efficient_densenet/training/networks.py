"""The network of a configuration: what makes it, what the data decide about it, and the weights that it starts from."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from efficient_densenet.adopt import make_efficient
from efficient_densenet.errors import UserError, require
from efficient_densenet.execution import Keep
from efficient_densenet.models import VARIANTS
from efficient_densenet.training.checkpointing import differences
from efficient_densenet.training.facts import DataFacts
from efficient_densenet.weights.finding import named_leaves
from efficient_densenet.weights.formats import read_content
from efficient_densenet.weights.loading import load_weights
from efficient_densenet.weights.pickles import Stub
from efficient_densenet.weights.published import get_published

# What the data decide, and how the parameters for it are called: here and in torchvision, timm and MONAI.
DECIDED_BY_DATA = {
    "in_channels": ("in_channels", "in_chans"),
    "num_classes": ("num_classes", "out_channels"),
    "input_size": ("input_size",),
}
_NAMES_DECIDED = frozenset(name for names in DECIDED_BY_DATA.values() for name in names)
NAME_IN_CHECKPOINT = "library_network"
_LIBRARIES = {"torchvision": "torchvision.models", "timm": "timm", "monai": "monai.networks.nets"}
_OF_LIBRARY = re.compile(r"DEFAULT|IMAGENET1K_V\d+")


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
    parameters = inspect.signature(make).parameters
    takes = {name for name in _NAMES_DECIDED if name in parameters}
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        takes |= {"in_channels", "num_classes"}
    arguments = dict(getattr(make, "keywords", {}))
    return NetworkFactory(getattr(make, "func", make), arguments, frozenset(takes - arguments.keys()))


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


def leave_to_the_data(network: Any, given: set[str]) -> frozenset[str]:
    """Take out of a parsed ``class_path`` and ``init_args`` what the data decide and nobody has given.

    Args:
        network: with the parser's defaults; is changed.
        given: the names of the arguments that somebody has given.

    Returns:
        The names of what was taken out.
    """
    arguments = network.get("init_args") or {}
    parameters = inspect.signature(_imported(network["class_path"])).parameters
    taken = set(arguments.keys()) & _NAMES_DECIDED - given
    if "input_size" not in parameters:
        taken.discard("input_size")  # densenet121 passes it on: the stem is part of what this name means
    for name in taken:
        del arguments[name]
    return frozenset(taken)


def factory_of_configuration(network: Any, takes: frozenset[str]) -> NetworkFactory:
    """Of ``class_path`` and ``init_args``, without what it `takes` from the data."""
    arguments = dict(network.get("init_args") or {}) | dict(network.get("dict_kwargs") or {})
    return NetworkFactory(_imported(network["class_path"]), arguments, takes)


def _imported(path: str) -> Callable[..., nn.Module]:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def library_network(
    name: str,
    in_channels: int = 3,
    num_classes: int = 1000,
    efficient: bool = True,
    keep: Keep = "bottleneck",
    arguments: dict[str, Any] | None = None,
) -> nn.Module:
    """A network of torchvision, timm or MONAI, made efficient where it is a DenseNet.

    Args:
        name: ``torchvision:densenet121``, ``timm:resnet50``, ``monai:DenseNet121``.
        in_channels: channels of the images.
        num_classes: outputs of the classifier.
        efficient: run its dense blocks efficiently, if it has any.
        keep: what they keep for backward then, see `make_efficient`.
        arguments: what else the library's function takes, such as ``spatial_dims: 3``.

    Raises:
        UserError: there is no such network, or it cannot be built.
    """
    library, _, own_name = name.partition(":")
    if library not in _LIBRARIES or not own_name:
        raise UserError(f"{name!r} names no network: write torchvision:NAME, timm:NAME or monai:NAME")
    module = require(_LIBRARIES[library], {"torchvision": "train", "timm": "weights"}.get(library, library))
    given = arguments or {}
    try:
        if library == "torchvision":
            if in_channels != 3:
                raise UserError(
                    "torchvision's networks take images of 3 channels: set data.in_channels to 3, or use timm's"
                )
            network = module.get_model(own_name, num_classes=num_classes, **given)
        elif library == "timm":
            network = module.create_model(own_name, num_classes=num_classes, in_chans=in_channels, **given)
        else:
            dims = {"spatial_dims": 2, "in_channels": in_channels, "out_channels": num_classes}
            network = getattr(module, own_name)(**(dims | given))
    except UserError:
        raise
    except Exception as error:  # whatever a library says of a name or an argument that it does not know
        raise UserError(f"{name} cannot be built: {error}") from error
    if efficient:
        with suppress(UserError):  # it has no dense block
            make_efficient(network, keep=keep)
    return network


def known_library_network(name: str, in_channels: int, num_classes: int) -> nn.Module:
    """The network of that name, which a file says: one that torchvision or timm bring themselves, and nothing else.

    Raises:
        UserError: there is no such network.
    """
    library, _, own_name = name.partition(":")
    known = library == "torchvision" and own_name in require("torchvision.models", "train").list_models()
    known = known or (library == "timm" and require("timm", "weights").is_model(own_name))
    if not known:
        raise UserError(f"the checkpoint is of a network {name!r}, which torchvision and timm do not have")
    return library_network(name, in_channels, num_classes, efficient=False)


def start_from(network: nn.Module, weights: str, name: str, new_head: bool = True) -> None:
    """Load `weights` into `network`; where the number of classes differs, the classifier stays a new one.

    Args:
        network: of any library.
        weights: a file, or a name of `get_published`.
        name: that of the network, where it has one, for names of weights that do not say it.
        new_head: whether another number of classes is no error.

    Raises:
        UserError: there are no such weights, or they are of another network.
    """
    if _OF_LIBRARY.fullmatch(weights):
        if ":" in name:
            weights = name if weights == "DEFAULT" else f"{name}.{weights}"
        elif name not in VARIANTS:
            raise UserError(
                f"model.weights {weights} are those of a network with a name: use efficient_densenet.densenet121, "
                "for example, as model.network, or give a file"
            )
    if "features.conv0.weight" in network.state_dict():
        load_weights(network, weights, variant=name, new_head=new_head)
        return
    path = get_published(weights).path
    own = network.state_dict()
    found = _under_own_names(path, own)
    head = _names_of_head(network) if new_head else set()
    other = {key for key in head if key not in found or found[key].shape != own[key].shape}
    found |= {key: own[key] for key in other}
    if different := differences(found, own):
        raise UserError(f"{path} holds the weights of another network: {different}")
    network.load_state_dict(found)
    if other:
        warnings.warn(
            f"the classifier is a new one, because {path} has another number of classes: train it", stacklevel=2
        )


def _under_own_names(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in a file by the names `own`, wherever in the file they stand."""
    content = read_content(path)
    leaves = {name: leaf for name, leaf in named_leaves(content.value).items() if not isinstance(leaf, Stub)}
    first = next(iter(own))
    prefixes = [name.removesuffix(first) for name in leaves if f".{name}".endswith(f".{first}")]
    if not prefixes:
        raise UserError(f"{path} holds the weights of another network: {first} is missing there")
    prefix = min(prefixes, key=len)
    return {
        name.removeprefix(prefix): content.load(leaf)
        for name, leaf in leaves.items()
        if name.startswith(prefix) and name.removeprefix(prefix) in own
    }


def head_of(network: nn.Module) -> nn.Linear:
    """The last linear layer.

    Raises:
        UserError: there is none.
    """
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"a {type(network).__name__} ends in no linear layer")
    return linear[-1]


def _names_of_head(network: nn.Module) -> set[str]:
    own = {id(parameter) for parameter in head_of(network).parameters()}
    return {name for name, parameter in network.named_parameters() if id(parameter) in own}
