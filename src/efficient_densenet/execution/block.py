"""A dense block, with the transition or head after it, as the engine in `stage` takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from torch import Tensor

from efficient_densenet import ops
from efficient_densenet.execution.norms import Norm
from efficient_densenet.execution.plan import is_cheap_again
from efficient_densenet.ops.layers import Reader


def keeps_features(keep: str, pool: int) -> bool:
    """Whether a block's features are kept for backward, for these attributes of a `Stage`.

    With "inputs" they are not, if a transition follows. Otherwise they are the output, or a head reads them first in
    backward: to compute them again would save nothing.
    """
    return keep != "inputs" or not pool


@dataclass(frozen=True)
class Stage:
    """A block's norms and convolutions in their order, layer by layer, those of the transition last.

    Attributes:
        norms: a head is one norm more than there are convolutions.
        weights: of the convolutions.
        biases: of the convolutions, or nothing where none has one.
        masks: the layers' dropout masks, false or true, or nothing: ``(N, k, *spatial)``, or ``(N, k, 1, …)`` where
            whole channels are dropped.
        mask_scales: what remains is multiplied by this, for each layer.
        sources: first and last channel (exclusive) that each norm reads, numbered through: the features, then the
            outputs of each bottleneck.
        per_layer: convolutions of each layer: 1 without and 2 with a bottleneck.
        pool: window and stride of the transition's average pool, 1 if it has none; 0: there is no transition.
        keep: what stays for backward: "bottleneck" (features and bottleneck outputs), "features", or "inputs" (only
            the input, where a transition follows).
        group: names the processes that share their statistics; "" if none do.
    """

    norms: Sequence[Norm]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    masks: Sequence[Tensor]
    mask_scales: Sequence[float]
    sources: Sequence[tuple[int, int]]
    per_layer: int
    pool: int
    keep: str
    group: str

    @cached_property
    def layers(self) -> range:
        """The index of each layer's first norm and convolution."""
        return range(0, len(self.weights) - (self.pool > 0), self.per_layer)

    @cached_property
    def growth(self) -> int:
        """The channels that all layers add."""
        return sum([self.weights[i + self.per_layer - 1].shape[0] for i in self.layers])

    @cached_property
    def bottleneck_channels(self) -> int:
        """The channels of all bottleneck outputs."""
        return sum([self.weights[i].shape[0] for i in self.layers]) if self.per_layer == 2 else 0

    @cached_property
    def widest_bottleneck(self) -> int:
        """The most channels of a bottleneck output."""
        return max([self.weights[i].shape[0] for i in self.layers]) if self.per_layer == 2 else 0

    @cached_property
    def head(self) -> bool:
        """Whether it ends with one."""
        return len(self.norms) > len(self.weights)

    @cached_property
    def kept_bottlenecks(self) -> list[int]:
        """Of `layers`, those whose bottleneck outputs stay for backward.

        Not those that are cheap to make again: the first ones of a block of volumes, whose windows have 27 pixels.
        """
        if self.keep != "bottleneck" or self.per_layer == 1:
            return []
        sizes = [weight.numel() for weight in self.weights]
        return [i for i in self.layers if not is_cheap_again(sizes[i], sizes[i + 1])]

    @cached_property
    def keeps_features(self) -> bool:
        return keeps_features(self.keep, self.pool)

    @cached_property
    def uses_batch(self) -> bool:
        """Whether any norm uses the batch's statistics."""
        return None in [norm.constants for norm in self.norms]

    @cached_property
    def readers(self) -> list[Reader]:
        """The norm–relu–convolutions of all layers, for a backend that runs several in one call."""
        count = len(self.layers) * self.per_layer
        parts = zip(self.weights[:count], self.norms, self.sources, strict=False)
        return [Reader(weight, *norm, start) for weight, norm, (start, _) in parts]

    @cached_property
    def end(self) -> Reader | None:
        """That of the transition; or the head's, with an empty weight; None: nothing follows the layers."""
        if not (self.pool or self.head):
            return None
        norm = self.norms[-1]
        weight = self.weights[-1] if self.pool else self.weights[0].new_empty((0, len(norm.weight), 1, 1))
        return Reader(weight, *norm, 0)

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """See `Layers.memo`."""
        return {}

    @cached_property
    def _has_plain_layers(self) -> bool:
        """Whether there is nothing else in the layers than norms and convolutions, and no other process to ask."""
        if self.biases or self.masks or self.group or not self.layers:
            return False
        windows = {self.weights[i].shape[2:] for i in self.layers}
        # A 1×1 convolution takes all values; of two larger ones, the second might be done twice.
        return self.per_layer == 1 or all(prod(window) == 1 for window in windows)

    def runs_layers(self, features: Tensor) -> bool:
        """Whether several layers run in one call."""
        return self._has_plain_layers and ops.runs_layers(features, self.readers, self.memo)

    @cached_property
    def _evaluated(self) -> list[Reader]:
        """All readers; none where something else than these is to be computed, or statistics are the batch's."""
        plain = self._has_plain_layers and not self.uses_batch
        if not plain or (self.end is not None and prod(self.end.weight.shape[2:]) > 1):
            return []
        return [*self.readers, *([] if self.end is None else [self.end])]

    def evaluates(self, x: Tensor) -> bool:
        """Whether all of it runs in one call in evaluation, on features that begin with `x`."""
        return bool(self._evaluated) and ops.evaluates(x, self._evaluated, self.memo)
