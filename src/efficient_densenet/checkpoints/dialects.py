"""The names that other libraries give to the weights of a DenseNet, as tables that are read in both directions.

A rule is a pair of patterns, theirs and ours. A word in braces stands for a part of the name that both share;
``{final}`` is the number of the last norm, one more than the number of blocks. The first rule that fits a name renames
it, and a name that no rule fits stays as it is. The canonical names, ours, are torchvision's, except that the last norm
is numbered by the blocks, where torchvision always says ``norm5``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.errors import UserError


class Rule(NamedTuple):
    """One renaming; `theirs` is None for a tensor that their network does not have."""

    theirs: str | None
    ours: str


_NORM_5 = Rule("features.norm5.{name}", "features.norm{final}.{name}")
_NORM_FINAL = Rule("features.norm_final.{name}", "features.norm{final}.{name}")
_DOTTED_NORM = Rule("{layer}.norm.{i}.{name}", "{layer}.norm{i}.{name}")
_DOTTED_CONV = Rule("{layer}.conv.{i}.{name}", "{layer}.conv{i}.{name}")

# The first of the dialects that explain a file equally well is taken: with four blocks, torchvision's names are ours.
DIALECTS: dict[str, tuple[Rule, ...]] = {
    "torchvision": (_NORM_5,),
    "efficient-densenet": (),
    "torchvision before 2017-10": (_DOTTED_NORM, _DOTTED_CONV, _NORM_5),
    "gpleiss": (_NORM_FINAL,),
    "gpleiss before 2018": (_DOTTED_NORM, _DOTTED_CONV, _NORM_FINAL),
    "monai": (
        Rule("{layer}.layers.{rest}", "{layer}.{rest}"),
        _NORM_5,
        Rule("class_layers.out.{name}", "classifier.{name}"),
    ),
    # Its efficient network; its ordinary one has our names.
    "wandering007": (
        Rule(None, "{layer}.norm1.num_batches_tracked"),
        Rule("{layer}.bottleneck.norm_{name}", "{layer}.norm1.{name}"),
        Rule("{layer}.bottleneck.conv_{name}", "{layer}.conv1.{name}"),
    ),
    "timm features_only": (
        Rule("features_norm5.{name}", "features.norm{final}.{name}"),
        Rule("features_{rest}", "features.{rest}"),
    ),
}

_PARTS = {
    "layer": r"features\.denseblock\d+\.denselayer\d+",
    "i": "[12]",
    "name": "[a-z_]+",
    "rest": ".+",
    # Only for recognising canonical names:
    "other": r"(?:conv0|norm0|transition\d+\.(?:norm|conv))",
}
_CANONICAL = (
    "{layer}.norm{i}.{name}",
    "{layer}.conv{i}.{name}",
    "features.{other}.{name}",
    "features.norm{final}.{name}",
    "classifier.{name}",
)


def recognise(names: Iterable[str]) -> str:
    """The dialect (a key of `DIALECTS`) that explains most of `names`.

    Raises:
        UserError: none of them belongs to a dense layer in any dialect.
    """
    names = list(names)
    canonical = [_compile(pattern, number_of_blocks(names)) for pattern in _CANONICAL]
    explained = {
        dialect: sum(any(p.fullmatch(ours) for p in canonical) for ours in _to_ours(names, dialect).values())
        for dialect in DIALECTS
    }
    best = max(explained, key=explained.__getitem__)
    if explained[best] == 0 or number_of_blocks(names) == 0:
        raise UserError(f"this is not a DenseNet: its tensors are called {first_few(names)}")
    return best


def to_canonical(state: Mapping[str, Tensor], dialect: str) -> dict[str, Tensor]:
    """The tensors of `state`, whose names are in `dialect`, under the canonical names.

    A norm without ``num_batches_tracked`` (files older than PyTorch 0.4.1) gets a zero, as it does when it is loaded.

    Raises:
        UserError: two tensors would get one name.
    """
    canonical: dict[str, Tensor] = {}
    for theirs, ours in _to_ours(state, dialect).items():
        if ours in canonical:
            raise UserError(f"this file has {ours} twice, once under the name {theirs}")
        canonical[ours] = state[theirs]
    for norm in [name.removesuffix(".running_var") for name in canonical if name.endswith(".running_var")]:
        canonical.setdefault(f"{norm}.num_batches_tracked", torch.zeros((), dtype=torch.int64))
    return canonical


def from_canonical(state: Mapping[str, Tensor], dialect: str) -> dict[str, Tensor]:
    """The tensors of `state`, whose names are canonical, under the names of `dialect`."""
    renamed = _rename(state, [(rule.ours, rule.theirs) for rule in DIALECTS[dialect]])
    return {theirs: state[ours] for ours, theirs in renamed.items()}


def number_of_blocks(names: Iterable[str]) -> int:
    """The highest number of a dense block in `names`, of any dialect; 0: there is none."""
    return max((int(n) for name in names for n in re.findall(r"denseblock(\d{1,4})\.denselayer", name)), default=0)


def first_few(names: Iterable[str], limit: int = 3) -> str:
    """The first of `names` and how many more there are, for a message of one line whatever a file calls its tensors."""
    names = [name if name.isprintable() else repr(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _to_ours(names: Iterable[str], dialect: str) -> dict[str, str]:
    return _rename(names, [(rule.theirs, rule.ours) for rule in DIALECTS[dialect]])


def _rename(names: Iterable[str], rules: Iterable[tuple[str | None, str | None]]) -> dict[str, str]:
    """Each of `names` with its new name, by rules from old to new; those that have no new name are left out."""
    names = list(names)
    blocks = number_of_blocks(names)
    compiled = [(_compile(old, blocks), new) for old, new in rules if old is not None]
    renamed = {}
    for name in names:
        for pattern, new in compiled:
            if match := pattern.fullmatch(name):
                if new is not None:
                    renamed[name] = new.format(**match.groupdict(), final=blocks + 1)
                break
        else:
            renamed[name] = name
    return renamed


def _compile(pattern: str, blocks: int) -> re.Pattern[str]:
    parts = {part: f"(?P<{part}>{expression})" for part, expression in _PARTS.items()}
    return re.compile(pattern.replace(".", r"\.").format(**parts, final=blocks + 1))
