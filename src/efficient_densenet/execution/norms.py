"""What a batch norm is to the engine: statistics to use, and a scale and a shift per channel made of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet import ops
from efficient_densenet.execution.synchronise import all_sums, share_statistics
from efficient_densenet.ops.protocol import Affine, Statistics, statistics_dtype


class Norm(NamedTuple):
    """What one batch norm does at this call.

    `constants` are the statistics to use instead of the batch's own; None where those are used.
    """

    weight: Tensor
    bias: Tensor
    constants: Statistics | None
    eps: float


class Folded(NamedTuple):
    """The statistics of some channels, and the folded norms that read slices of these channels.

    Small tensors, kept for backward: nothing in them has to be found twice.
    """

    statistics: Tensor  # (2, channels): means and variances
    total: Tensor  # the number of values that they are of, over all processes that share them
    vectors: Tensor  # (3, ΣC) of all norms in sequence: inverse, scale and shift


class Norms:
    """Some norms, each of which reads a slice of the same channels, of activations like `x`."""

    def __init__(
        self, x: Tensor, norms: Sequence[Norm], sources: Sequence[tuple[int, int]], folded: Folded, group: str
    ) -> None:
        self.run = ops.backend(x)
        self.rows = x.numel() // x.shape[-1]
        self.norms, self.sources, self.group, self.total = norms, sources, group, folded.total
        self.folded = folded
        self.read = [0, *accumulate(stop - start for start, stop in sources)]  # channels, by the norms before each
        self.means, self.variances = folded.statistics.unbind()
        self.through: Tensor | None = None
        self.affines: dict[int, Affine] = {}
        # By their first channel, where those channels end whose statistics a norm uses.
        self.used: dict[int, int] = {}
        for norm, (start, stop) in zip(norms, sources, strict=True):
            if norm.constants is None:
                self.used[start] = max(stop, self.used.get(start, 0))

    def affine(self, i: int) -> Affine:
        """Norm `i` as it was folded, or to be folded."""
        if i not in self.affines:
            i = range(len(self.norms))[i]
            first, end = self.read[i : i + 2]
            inverse, scale, shift = self.folded.vectors[:, first:end].unbind()
            constants = self.norms[i].constants
            mean = self.statistics(*self.sources[i]).mean if constants is None else constants.mean
            self.affines[i] = Affine(mean.to(self.means.dtype).contiguous(), inverse, scale, shift)
        return self.affines[i]

    def statistics(self, start: int, stop: int) -> Statistics:
        """Those of these channels: to be read, or to be overwritten."""
        count = stop - start
        return Statistics(self.means.narrow(0, start, count), self.variances.narrow(0, start, count))

    def measure(self, x: Tensor, start: int, stop: int) -> None:
        """Find the statistics of these channels, whose values `x` holds."""
        self.run.statistics(x, self.statistics(start, stop))
        self.share(start, stop)

    def share(self, start: int, stop: int) -> None:
        """Merge the statistics of these channels with those of the other processes, if they share them."""
        if self.group:
            share_statistics(self.statistics(start, stop), self.rows, self.total, self.group)

    def fold(self, i: int) -> Affine:
        """Fold norm `i` with its constants, or with the statistics that were found."""
        norm, affine = self.norms[i], self.affine(i)
        statistics = norm.constants
        if statistics is None:
            start, stop = self.sources[i]
            statistics = Statistics(affine.mean, self.variances.narrow(0, start, stop - start))
        self.run.fold_norm(statistics, norm.weight, norm.bias, norm.eps, affine)
        return affine

    def begin_backward(self) -> None:
        """Begin the sums of what flows through the batch statistics, if anything does: ``(2, channels)``."""
        if self.used:
            self.through = self.means.new_zeros((2, len(self.means)))

    def through_of(self, i: int) -> Tensor | None:
        """Where norm `i` adds what flows through its statistics, if it uses the batch's."""
        if self.through is None or self.norms[i].constants is not None:
            return None
        start, stop = self.sources[i]
        return self.through.narrow(1, start, stop - start)

    @property
    def used_features(self) -> int:
        """Features before this one have statistics that norms use."""
        return self.used.get(0, 0)

    def finish(self, grad: Tensor, x: Tensor, start: int, stop: int, out: Tensor) -> None:
        """`grad` of these channels of `x` less what flows through their statistics, once all their readers are in."""
        through = self.all_through(start, stop)
        if through is not None:
            self.run.finish(grad, x, self.means.narrow(0, start, stop - start), through, self.total, out)
        elif out is not grad:
            out.copy_(grad)

    def all_through(self, start: int, stop: int) -> Tensor | None:
        """What flows through the statistics of these channels in all processes, if anything does."""
        used = max(self.used_features, self.used.get(start, 0))
        if self.through is None or used < stop:
            return None
        return all_sums(self.through.narrow(1, start, stop - start), self.group)

    def parameter_gradients(self, i: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """In the types of the parameters."""
        norm, given = self.norms[i], weight.dtype
        if norm.weight.dtype == norm.bias.dtype == given:  # to ask PyTorch would take longer
            return weight, bias
        return weight.to(norm.weight.dtype), bias.to(norm.bias.dtype)


class NormSums:
    """What is gathered for norm `i` piece by piece, in the order of the pieces and in double precision.

    Args:
        single: whether there is one piece, whose gradients need no sum.

    Attributes:
        through: where an operation on a piece adds what flows through the batch statistics, if the norm uses them.
    """

    def __init__(self, norms: Norms, i: int, single: bool = False) -> None:
        self.norms, self.i = norms, i
        self.through = norms.through_of(i)
        self.total: Tensor | None = None
        if single:
            return
        start, stop = norms.sources[i]
        double = torch.float32 if norms.means.device.type == "mps" else torch.float64
        self.total = norms.means.new_zeros((4, stop - start), dtype=double)
        if self.through is not None:
            self.through = norms.means.new_zeros((2, stop - start))

    def add(self, weight: Tensor, bias: Tensor) -> None:
        """Take in the gradients of the norm's weight and bias for a piece, and what it has added to `through`."""
        if self.total is None:
            self.of_piece = weight, bias
            return
        self.total[0] += weight
        self.total[1] += bias
        if self.through is not None:
            self.total[2:] += self.through
            self.through.zero_()

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Those of weight and bias, once all pieces are in; and `norms` gets what flows through the statistics."""
        if self.total is None:
            return self.norms.parameter_gradients(self.i, *self.of_piece)
        through = self.norms.through_of(self.i)
        if through is not None:
            through.copy_(self.total[2:])
        return self.norms.parameter_gradients(self.i, self.total[0].clone(), self.total[1].clone())


def norms_of(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    constants: Sequence[Tensor],
    uses_batch: Sequence[bool],
    eps: Sequence[float],
) -> list[Norm]:
    """The norms that arguments describe, with the constants of those that use them in sequence."""
    left = iter(constants)
    return [
        Norm(weight, bias, None if batch else Statistics(next(left), next(left)), e)
        for weight, bias, batch, e in zip(weights, biases, uses_batch, eps, strict=True)
    ]


def empty_folded(x: Tensor, channels: int, read: int) -> Folded:
    """For the statistics of `channels` channels and for norms that read `read`, on ``x: (N, *spatial, C)``."""
    dtype = statistics_dtype(x.dtype)
    return Folded(
        x.new_zeros((2, channels), dtype=dtype),
        x.new_full((), x.numel() // x.shape[-1], dtype=dtype),
        x.new_empty((3, read), dtype=dtype),
    )


def folded_fake(x: Tensor, channels: int, read: int) -> Folded:
    """Tensors like those of `empty_folded`, without values."""
    return Folded(*(x.new_empty(shape, dtype=statistics_dtype(x.dtype)) for shape in ((2, channels), (), (3, read))))
