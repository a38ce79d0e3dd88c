"""How the running averages of batch norms follow a batch: those of a whole block at once.

On a GPU, and for small networks anywhere, an operation for each norm takes longer to start than to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.execution.plan import Norm


class Moving(NamedTuple):
    """The running averages of a norm that follow the statistics of the channels that it reads."""

    norm: Norm
    mean: Tensor
    variance: Tensor
    tracked: Tensor | None
    momentum: float | None


class RunningAverages:
    """Those of some norms, which may be moved at many calls.

    They move by the mean and the unbiased variance of the batch, once per call in training.
    """

    def __init__(self, moving: Sequence[Moving]) -> None:
        # A norm that reads in several places moves once for each, one after the other.
        moves: dict[int, int] = {}
        groups: dict[tuple, list[Moving]] = {}
        for one in moving:
            number = moves.get(one.norm.part, 0)
            groups.setdefault((number, one.momentum, one.mean.dtype), []).append(one)
            moves[one.norm.part] = number + 1
        self._groups = [_Group(some) for some in groups.values()]

    def move(self, statistics: Tensor, count: Tensor) -> None:
        """By the statistics ``(2, channels)`` of a batch, of so many values for each channel."""
        if self._groups:
            with torch.no_grad():
                unbiased = count / (count - 1)
                for group in self._groups:
                    group.move(statistics, unbiased)


class _Group:
    """Different norms with one momentum and averages of one type."""

    def __init__(self, moving: Sequence[Moving]) -> None:
        self.moving, self.momentum = moving, moving[0].momentum
        self.counts = [one.tracked for one in moving if one.tracked is not None]
        self.averages = [*(one.mean for one in moving), *(one.variance for one in moving)]
        self.ranges = [*chain.from_iterable(_own_order(one.norm) for one in moving)]
        self.sizes = [one.norm.source[1] - one.norm.source[0] for one in moving]
        self.channels: Tensor | None = None  # all that are read, at the second call
        self.called = False

    def move(self, statistics: Tensor, unbiased: Tensor) -> None:
        read, dtype = self._read(statistics), self.averages[0].dtype
        read[1].mul_(unbiased)
        if self.counts:
            torch._foreach_add_(self.counts, 1)
        values = read.to(dtype).view(-1).split_with_sizes([*self.sizes, *self.sizes])
        if self.momentum is not None:
            torch._foreach_lerp_(self.averages, values, self.momentum)
            return
        for one, mean, variance in zip(self.moving, values, values[len(self.moving) :], strict=False):
            assert one.tracked is not None
            weight = 1.0 / one.tracked.to(dtype)  # a cumulative average
            one.mean.lerp_(mean, weight)
            one.variance.lerp_(variance, weight)

    def _read(self, statistics: Tensor) -> Tensor:
        """Those of the channels that each norm reads, norm by norm."""
        # Their numbers are sent to a GPU if it is worth it. A graph that is being captured does without them: it may
        # outlive this object.
        if not self.called or (statistics.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.called = True
            return torch.cat([statistics[:, start:stop] for start, stop in self.ranges], 1)
        if self.channels is None:
            numbers = [*chain.from_iterable(range(*ends) for ends in self.ranges)]
            self.channels = torch.tensor(numbers, dtype=torch.int32, device=statistics.device)
        return statistics.index_select(1, self.channels)


def _own_order(norm: Norm) -> list[tuple[int, int]]:
    """First and last channel (exclusive) of the pieces that it reads, in the order of its own channels."""
    start, stop = norm.source
    if not norm.order:
        return [(start, stop)]
    pieces = []
    for own_start, count in norm.order:
        pieces.append((own_start, (start, start + count)))
        start += count
    return [ends for _, ends in sorted(pieces)]
