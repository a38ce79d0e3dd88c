"""Which network a state dict belongs to: found from some shapes, then held against all its names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor

from efficient_densenet.errors import UserError
from efficient_densenet.models import DenseNet
from efficient_densenet.weights.dialects import number_of_blocks
from efficient_densenet.weights.formats import first_few

_INCOMPLETE = "its DenseNet is not complete"


class HasShape(Protocol):
    """A tensor, or one that has not been read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Architecture:
    """The arguments of `DenseNet` that make a network, and the dimensions of its images: 2, or 1 or 3 of MONAI's."""

    arguments: dict[str, Any]
    dimensions: int

    def __str__(self) -> str:
        a = self.arguments
        per_layer = 1 if a["bn_size"] is None else 2
        # The paper's L: the stem, the convolutions in the layers, one of each transition, the classifier.
        depth = per_layer * sum(a["block_config"]) + len(a["block_config"]) + 1
        return ", ".join(
            [
                f"{self.dimensions}D DenseNet of depth {depth}",
                f"growth rate {a['growth_rate']}",
                f"blocks of {' '.join(map(str, a['block_config']))} layers",
                "no bottleneck" if a["bn_size"] is None else f"bottleneck {a['bn_size']} × growth rate",
                f"compression {a['compression']:g}",
                f"stem for {'small' if a['input_size'] <= 32 else 'large'} images",
                f"{a['in_channels']} input channels to {a['num_init_features']}",
                f"{a['num_classes']} classes" if a["num_classes"] else "no classifier (an encoder)",
            ]
        )


def architecture_of(state: Mapping[str, HasShape]) -> Architecture:
    """The network whose state dict, under the canonical names, `state` is.

    Raises:
        UserError: `state` lacks tensors, has others, or has some of other shapes or of numbers of another kind.
    """
    stem = _shape(state, "features.conv0.weight")
    growth_rate, bn_size = _growth(state)
    block_config = tuple(_number_of_layers(state, block) for block in range(1, number_of_blocks(state) + 1))
    arguments: dict[str, Any] = {
        "in_channels": stem[1],
        "num_init_features": stem[0],
        "growth_rate": growth_rate,
        "block_config": block_config,
        "compression": _compression(state, stem[0], growth_rate, block_config),
        "input_size": 224 if "features.norm0.weight" in state else 32,
        "bn_size": bn_size,
        "num_classes": _shape(state, "classifier.weight")[0] if "classifier.weight" in state else 0,
    }
    with torch.device("meta"):
        expected = DenseNet(**arguments).state_dict()
    dimensions = len(stem) - 2
    _check(state, {name: _shape_in(dimensions, tensor) for name, tensor in expected.items()})
    return Architecture(arguments, dimensions)


def _growth(state: Mapping[str, HasShape]) -> tuple[int, int | None]:
    """Growth rate and bottleneck size, from the first layer."""
    layer = "features.denseblock1.denselayer1"
    width = _shape(state, f"{layer}.conv1.weight")[0]
    if f"{layer}.conv2.weight" not in state:
        return width, None
    growth_rate = _shape(state, f"{layer}.conv2.weight")[0]
    if width % growth_rate:
        raise UserError(
            f"a bottleneck of {width} channels is not supported: it must be a multiple of the growth rate {growth_rate}"
        )
    return growth_rate, width // growth_rate


def _number_of_layers(state: Mapping[str, HasShape], block: int) -> int:
    layer = re.compile(rf"features\.denseblock{block}\.denselayer(\d{{1,4}})\.")
    numbers = {int(match[1]) for match in map(layer.match, state) if match}
    # A name with a high number alone must not make a network of that size.
    for number in range(1, max(numbers, default=1) + 1):
        if number not in numbers:
            raise UserError(f"{_INCOMPLETE}: features.denseblock{block}.denselayer{number} is missing")
    return len(numbers)


def _compression(state: Mapping[str, HasShape], width: int, growth_rate: int, block_config: Sequence[int]) -> float:
    """The plainest number that makes every transition as narrow as it is, by the rounding of `DenseNet`."""
    transitions = []
    for block, num_layers in enumerate(block_config[:-1], start=1):
        before = width + num_layers * growth_rate
        width = _shape(state, f"features.transition{block}.conv.weight")[0]
        transitions.append((before, width))
    # It rounds down: `after` channels come from all numbers in [after / before, (after + 1) / before).
    low = max((Fraction(after, before) for before, after in transitions), default=Fraction(1))
    high = min((Fraction(after + 1, before) for before, after in transitions), default=Fraction(1))
    candidates = [math.ceil(low * denominator) / denominator for denominator in range(1, 101)] + [float(low + high) / 2]
    for compression in candidates:
        if compression <= 1 and all(int(before * compression) == after for before, after in transitions):
            return compression
    raise UserError(
        "this DenseNet is not supported, since no one compression up to 1 gives all its transitions: "
        + ", ".join(f"{before} to {after} channels" for before, after in transitions)
    )


def _shape(state: Mapping[str, HasShape], name: str) -> tuple[int, ...]:
    """The shape of a weight that must be there, with at least the dimensions of a linear layer."""
    if name not in state:
        raise UserError(f"{_INCOMPLETE}: {name} is missing")
    shape = tuple(state[name].shape)
    if not 2 <= len(shape) <= 5 or 0 in shape:
        raise UserError(f"{name} has the shape {shape}, which is not that of a DenseNet's weight")
    return shape


def _shape_in(dimensions: int, tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor of a 2D network in a network of so many dimensions."""
    shape = tuple(tensor.shape)
    return shape[:2] + shape[2:3] * dimensions if len(shape) == 4 else shape


def _check(state: Mapping[str, HasShape], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse `state` unless it has every expected name with its shape and with real numbers, and no other name."""
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    present = [name for name in expected if name in state]
    misshapen = [
        f"{name} with {tuple(state[name].shape)} instead of {expected[name]}"
        for name in present
        if tuple(state[name].shape) != expected[name]
    ]
    mistyped = [
        f"{name} of {state[name].dtype}"
        for name in present
        if not state[name].dtype.is_floating_point and not name.endswith("num_batches_tracked")
    ]
    wrong = {"missing": missing, "unknown": unknown, "of the wrong shape": misshapen, "not of real numbers": mistyped}
    if any(wrong.values()):
        counted = [f"{what}: {len(names)} ({first_few(names)})" for what, names in wrong.items() if names]
        raise UserError(f"its DenseNet differs from those of this library; of its tensors are {', '.join(counted)}")
