"""What a batch norm is to the engine: statistics to use, and a scale and a shift per channel made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from efficient_densenet import ops
from efficient_densenet.execution.synchronise import all_sums, share_statistics
from efficient_densenet.ops.reference import Affine, Statistics, statistics_dtype


class Norm(NamedTuple):
    """What one batch norm does at this call.

    `constants` are the statistics to use instead of the batch's own; None where those are used.
    """

    weight: Tensor
    bias: Tensor
    constants: Statistics | None
    eps: float

    @property
    def uses_batch(self) -> bool:
        return self.constants is None


class Folded(NamedTuple):
    """The statistics of some channels, and norms that read slices of these channels, folded.

    Small tensors, kept for backward: nothing in them has to be found twice.
    """

    statistics: Tensor  # (2, channels): means and variances
    total: Tensor  # the number of values that they are of, over all processes that share them
    vectors: Tensor  # (3, ΣC) of all norms one behind the other: inverse, scale and shift


class Norms:
    """Some norms, each of which reads a slice of the same channels, of activations like `x`."""

    def __init__(self, x: Tensor, norms: Sequence[Norm], sources: Sequence[slice], folded: Folded, group: str) -> None:
        self.run, self.rows = ops.backend(x), rows(x)
        self.norms, self.sources, self.group, self.total = norms, sources, group, folded.total
        self.means, self.variances = folded.statistics.unbind()
        self.vectors = folded.vectors.split([source.stop - source.start for source in sources], 1)
        self.through: Tensor | None = None
        # By their first channel, where those channels end whose statistics a norm uses.
        self.used: dict[int, int] = {}
        for norm, source in zip(norms, sources, strict=True):
            if norm.uses_batch:
                self.used[source.start] = max(source.stop, self.used.get(source.start, 0))

    def place(self, channels: slice) -> Statistics:
        """Where the statistics of these channels are."""
        return Statistics(_part(self.means, channels), _part(self.variances, channels))

    def share(self, channels: slice) -> None:
        """Merge the statistics of these channels with those of the other processes."""
        if self.group:
            share_statistics(self.place(channels), self.rows, self.total, self.group)

    def fold(self, i: int) -> Affine:
        """Norm `i` for the statistics that there are by now."""
        norm, affine = self.norms[i], self[i]
        statistics = norm.constants or Statistics(affine.mean, _part(self.variances, self.sources[i]))
        self.run.fold_norm(statistics, norm.weight, norm.bias, norm.eps, affine)
        return affine

    def __getitem__(self, i: int) -> Affine:
        """Norm `i`, folded before."""
        constants, inverse_scale_shift = self.norms[i].constants, self.vectors[i].unbind()
        if constants is None:
            return Affine(_part(self.means, self.sources[i]), *inverse_scale_shift)
        return Affine(constants.mean.to(self.means.dtype), *inverse_scale_shift)

    def begin_backward(self) -> None:
        """Make room to add up what flows through the batch statistics, if anything does: ``(2, channels)``."""
        if self.used:
            self.through = self.means.new_zeros((2, len(self.means)))

    def through_of(self, i: int) -> Tensor | None:
        """Where norm `i` adds what flows through its statistics, if it uses the batch's."""
        if self.through is None or not self.norms[i].uses_batch:
            return None
        return _part(self.through, self.sources[i])

    def finish(self, grad: Tensor, x: Tensor, channels: slice, out: Tensor) -> None:
        """`grad` of these channels of `x` less what flows through their statistics, once all their readers are in."""
        used = max(self.used.get(0, 0), self.used.get(channels.start, 0))
        if self.through is None or used < channels.stop:
            out.copy_(grad)
        else:
            through = all_sums(_part(self.through, channels), self.group)
            self.run.finish(grad, x, _part(self.means, channels), through, self.total, out)

    def parameter_gradients(self, i: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """In the types of the parameters."""
        norm = self.norms[i]
        return weight.to(norm.weight.dtype), bias.to(norm.bias.dtype)


def _part(x: Tensor, channels: slice) -> Tensor:
    """``x[..., channels]``, which takes twice as long to say."""
    return x.narrow(-1, channels.start, channels.stop - channels.start)


def blank(x: Tensor, channels: int, read: int) -> Folded:
    """Room for the statistics of `channels` channels and for norms that read `read`, on ``x: (N, *spatial, C)``."""
    dtype = statistics_dtype(x.dtype)
    return Folded(
        x.new_zeros((2, channels), dtype=dtype),
        x.new_full((), rows(x), dtype=dtype),
        x.new_empty((3, read), dtype=dtype),
    )


def rows(x: Tensor) -> int:
    """The values of each channel, in this process."""
    return x.numel() // x.shape[-1]
