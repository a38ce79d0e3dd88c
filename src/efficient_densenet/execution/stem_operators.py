"""`stem` as a node of autograd, and as operators of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.execution import stem as engine
from efficient_densenet.execution.buffers import empty_activation
from efficient_densenet.execution.norms import Folded, folded_fake, norms_of
from efficient_densenet.execution.operators import Given, Passes
from efficient_densenet.execution.plan import Entry
from efficient_densenet.execution.stem import Kept, Stem
from efficient_densenet.execution.stem_pools import BlurredPool, MaxPool


class StemArguments(NamedTuple):
    """A `Stem` as the operators get it, tensors first; names and types are their schema.

    Attributes:
        norm_weights, norm_biases, constants, uses_batch, eps: as in `StageArguments`.
        weights, biases, group, keeps_last: as in `Stem`.
        stride, padding, dilation, groups: as in `Entry`.
        filters, blur_padding, blur_mode, blur_stride: as in `Blur`; no filter: there is none.
    """

    norm_weights: Sequence[Tensor]
    norm_biases: Sequence[Tensor]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    constants: Sequence[Tensor]
    filters: Sequence[Tensor]
    uses_batch: Sequence[bool]
    eps: Sequence[float]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    blur_padding: Sequence[int]
    blur_mode: str
    blur_stride: Sequence[int]
    group: str
    keeps_last: bool

    def engine(self) -> Stem:
        norms = norms_of(self.norm_weights, self.norm_biases, self.constants, self.uses_batch, self.eps)
        entry = Entry(tuple(self.stride), tuple(self.padding), tuple(self.dilation), self.groups)
        pool: MaxPool | BlurredPool = MaxPool()
        if self.filters:
            pool = BlurredPool(self.filters[0], self.blur_padding, self.blur_mode, self.blur_stride)
        return Stem(norms, self.weights, self.biases, entry, pool, self.group, self.keeps_last)


class _StemPasses(Passes):
    name = "stem"
    arguments = StemArguments

    def first_normed(self, x: Tensor, arguments: StemArguments) -> torch.Size:
        images, *size, _ = arguments.engine().like(x).shape
        return torch.Size((images, len(arguments.norm_weights[0]), *size))

    def forward(self, x: Tensor, arguments: StemArguments) -> list[Tensor]:
        output, (folded, made) = engine.forward(x, arguments.engine())
        return [output, *folded, *made]

    def saves(self, x: Tensor, made: Sequence[Tensor], arguments: StemArguments) -> tuple[list[Tensor], list[Tensor]]:
        return [x], [*made[1:]]

    def backward(
        self, given: Given, need_x: bool, types: Sequence[torch.dtype | None], arguments: StemArguments
    ) -> list[Tensor]:
        folded = Folded(*(given.packed.pop(0) for _ in Folded._fields))
        kept = Kept(folded, given.packed)
        (x,) = given.x
        return engine.backward(given.grad_output, x, arguments.engine(), kept, need_x, types).in_sequence()

    def forward_fake(self, x: Tensor, arguments: StemArguments) -> list[Tensor]:
        stem = arguments.engine()
        size, channels = stem.like(x).shape[1:-1], [norm.weight.shape[0] for norm in stem.norms]
        made = [empty_activation(x, channels[i], size).movedim(1, -1) for i in stem.kept]
        output = empty_activation(x, channels[-1], stem.pool.size(size))
        return [output, *folded_fake(x, sum(channels), sum(channels)), *made]

    def grad_x_fake(self, given: Given, need_x: bool, arguments: StemArguments) -> Tensor:
        (x,) = given.x
        return empty_activation(x, x.shape[1], x.shape[2:]) if need_x else x.new_empty(0)

    def forward_flops(self, x: Tensor, arguments: StemArguments) -> int:
        return sum(_flops(x, arguments))

    def backward_flops(self, given: Given, need_x: bool, need_weights: Sequence[bool], arguments: StemArguments) -> int:
        counts = _flops(given.x[0], arguments)
        needed = sum(count for count, need in zip(counts, need_weights, strict=True) if need)
        # The gradient of each input but the image's, if nobody wants that; and the last convolution once more.
        again = counts[len(arguments.engine().kept) :]
        return needed + sum(counts[0 if need_x else 1 :]) + sum(again)


def _flops(x: Tensor, arguments: StemArguments) -> list[int]:
    """Two for each multiplication of each convolution."""
    pixels = prod(arguments.engine().like(x).shape[:-1])
    return [2 * pixels * weight.numel() for weight in arguments.weights]


run_stem = _StemPasses()
