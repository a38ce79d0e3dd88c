"""The names that other libraries give to the weights of a DenseNet, as tables that are read in both directions.

A rule is a pair of patterns, theirs and ours. A word in braces stands for a part of the name that both share;
``{final}`` is the number of the last norm, one more than the number of blocks. The first rule that fits a name renames
it, and a name that no rule fits stays as it is. The canonical names, ours, are torchvision's, except that the last norm
is numbered by the blocks, where torchvision always says ``norm5``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

from efficient_densenet.errors import UserError
from efficient_densenet.weights.formats import shortened

T = TypeVar("T")


class Rule(NamedTuple):
    """One renaming."""

    theirs: str
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
    """The dialect (a key of `DIALECTS`) that explains most of `names`."""
    names = list(names)
    canonical = [_compile(pattern, number_of_blocks(names)) for pattern in _CANONICAL]
    explained = {
        dialect: sum(any(p.fullmatch(ours) for p in canonical) for ours in _to_ours(names, dialect).values())
        for dialect in DIALECTS
    }
    return max(explained, key=explained.__getitem__)


def to_canonical(state: Mapping[str, T], dialect: str) -> dict[str, T]:
    """What `state` holds under names in `dialect`, under the canonical names.

    Raises:
        UserError: two tensors would get one name.
    """
    canonical: dict[str, T] = {}
    for theirs, ours in _to_ours(state, dialect).items():
        if ours in canonical:
            raise UserError(f"it has {shortened(ours)} twice, once under the name {shortened(theirs)}")
        canonical[ours] = state[theirs]
    return canonical


def from_canonical(state: Mapping[str, T], dialect: str) -> dict[str, T]:
    """What `state` holds under canonical names, under the names of `dialect`."""
    renamed = _rename(state, [(rule.ours, rule.theirs) for rule in DIALECTS[dialect]])
    return {theirs: state[ours] for ours, theirs in renamed.items()}


def number_of_blocks(names: Iterable[str]) -> int:
    """The highest number of a dense block in `names`, of any dialect; 0: there is none."""
    return max((int(n) for name in names for n in re.findall(r"denseblock(\d{1,4})\.denselayer", name)), default=0)


def _to_ours(names: Iterable[str], dialect: str) -> dict[str, str]:
    return _rename(names, [(rule.theirs, rule.ours) for rule in DIALECTS[dialect]])


def _rename(names: Iterable[str], rules: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Each of `names` with its new name, by rules from old to new."""
    names = list(names)
    blocks = number_of_blocks(names)
    compiled = [(_compile(old, blocks), new) for old, new in rules]
    renamed = {}
    for name in names:
        matches = ((pattern.fullmatch(name), new) for pattern, new in compiled)
        new_name = (new.format(**match.groupdict(), final=blocks + 1) for match, new in matches if match)
        renamed[name] = next(new_name, name)
    return renamed


def _compile(pattern: str, blocks: int) -> re.Pattern[str]:
    parts = {part: f"(?P<{part}>{expression})" for part, expression in _PARTS.items()}
    return re.compile(pattern.replace(".", r"\.").format(**parts, final=blocks + 1))
