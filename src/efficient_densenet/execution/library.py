"""`stage` as a node of autograd, and as operators of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import NamedTuple

from torch import Tensor

from efficient_densenet.execution import stage as engine
from efficient_densenet.execution.buffers import empty_activation
from efficient_densenet.execution.norms import Folded
from efficient_densenet.execution.operators import Given, Passes, folded_fake, norms_of
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
    mask_scales: Sequence[float]
    per_layer: int
    pool: int
    keep: str
    group: str

    def stage(self) -> Stage:
        norms = norms_of(self.norm_weights, self.norm_biases, self.constants, self.uses_batch, self.eps)
        sources = list(zip(self.sources[::2], self.sources[1::2], strict=True))
        return Stage(norms, self.weights, self.biases, self.masks, self.mask_scales, sources, *self[-4:])


def _pack(output: Tensor, kept: Kept) -> list[Tensor]:
    """Output first (the features themselves, where nothing follows them), then what is kept."""
    folded, bottlenecks, features = kept
    extra = [] if features is None or _same(features, output) else [features]
    return [output, *folded, *bottlenecks, *extra]


def _unpack(packed: list[Tensor], stage: Stage) -> Kept:
    """What is kept, taken out of `packed`: all but the output, or, where that are the features, with it at the end."""
    folded = Folded(*(packed.pop(0) for _ in Folded._fields))
    bottlenecks = [packed.pop(0) for _ in stage.kept_bottlenecks]
    features = packed.pop() if packed else None
    if features is not None and not (stage.pool or stage.head):
        features = features.movedim(1, -1)
    return Kept(folded, bottlenecks, features)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


class _StagePasses(Passes):
    name = "stage"
    arguments = StageArguments

    def forward(self, x: Tensor, arguments: StageArguments) -> list[Tensor]:
        return _pack(*engine.forward(x, arguments.stage()))

    def saves(self, x: Tensor, made: Sequence[Tensor], arguments: StageArguments) -> tuple[list[Tensor], list[Tensor]]:
        stage = arguments.stage()
        # The features begin with a copy of x. The output of a transition or a head is not needed.
        return [] if stage.keeps_features else [x], [*made[1:]] if stage.pool or stage.head else [*made[1:], made[0]]

    def backward(
        self, given: Given, need_x: bool, need_weights: Sequence[bool], arguments: StageArguments
    ) -> list[Tensor]:
        stage = arguments.stage()
        found = engine.backward(given.grad_output, given.x, stage, _unpack(given.packed, stage), need_weights)
        of_norms = chain.from_iterable(zip(*found.norms, strict=True))
        return [found.x, *of_norms, *[w for w in found.weights if w is not None], *found.biases]

    def forward_fake(self, x: Tensor, arguments: StageArguments) -> list[Tensor]:
        stage = arguments.stage()
        width = x.shape[1] + stage.growth

        def activation(channels: int, pool: int = 1) -> Tensor:
            return empty_activation(x, channels, [n // pool for n in x.shape[2:]])

        features = activation(width)
        output = x.new_empty(x.shape[0], width) if stage.head else features
        if stage.pool:
            output = activation(stage.weights[-1].shape[0], stage.pool)
        read = sum(norm.weight.shape[0] for norm in stage.norms)
        folded = folded_fake(x, width + stage.bottlenecks, read)
        bottlenecks = [activation(stage.weights[i].shape[0]).movedim(1, -1) for i in stage.kept_bottlenecks]
        return _pack(output, Kept(folded, bottlenecks, features.movedim(1, -1) if stage.keeps_features else None))

    def grad_x_fake(self, given: Given, need_x: bool, arguments: StageArguments) -> Tensor:
        stage = arguments.stage()
        if given.x:
            x = given.x[0]
            return empty_activation(x, x.shape[1], x.shape[2:])
        features = _unpack([*given.packed], stage).features
        assert features is not None
        return empty_activation(features, features.shape[-1] - stage.growth, features.shape[1:-1])

    def forward_flops(self, x: Tensor, arguments: StageArguments) -> int:
        weights = sum(weight.numel() for weight in arguments.weights)
        return 2 * x.shape[0] * prod(x.shape[2:]) * weights

    def backward_flops(
        self, given: Given, need_x: bool, need_weights: Sequence[bool], arguments: StageArguments
    ) -> int:
        stage = arguments.stage()
        counts = [weight.numel() for weight in stage.weights]
        needed = sum(count for count, need in zip(counts, need_weights, strict=True) if need)
        if stage.keeps_features:
            features = _unpack([*given.packed], stage).features
            assert features is not None
            images, *pixels = features.shape[:-1]
            made = stage.layers if stage.per_layer == 2 else ()
            again = sum(counts[i] for i in made if i not in stage.kept_bottlenecks)
        else:
            images, _, *pixels = given.x[0].shape
            again = sum(counts[: len(stage.layers) * stage.per_layer])
        return 2 * images * prod(pixels) * (sum(counts) + needed + again)


run_stage = _StagePasses()
stage_forward, stage_backward = run_stage.forward_operator, run_stage.backward_operator
