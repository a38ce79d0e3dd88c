"""One dense block, and the transition behind it if there is one, on one buffer: forward and backward, on tensors alone.

The mathematics is derived in docs/algorithm.md. In short, with ``X: (N, *spatial, C_T)`` the block's features:

- layer l reads the prefix ``X[..., :C_l]`` and writes its channels behind it; nothing is concatenated;
- mean and variance belong to the channel: they are computed once, when it is written, and every norm that reads it
  turns them into its own scale ``a = γ/√(σ² + eps)`` and shift ``b = β − μ·a``;
- in backward one buffer ``D`` collects ``Σ_l a_l·g_l`` over the readers of each channel, and what flows through the
  batch statistics, ``A + B·(x − μ)`` with ``A = Σ_l a_l·Σg_l / M`` and ``B = Σ_l a_l·inv_l²·Σg_l·(x − μ) / M``, is
  subtracted once per channel, when the layer that made it takes its gradient out.

Kept for backward: see `Stage.keep`. Nothing here knows modules, autograd or policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from efficient_densenet import ops
from efficient_densenet.execution.buffers import beside, room
from efficient_densenet.execution.norms import Affine, Norm, ThroughStatistics, blank, rows
from efficient_densenet.execution.synchronise import all_statistics
from efficient_densenet.ops.reference import Statistics, statistics_dtype


@dataclass(frozen=True)
class Stage:
    """A block's norms and convolutions in their order, layer by layer, those of the transition last.

    `per_layer` is 1 without and 2 with a bottleneck; `pool` is the transition's pool, 0 where there is no transition;
    `masks` are the layers' dropout masks, false or true, with their scale, or nothing: ``(N, k, *spatial)``, or
    ``(N, k, 1, …)`` where whole channels are dropped; `keep` is
    what stays for backward: "bottleneck" (features and bottleneck outputs), "features", or "inputs" (only the input);
    `group` names the processes that share their statistics, "" if none do.
    """

    norms: Sequence[Norm]
    weights: Sequence[Tensor]
    masks: Sequence[Tensor]
    mask_scale: float
    per_layer: int
    pool: int
    keep: str
    group: str

    @property
    def layers(self) -> range:
        """The index of each layer's first norm and convolution."""
        return range(0, len(self.weights) - (self.pool > 0), self.per_layer)

    @property
    def growth(self) -> int:
        """The channels that all layers add."""
        return sum(self.weights[i + self.per_layer - 1].shape[0] for i in self.layers)

    @property
    def uses_batch(self) -> bool:
        return any(norm.uses_batch for norm in self.norms)


class BatchStatistics(NamedTuple):
    """Mean and variance ``(C_T,)`` of the features, the total M of values per channel (over all processes that share
    statistics), and mean and variance of each bottleneck output."""

    mean: Tensor
    variance: Tensor
    total: Tensor
    middles: list[Statistics]


class Kept(NamedTuple):
    """What the backward pass needs. The statistics are small; `Stage.keep` decides on the rest."""

    statistics: BatchStatistics
    middles: list[Tensor]  # the bottleneck outputs, (N, *spatial, bn_size·k)
    features: Tensor | None  # X


