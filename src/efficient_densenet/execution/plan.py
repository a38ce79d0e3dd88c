"""What a part of a network computes, found once: a dense block, with the transition or head after it, or a stem.

A plan names modules by their numbers in the order of `parts`, and tensors by their names in them: so it fits copies and
replicas too, and what is frozen, loaded, synchronised or parametrized later is read as it is at the call. Channels are
numbered as the buffer has them, the oldest first; `Norm.order` and `Plan.output` say where the network has them in
another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Ranges = tuple[tuple[int, int], ...]
"""First channel and number of channels of pieces, in some order."""


class Norm(NamedTuple):
    """A batch norm.

    Attributes:
        part: the module that holds its tensors.
        names: of weight, bias, running mean and running variance there; None where there is none.
        source: first and last channel (exclusive) that it reads: features first, then the bottleneck outputs.
        order: where the pieces that it reads, the oldest first, lie among its own channels; empty: in this order.
        eps, momentum: None: as the module has them at the call.
        frozen: its running statistics are constants, in training too.
    """

    part: int
    names: tuple[str | None, str | None, str | None, str | None]
    source: tuple[int, int]
    order: Ranges = ()
    eps: float | None = None
    momentum: float | None = None
    frozen: bool = False


class Convolution(NamedTuple):
    """A convolution that keeps the resolution.

    Attributes:
        part: the module that holds its tensors.
        names: of weight and bias there; None where there is none.
        order: as of the norm before it.
        dilation: of its window; empty: none.
    """

    part: int
    names: tuple[str, str | None]
    order: Ranges = ()
    dilation: tuple[int, ...] = ()


class Entry(NamedTuple):
    """How a stem's first convolution goes over the image, with a number for each direction; empty: there is none."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def size(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """The spatial size of what it makes of an image of this size, with this window."""
        directions = zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in directions]


class Blur(NamedTuple):
    """A constant filter of each channel that follows a stem's max pool, which then has stride 1.

    Attributes:
        part, name: the module that holds the filter, ``(C, 1, height, width)``, and its name there.
        padding: of the pixels, as `torch.nn.functional.pad` has it.
        mode: of that: "reflect" or "constant".
        stride: of the filter.
    """

    part: int
    name: str
    padding: tuple[int, ...]
    mode: str
    stride: tuple[int, ...]


class Step(NamedTuple):
    """An operation that follows a transition's convolution, as it was recorded: its first argument is what it gets."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self, x: Tensor) -> Tensor:
        made = self.function(x, *self.arguments)
        return made if isinstance(made, Tensor) else made[0]


class Dropout(NamedTuple):
    """Dropout of single values, or of whole channels."""

    rate: float
    whole_channels: bool

    def step(self) -> Step:
        """This dropout as a step, in training."""
        return Step(torch.feature_dropout if self.whole_channels else F.dropout, (self.rate, True))


@dataclass(frozen=True)
class Plan:
    """How to run it on the shared buffer.

    Attributes:
        width: channels of the input.
        made: channels that each convolution makes, in their order, layer by layer, the transition's last.
        norms, convolutions: likewise. A head is one norm more than there are convolutions. A stem is a norm after each
            convolution; or a norm alone.
        per_layer: norms and convolutions of each layer: 2 with a bottleneck.
        dropouts: after each layer; in evaluation none.
        pool: window of the transition's average pool, 1 without one; 0: no transition.
        steps: what follows the transition's convolution and this pool.
        entry: of a stem, which ends with a max pool of window 3, stride 2 and padding 1; None: it is no stem.
        blur: of a stem, if its max pool has stride 1 and a filter follows it.
        output: the features that are handed out, in their order; empty: all, the oldest first.
    """

    width: int
    made: tuple[int, ...] = ()
    norms: tuple[Norm, ...] = ()
    convolutions: tuple[Convolution, ...] = ()
    per_layer: int = 1
    dropouts: tuple[tuple[Dropout, ...], ...] = ()
    pool: int = 0
    steps: tuple[Step, ...] = ()
    entry: Entry | None = None
    blur: Blur | None = None
    output: Ranges = ()

    @property
    def layers(self) -> int:
        return len(self.dropouts)

    @property
    def head(self) -> bool:
        """Whether it ends with norm, relu and the mean over all pixels."""
        return self.entry is None and len(self.norms) > len(self.convolutions)


def is_cheap_again(bottleneck: int, convolution: int) -> bool:
    """Whether a bottleneck output is made again in less than a sixth of its layer's multiplications.

    Args:
        bottleneck, convolution: multiplications per pixel of the 1×1 convolution that makes it, and of the one that
            reads it.
    """
    return 5 * bottleneck <= convolution


def parts(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """All modules in these, each once, in the order in which they were registered."""
    found: dict[nn.Module, None] = {}
    stack = list(roots)[::-1]
    while stack:
        module = stack.pop()
        if module not in found:
            found[module] = None
            stack += [child for child in module._modules.values() if child is not None][::-1]
    return list(found)


def sources(width: int, made: Sequence[int], per_layer: int, tail: bool) -> list[tuple[int, int]]:
    """The channels that each norm reads, first and last (exclusive): the features, then each bottleneck's output.

    Args:
        width: channels of the input.
        made: what each convolution of the layers makes.
        per_layer: as in `Plan`.
        tail: whether there is a norm more, of a transition, a head or a stem.
    """
    found = []
    next_bottleneck = width + sum(made[per_layer - 1 :: per_layer])
    for i in range(0, len(made), per_layer):
        found.append((0, width))
        if per_layer == 2:
            found.append((next_bottleneck, next_bottleneck + made[i]))
            next_bottleneck += made[i]
        width += made[i + per_layer - 1]
    return [*found, (0, width)] if tail else found
