"""`stage` as a node of autograd, and as operators of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.execution import stage as engine
from efficient_densenet.execution.block import keeps_features
from efficient_densenet.execution.buffers import copied_when_written, empty_activation, take_rows
from efficient_densenet.execution.norms import Folded, folded_fake, norms_of
from efficient_densenet.execution.operators import Given, Passes
from efficient_densenet.execution.stage import Kept, Stage


class StageArguments(NamedTuple):
    """A `Stage` as the operators get it, tensors first; names and types are their schema.

    Attributes:
        norm_weights, norm_biases: of each norm.
        weights, biases, masks: as in `Stage`.
        constants: running mean and variance of each norm that uses them, in sequence.
        uses_batch: for each norm whether it uses the batch's statistics instead.
        eps: of each norm.
        sources: first and last channel (exclusive) that each norm reads, in sequence.
        contiguous: whether features that are handed out are so, and not channels-last.
        mask_scales, per_layer, pool, keep, group: as in `Stage`.
    """

    norm_weights: Sequence[Tensor]
    norm_biases: Sequence[Tensor]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    masks: Sequence[Tensor]
    constants: Sequence[Tensor]
    uses_batch: Sequence[bool]
    eps: Sequence[float]
    sources: Sequence[int]
    contiguous: bool
    mask_scales: Sequence[float]
    per_layer: int
    pool: int
    keep: str
    group: str

    def engine(self) -> Stage:
        norms = norms_of(self.norm_weights, self.norm_biases, self.constants, self.uses_batch, self.eps)
        sources = list(zip(self.sources[::2], self.sources[1::2], strict=True))
        return Stage(norms, self.weights, self.biases, self.masks, self.mask_scales, sources, *self[-4:])


def _pack(output: Tensor, folded: Folded, bottlenecks: list[Tensor], features: Tensor | None) -> list[Tensor]:
    """Output first, then what is kept, the features ``(N, C, *spatial)`` at the end."""
    return [output, *folded, *bottlenecks, *([] if features is None else [features])]


def _unpack(packed: list[Tensor], stage: Stage) -> Kept:
    """What is kept, taken out of `packed`: all but the output."""
    folded = Folded(*(packed.pop(0) for _ in Folded._fields))
    bottlenecks = [packed.pop(0) for _ in stage.kept_bottlenecks]
    return Kept(folded, bottlenecks, take_rows(packed) if packed else None)


class _StagePasses(Passes):
    name = "stage"
    arguments = StageArguments

    def first_normed(self, x: Tensor, arguments: StageArguments) -> torch.Size:
        return x.shape

    def forward(self, x: Tensor, arguments: StageArguments) -> list[Tensor]:
        stage = arguments.engine()
        output, (folded, bottlenecks, features) = engine.forward(x, stage)
        if stage.pool or stage.head:
            return _pack(output, folded, bottlenecks, None if features is None else features.movedim(-1, 1))
        # The features are handed out, and whoever has them may write into them.
        if arguments.contiguous:
            output = output.clone(memory_format=torch.contiguous_format)
        return _pack(output, folded, bottlenecks, copied_when_written(output))

    def saves(self, x: Tensor, made: Sequence[Tensor], arguments: StageArguments) -> tuple[list[Tensor], list[Tensor]]:
        # The features begin with a copy of x. The output is not needed.
        return [] if keeps_features(arguments.keep, arguments.pool) else [x], [*made[1:]]

    def backward(
        self, given: Given, need_x: bool, types: Sequence[torch.dtype | None], arguments: StageArguments
    ) -> list[Tensor]:
        stage = arguments.engine()
        kept = _unpack(given.packed, stage)
        return engine.backward(given.grad_output, given.x, stage, kept, types).in_sequence()

    def forward_fake(self, x: Tensor, arguments: StageArguments) -> list[Tensor]:
        stage = arguments.engine()
        width = x.shape[1] + stage.growth

        def activation(channels: int, pool: int = 1) -> Tensor:
            return empty_activation(x, channels, [n // pool for n in x.shape[2:]])

        output = features = activation(width)
        if stage.head:
            output = x.new_empty(x.shape[0], width)
        elif stage.pool:
            output = activation(stage.weights[-1].shape[0], stage.pool)
        elif arguments.contiguous:
            output = features = x.new_empty(features.shape)
        read = sum(norm.weight.shape[0] for norm in stage.norms)
        folded = folded_fake(x, width + stage.bottleneck_channels, read)
        bottlenecks = [activation(stage.weights[i].shape[0]).movedim(1, -1) for i in stage.kept_bottlenecks]
        return _pack(output, folded, bottlenecks, torch.empty_like(features) if stage.keeps_features else None)

    def grad_x_fake(self, given: Given, need_x: bool, arguments: StageArguments) -> Tensor:
        if given.x:
            (x,) = given.x
            return empty_activation(x, x.shape[1], x.shape[2:])
        features = given.packed[-1]
        return empty_activation(features, features.shape[1] - arguments.engine().growth, features.shape[2:])

    def forward_flops(self, x: Tensor, arguments: StageArguments) -> int:
        weights = sum(weight.numel() for weight in arguments.weights)
        return 2 * x.shape[0] * prod(x.shape[2:]) * weights

    def backward_flops(
        self, given: Given, need_x: bool, need_weights: Sequence[bool], arguments: StageArguments
    ) -> int:
        stage = arguments.engine()
        counts = [weight.numel() for weight in stage.weights]
        needed = sum(count for count, need in zip(counts, need_weights, strict=True) if need)
        if stage.keeps_features:
            images, _, *pixels = given.packed[-1].shape
            made = stage.layers if stage.per_layer == 2 else ()
            again = sum(counts[i] for i in made if i not in stage.kept_bottlenecks)
        else:
            images, _, *pixels = given.x[0].shape
            again = sum(counts[: len(stage.layers) * stage.per_layer])
        return 2 * images * prod(pixels) * (sum(counts) + needed + again)


run_stage = _StagePasses()