def forward(x: Tensor, stage: Stage) -> tuple[Tensor, Kept]:
    """Run the stage on ``x: (N, C_0, *spatial)``, in any memory layout.

    Returns:
        The output, channels-last in memory and channels first in shape: X itself, or what the transition makes of it;
        and what backward needs.
    """
    output = _with_input(x, stage)
    features = output.movedim(1, -1)
    (mean, variance), count = blank(features), features.new_full((), rows(features), dtype=statistics_dtype(x.dtype))
    statistics = BatchStatistics(mean, variance, count, [])
    middles = _run_layers(features, stage, statistics, measure=True)
    if stage.pool:
        affine, weight = stage.norms[-1].affine((mean, variance)), stage.weights[-1]
        output = room(x, weight.shape[0], [n // stage.pool for n in x.shape[2:]])
        out = output.movedim(1, -1)
        ops.backend(x).norm_relu_conv(features, affine.scale, affine.shift, weight, out, stage.pool)
    keeps_features = stage.keep != "inputs" or not stage.pool
    return output, Kept(statistics, middles, features if keeps_features else None)


def _with_input(x: Tensor, stage: Stage) -> Tensor:
    """Room for the features ``(N, C_T, *spatial)``, which begin with `x`; `x` itself where that is all of them."""
    if not stage.growth:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    features = room(x, x.shape[1] + stage.growth, x.shape[2:])
    features[:, : x.shape[1]].copy_(x)
    return features


def _run_layers(features: Tensor, stage: Stage, statistics: BatchStatistics, measure: bool) -> list[Tensor]:
    """Fill `features`, and `statistics` too if they are still to be measured; return the bottleneck outputs to keep."""
    run = ops.backend(features)
    mean, variance, total, middle_statistics = statistics
    measure = measure and stage.uses_batch
    count_here = rows(features)

    def take_in(found: Statistics, channels: slice) -> None:
        mean[channels], variance[channels], everywhere = all_statistics(found, count_here, stage.group)
        total.copy_(everywhere)

    width = features.shape[-1] - stage.growth
    if measure:
        take_in(run.statistics(features[..., :width]), slice(0, width))
    middles: list[Tensor] = []
    middle: Tensor | None = None  # where nobody keeps them, the next layer's takes the place of this one's
    for layer, i in enumerate(stage.layers):
        source = features[..., :width]
        affine = stage.norms[i].affine((mean[:width], variance[:width]))
        if stage.per_layer == 2:
            middle, found = _middle(source, affine, stage.weights[i], measure, None if middles else middle)
            if found is not None:
                middle_statistics.append(all_statistics(found, count_here, stage.group)[:2])
            elif len(middle_statistics) == layer:
                middle_statistics.append(blank(middle))
            if stage.keep == "bottleneck":
                middles.append(middle)
            source, affine = middle, stage.norms[i + 1].affine(middle_statistics[layer])
        weight = stage.weights[i + stage.per_layer - 1]
        made = slice(width, width + weight.shape[0])
        new = features[..., made]
        want = measure and not stage.masks  # of the values after dropout
        found = run.norm_relu_conv(source, affine.scale, affine.shift, weight, new, want_statistics=want)
        if stage.masks:
            _drop(new, stage, layer)
            found = run.statistics(new) if measure else None
        if found is not None:
            take_in(found, made)
        width = made.stop
    return middles


class Gradients(NamedTuple):
    """Of the input ``(N, C_0, *spatial)``, and of each norm's weight and bias and each convolution's weight."""

    x: Tensor
    norms: list[tuple[Tensor, Tensor]]
    weights: list[Tensor | None]


def backward(grad_out: Tensor, x: Tensor | None, stage: Stage, kept: Kept, need_weights: Sequence[bool]) -> Gradients:
    """The gradients of `forward` for the output gradient `grad_out: (N, C, *spatial)`.

    Args:
        grad_out: is left as it is.
        x: the block's input, where the features are not kept.
        stage, kept: as `forward` had and returned them.
        need_weights: for each convolution whether its weight's gradient is wanted.
    """
    statistics, middles, features = kept
    if features is None:
        assert x is not None
        features = _with_input(x, stage).movedim(1, -1)
        middles = _run_layers(features, stage, statistics, measure=False)
    batch = (statistics.mean, statistics.variance)
    readers = _Readers(stage, need_weights)
    grad, through = beside(features), ThroughStatistics(batch[0], statistics.total, stage.group)
    grad_out = grad_out.movedim(1, -1)
    if stage.pool:
        readers.backward(len(stage.norms) - 1, grad_out, features, batch, grad, through, False, stage.pool)
    else:
        grad.copy_(grad_out)
    width = features.shape[-1]
    for layer, i in reversed(list(enumerate(stage.layers))):
        last = i + stage.per_layer - 1
        made = slice(width - stage.weights[last].shape[0], width)
        width = made.start
        source, source_batch = features[..., :width], (batch[0][:width], batch[1][:width])
        grad_made = grad[..., made]  # finished where it lies: nobody needs it afterwards
        through.subtract(grad_made, features[..., made], made, grad_made)
        if stage.masks:
            _drop(grad_made, stage, layer)
        if stage.per_layer == 2:
            if middles:
                middle = middles[layer]
            else:
                middle, _ = _middle(source, stage.norms[i].affine(source_batch), stage.weights[i], False)
            inner = ThroughStatistics(statistics.middles[layer][0], statistics.total, stage.group)
            grad_middle = beside(middle)
            readers.backward(last, grad_made, middle, statistics.middles[layer], grad_middle, inner, False)
            inner.subtract(grad_middle, middle, slice(None), grad_middle)
            grad_made = grad_middle
            del middle, grad_middle  # or they would still be there when the next layer makes its own
        readers.backward(i, grad_made, source, source_batch, grad[..., :width], through, True)
        del grad_made
    grad_x = beside(grad, width)
    through.subtract(grad[..., :width], features[..., :width], slice(0, width), grad_x)
    return Gradients(grad_x.movedim(-1, 1), readers.norms, readers.weights)


class _Readers:
    """Every norm–relu–convolution that reads features, and the parameter gradients gathered from them."""

    def __init__(self, stage: Stage, need_weights: Sequence[bool]) -> None:
        self.stage, self.need_weights = stage, need_weights
        self.norms: list[Any] = [None] * len(stage.norms)
        self.weights: list[Tensor | None] = [None] * len(stage.weights)

    def backward(
        self,
        i: int,
        grad_out: Tensor,
        source: Tensor,
        batch: Statistics,
        grad_source: Tensor,
        through: ThroughStatistics,
        accumulate: bool,
        pool: int = 1,
    ) -> None:
        """Backward through reader `i`: its parameters' gradients, and its share of its source's in `grad_source`."""
        norm, weight = self.stage.norms[i], self.stage.weights[i]
        affine = norm.affine(batch)
        self.weights[i], g, g_centred = ops.backend(source).norm_relu_conv_backward(
            grad_out,
            source,
            affine.scale,
            affine.shift,
            affine.mean,
            weight,
            grad_source,
            accumulate,
            pool,
            self.need_weights[i],
        )
        self.norms[i] = norm.parameter_gradients(affine, g, g_centred)
        if norm.uses_batch:
            through.add(affine, g, g_centred)


def _middle(
    source: Tensor, affine: Affine, weight: Tensor, want_statistics: bool, place: Tensor | None = None
) -> tuple[Tensor, Statistics | None]:
    """The bottleneck output ``(N, *spatial, bn_size·k)``, in `place` if it fits; and, if wanted, its statistics."""
    if place is None or place.shape[-1] != weight.shape[0]:
        place = beside(source, weight.shape[0])
    run = ops.backend(source)
    return place, run.norm_relu_conv(source, affine.scale, affine.shift, weight, place, want_statistics=want_statistics)


def _drop(x: Tensor, stage: Stage, layer: int) -> None:
    x.mul_(stage.masks[layer].movedim(1, -1)).mul_(stage.mask_scale)
