"""The DenseNet in what a file holds: wherever it is, and whatever else the file holds.

Every tensor gets one dotted name, made of all that leads to it: ``state_dict.module.features.conv0.weight``. There is a
network where there are dense blocks; what comes before ``features`` in their names is its prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from efficient_densenet.errors import UserError
from efficient_densenet.weights.arrays import array_of_pickle
from efficient_densenet.weights.formats import first_few, shortened
from efficient_densenet.weights.pickles import Stub
from efficient_densenet.weights.stored import StoredTensor

Leaf = StoredTensor | Tensor | Stub

# Where training scripts keep the state dict in what they save, and the attributes that hold a network in another.
_USUAL = {"state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights", "state"}
_USUAL |= {"module"}
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|averaged|shadow)(?=[._\d]|$)", re.IGNORECASE)
_BLOCK = re.compile(r"(?P<prefix>(?:.*?\.)??)(?P<features>features[._])?denseblock\d{1,4}\.denselayer\d{1,4}\.")
_NUMBERED_BLOCK = re.compile(r"(?P<prefix>(?:.*?\.)??)(?P<number>\d{1,4})\.denselayer\d{1,4}\.")
_PART_OF_FEATURES = re.compile(r"(?:conv0|norm0|denseblock\d+|transition\d+|norm\d+|norm_final)\.")
# What wrappers put into names: torch.compile, activation checkpointing and FSDP. No part is called so by itself.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPER = re.compile(rf"(?<![^.])(?:{'|'.join(_WRAPPERS)})\.")
# That of DataParallel, which may also be a name of its own: left out behind the names of a DenseNet's parts alone.
_MODULE_OF_PART = re.compile(
    r"(?<![^._])((?:features|classifier|(?:denseblock|denselayer|transition|conv|norm)\d*)\.)(?:module\.)+"
)
_MAX_NAME = 1000
_INSIDE_MODULES = ("_parameters", "_buffers", "_modules")
# What an adopted module remembers of its original, by which its parts would be found a second time.
_ADOPTION_ATTRIBUTE = "adoption"


class Found(NamedTuple):
    """The tensors of one DenseNet, under their own names.

    Attributes:
        tensors: of the network.
        prefix: what came before their names.
        others: those that are of no DenseNet, under their whole names.
    """

    tensors: dict[str, Leaf]
    prefix: str
    others: dict[str, Leaf]

    def around(self) -> Iterator[dict[str, Leaf]]:
        """What the network is a part of, from inside to outside: for each beginning of its prefix, `others` whose names
        begin so, without that beginning.
        """
        parts = self.prefix.split(".")[:-1]
        for depth in reversed(range(len(parts))):
            outer = "".join(f"{part}." for part in parts[:depth])
            yield {name.removeprefix(outer): leaf for name, leaf in self.others.items() if name.startswith(outer)}


def find_densenet(content: Any, prefix: str | None = None, ema: bool = False) -> Found:
    """The one DenseNet in what a file holds.

    Args:
        prefix: take the one whose names begin so.
        ema: take the averaged copy of the weights rather than the weights themselves.

    Raises:
        UserError: there is none, or not the one that is asked for, or there are several.
    """
    leaves = _with_names_for_numbers(_without_wrappers(named_leaves(content)))
    found = dict.fromkeys((match["prefix"], match["features"] or "") for match in map(_BLOCK.match, leaves) if match)
    if not found:
        held = (
            f"its tensors are called {first_few(leaves)}"
            if any(leaves)
            else f"it holds no tensors, but {_described(content)}"
        )
        raise UserError(f"it holds no dense blocks under names that are known here; {held}")
    chosen, features = _choose(list(found), prefix, ema)
    tensors, others = {}, {}
    not_chosen = tuple(prefix for prefix, _ in found if not chosen.startswith(prefix))
    for name, leaf in leaves.items():
        if name.startswith(not_chosen):
            continue
        if name.startswith(chosen):
            own = name.removeprefix(chosen)
            inside = not features and _PART_OF_FEATURES.match(own)
            tensors[f"features.{own}" if inside else own] = leaf
        else:
            others[name] = leaf
    return Found(tensors, chosen, others)


def named_leaves(value: Any) -> dict[str, Leaf]:
    """All tensors in nested dictionaries, lists and stubs, and the stubs that nothing is in, by their dotted names.

    A container that is referred to several times is entered once, by the first way to it.
    """
    leaves: dict[str, Leaf] = {}
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", value)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, Stub):
            value = array_of_pickle(value) or value
        if isinstance(value, StoredTensor | Tensor):
            leaves.setdefault(name, value)
            continue
        if len(name) > _MAX_NAME or id(value) in seen:
            continue
        seen.add(id(value))
        within = [(f"{name}.{part}" if name and part else name or part, child) for part, child in _children(value)]
        pending += reversed(within)
        if isinstance(value, Stub) and not within:
            leaves.setdefault(name, value)
    return leaves


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            if isinstance(key, str | int):
                yield str(key), child
    elif isinstance(value, list | tuple):
        for number, child in enumerate(value):
            if not isinstance(child, str | int | float | None):
                yield str(number), child
    elif isinstance(value, Stub):
        yield from _children(value.entries)
        for attributes in value.state if isinstance(value.state, tuple) else (value.state,):
            for key, child in _children(attributes):
                # A pickled module keeps its parts in dictionaries that are no part of their names.
                if key != _ADOPTION_ATTRIBUTE:
                    yield "" if key in _INSIDE_MODULES else key, child


def _without_wrappers(named: dict[str, Leaf]) -> dict[str, Leaf]:
    """The same under the names that they have without wrappers of the network or of single parts."""
    leaves: dict[str, Leaf] = {}
    for name, leaf in named.items():
        own = _MODULE_OF_PART.sub(r"\1", _WRAPPER.sub("", name))
        if own in leaves and not isinstance(leaf, Stub):
            raise UserError(
                f"it has {shortened(own)} twice, in a wrapper and without one: save the state dict of one of the two"
            )
        leaves.setdefault(own, leaf)
    return leaves


def _with_names_for_numbers(leaves: dict[str, Leaf]) -> dict[str, Leaf]:
    """Gives the children of ``nn.Sequential(*features.children())``, which have numbers, the names that they had."""
    blocks: dict[str, set[int]] = {}
    for match in filter(None, map(_NUMBERED_BLOCK.match, leaves)):
        blocks.setdefault(match["prefix"], set()).add(int(match["number"]))
    for prefix, numbers in blocks.items():
        renamed = {}
        for name, leaf in leaves.items():
            number, _, rest = name.removeprefix(prefix).partition(".")
            child = _child_with_number(int(number), sorted(numbers)) if number.isdecimal() else None
            renamed[f"{prefix}features.{child}.{rest}" if name.startswith(prefix) and child else name] = leaf
        leaves = renamed
    return leaves


def _child_with_number(number: int, blocks: list[int]) -> str | None:
    """What it was called among the features; None: it is behind them."""
    before = sum(block < number for block in blocks)
    if number in blocks:
        return f"denseblock{before + 1}"
    if before == 0:
        return "norm0" if number else "conv0"
    if before == len(blocks):
        return f"norm{before + 1}" if number == blocks[-1] + 1 else None
    return f"transition{before}"


def _choose(found: list[tuple[str, str]], prefix: str | None, ema: bool) -> tuple[str, str]:
    there = f"its DenseNets have the prefixes {first_few([repr(p) for p, _ in found], 6)}"
    if prefix is not None:
        wanted = _WRAPPER.sub("", prefix if prefix.endswith(".") or not prefix else f"{prefix}.")
        found = [one for one in found if f".{one[0]}".endswith(f".{wanted}")]
        if not found:
            raise UserError(f"{there}, and not {wanted!r}")
    averaged = [one for one in found if _AVERAGED.search(one[0])]
    if ema and not averaged:
        raise UserError(f"{there}, and none is an average (EMA)")
    found = averaged if ema else [one for one in found if one not in averaged] or found
    if len(found) > 1:
        usual = [one for one in found if _USUAL.issuperset(one[0].split(".")[:-1])]
        found = usual if len(usual) == 1 else found
    if len(found) > 1:
        raise UserError(f"{there}; say which one is meant with --prefix")
    return found[0]


def _described(value: Any) -> str:
    if isinstance(value, Mapping) and value:
        return first_few([str(key) for key in value])
    return f"an object of the type {value.name if isinstance(value, Stub) else type(value).__name__}"
