"""Networks of other libraries by name, and the weights that any network starts from."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from efficient_densenet.adopt import make_efficient
from efficient_densenet.errors import UserError, require
from efficient_densenet.execution import Keep
from efficient_densenet.models import VARIANTS
from efficient_densenet.training.checkpointing import differences
from efficient_densenet.weights.finding import named_leaves
from efficient_densenet.weights.loading import adapt_input_channels, load_weights
from efficient_densenet.weights.pickles import Stub
from efficient_densenet.weights.published import get_published
from efficient_densenet.weights.shards import read_content

NAME_IN_CHECKPOINT = "library_network"
_LIBRARIES = {"torchvision": "torchvision.models", "timm": "timm", "monai": "monai.networks.nets"}
_CANONICAL = "features.denseblock1.denselayer1.conv1.weight"  # a name that our networks, torchvision's and timm's have
_OF_LIBRARY = re.compile(r"DEFAULT|IMAGENET1K_V\d+")


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
    own = network.state_dict()
    if _CANONICAL in own:
        load_weights(network, weights, variant=name, new_head=new_head)
        return
    path = get_published(weights).path
    found = _under_own_names(path, own)
    found = {key: own[key] for key in own if key.endswith("num_batches_tracked")} | found  # older files have none
    if first := next((key for key, tensor in found.items() if tensor.dim() == 4), ""):
        found[first] = adapt_input_channels(found[first], own[first].shape[1])
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
