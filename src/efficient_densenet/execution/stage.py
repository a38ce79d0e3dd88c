"""One dense block on one buffer, and the transition or the head behind it if there is one: forward and backward.

The mathematics is derived in docs/algorithm.md. In short, with ``X: (N, *spatial, C_T)`` the block's features:

- layer l reads the prefix ``X[..., :C_l]`` and writes its channels behind it; nothing is concatenated;
- mean and variance belong to the channel: they are computed once, when it is written, and every norm that reads it
  turns them into its own scale ``a = γ/√(σ² + eps)`` and shift ``b = β − μ·a``;
- in backward one buffer ``D`` collects ``Σ_l a_l·g_l`` over the readers of each channel, and what flows through the
  batch statistics, ``A + B·(x − μ)`` with ``A = Σ_l a_l·Σg_l / M`` and ``B = Σ_l a_l·inv_l²·Σg_l·(x − μ) / M``, is
  subtracted once per channel, when the layer that made it takes its gradient out;
- a transition and a head (norm, relu, mean over all pixels) are readers of all channels, and take part in all this.

Kept for backward: see `Stage.keep`. Everything here is on tensors; nothing knows modules, autograd or policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from efficient_densenet.execution.buffers import beside, room
from efficient_densenet.execution.norms import Folded, Norm, Norms, blank
from efficient_densenet.ops.reference import Affine, Statistics


@dataclass(frozen=True)
class Stage:
    """A block's norms and convolutions in their order, layer by layer, those of the transition last.

    A head is one norm more than there are convolutions. `per_layer` is 1 without and 2 with a bottleneck; `pool` is the
    transition's pool, 0 where there is no transition; `masks` are the layers' dropout masks, false or true, with their
    scale, or nothing: ``(N, k, *spatial)``, or ``(N, k, 1, …)`` where whole channels are dropped; `keep` is what stays
    for backward: "bottleneck" (features and bottleneck outputs), "features", or "inputs" (only the input, where a
    transition follows);
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
    def middles(self) -> int:
        """The channels of all bottleneck outputs."""
        return sum(self.weights[i].shape[0] for i in self.layers) if self.per_layer == 2 else 0

    @property
    def head(self) -> bool:
        """Whether it ends with one."""
        return len(self.norms) > len(self.weights)

    @property
    def keeps_middles(self) -> bool:
        """Whether the bottleneck outputs, if there are any, stay for backward."""
        return self.keep == "bottleneck" and self.per_layer == 2

    @property
    def keeps_features(self) -> bool:
        """Not where a transition comes between them and the rest; a head needs them at once when backward begins."""
        return self.keep != "inputs" or not self.pool

    @property
    def uses_batch(self) -> bool:
        return any(norm.uses_batch for norm in self.norms)

    def sources(self, width: int) -> list[slice]:
        """`sources` of this stage on an input of `width` channels."""
        made = [weight.shape[0] for weight in self.weights[: len(self.layers) * self.per_layer]]
        return sources(width, made, self.per_layer, len(self.norms) > len(made))


def sources(width: int, made: Sequence[int], per_layer: int, tail: bool) -> list[slice]:
    """The channels that each norm reads, numbered through: the features, then the outputs of each bottleneck.

    Args:
        width: channels of the input.
        made: what each convolution of the layers makes.
        per_layer: as in `Stage`.
        tail: whether there is a norm more, of a transition or a head.
    """
    found = []
    behind = width + sum(made[per_layer - 1 :: per_layer])
    for i in range(0, len(made), per_layer):
        found.append(slice(0, width))
        if per_layer == 2:
            found.append(slice(behind, behind + made[i]))
            behind += made[i]
        width += made[i + per_layer - 1]
    return [*found, slice(0, width)] if tail else found


class Kept(NamedTuple):
    """What the backward pass needs. The folded norms are small; `Stage.keep` decides on the rest."""

    folded: Folded
    middles: list[Tensor]  # the bottleneck outputs, (N, *spatial, bn_size·k)
    features: Tensor | None  # X


def forward(x: Tensor, stage: Stage) -> tuple[Tensor, Kept]:
    """Run the stage on ``x: (N, C_0, *spatial)``, in any memory layout.

    Returns:
        The output, channels-last in memory and channels first in shape: X itself, or what the transition makes of it,
        or the head's ``(N, C_T)``; and what backward needs.
    """
    output = _with_input(x, stage)
    features = output.movedim(1, -1)
    read = stage.sources(x.shape[1])
    channels = features.shape[-1] + stage.middles
    folded = blank(features, channels, sum(source.stop - source.start for source in read))
    norms = Norms(features, stage.norms, read, folded, stage.group)
    middles = _run_layers(features, stage, norms, first=True)
    if stage.pool:
        weight = stage.weights[-1]
        output = room(x, weight.shape[0], [n // stage.pool for n in x.shape[2:]])
        norms.run.norm_relu_conv(features, norms.fold(-1), weight, output.movedim(1, -1), stage.pool)
    elif stage.head:
        output = x.new_empty(len(x), features.shape[-1])
        norms.run.norm_relu_mean(features, norms.fold(-1), output)
    return output, Kept(folded, middles, features if stage.keeps_features else None)


def _with_input(x: Tensor, stage: Stage) -> Tensor:
    """Room for the features ``(N, C_T, *spatial)``, which begin with `x`; `x` itself where that is all of them."""
    if not stage.growth:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    features = room(x, x.shape[1] + stage.growth, x.shape[2:])
    features[:, : x.shape[1]].copy_(x)
    return features


def _run_layers(features: Tensor, stage: Stage, norms: Norms, first: bool) -> list[Tensor]:
    """Fill `features`, and at the `first` time find the statistics too, and fold the norms.

    Returns:
        The bottleneck outputs to keep.
    """
    run = norms.run
    measure = first and stage.uses_batch
    width = features.shape[-1] - stage.growth
    if measure:
        run.statistics(features.narrow(-1, 0, width), norms.place(slice(0, width)))
        norms.share(slice(0, width))
    middles: list[Tensor] = []
    middle: Tensor | None = None  # where nobody keeps them, the next layer's takes the place of this one's
    for layer, i in enumerate(stage.layers):
        source = features.narrow(-1, 0, width)
        affine = norms.fold(i) if first else norms[i]
        if stage.per_layer == 2:
            channels = norms.sources[i + 1]
            place = norms.place(channels) if measure else None
            middle = _middle(run, source, affine, stage.weights[i], None if middles else middle, place)
            if measure:
                norms.share(channels)
            if stage.keeps_middles:
                middles.append(middle)
            source, affine = middle, norms.fold(i + 1) if first else norms[i + 1]
        weight = stage.weights[i + stage.per_layer - 1]
        made = slice(width, width + weight.shape[0])
        new = features.narrow(-1, made.start, weight.shape[0])
        place = norms.place(made) if measure else None
        run.norm_relu_conv(source, affine, weight, new, into=None if stage.masks else place)
        if stage.masks:
            _drop(new, stage, layer)
            if place:  # of the values after dropout
                run.statistics(new, place)
        if measure:
            norms.share(made)
        width = made.stop
    return middles


class Gradients(NamedTuple):
    """Of the input ``(N, C_0, *spatial)``, and of each norm's weight and bias and each convolution's weight."""

    x: Tensor
    norms: list[tuple[Tensor, Tensor]]
    weights: list[Tensor | None]


def backward(grad_out: Tensor, x: Tensor | None, stage: Stage, kept: Kept, need_weights: Sequence[bool]) -> Gradients:
    """The gradients of `forward` for the gradient of its output.

    Args:
        grad_out: ``(N, C, *spatial)``, or ``(N, C_T)`` of a head; is left as it is.
        x: the block's input, where the features are not kept.
        stage, kept: as `forward` had and returned them.
        need_weights: for each convolution whether its weight's gradient is wanted.
    """
    folded, middles, features = kept
    if features is None:
        assert x is not None
        features = _with_input(x, stage).movedim(1, -1)
    first = features.shape[-1] - stage.growth
    norms = Norms(features, stage.norms, stage.sources(first), folded, stage.group)
    if not stage.keeps_features:
        middles = _run_layers(features, stage, norms, first=False)
    norms.begin_backward()
    readers = _Readers(stage, norms, need_weights)
    grad = beside(features)
    if stage.pool:
        readers.backward(len(stage.norms) - 1, grad_out.movedim(1, -1), features, grad, False, stage.pool)
    elif stage.head:
        of_norm = norms.run.norm_relu_mean_backward(grad_out, features, norms[-1], grad, norms.through_of(-1))
        readers.norms[-1] = norms.parameter_gradients(-1, *of_norm)
    else:
        grad.copy_(grad_out.movedim(1, -1))
    width = features.shape[-1]
    for layer, i in reversed(list(enumerate(stage.layers))):
        last = i + stage.per_layer - 1
        made = slice(width - stage.weights[last].shape[0], width)
        width = made.start
        source, grad_made = features.narrow(-1, 0, width), grad.narrow(-1, width, made.stop - width)
        norms.finish(grad_made, features[..., made], made, grad_made)  # where it lies: nobody needs it afterwards
        if stage.masks:
            _drop(grad_made, stage, layer)
        if stage.per_layer == 2:
            middle = middles[layer] if middles else _middle(norms.run, source, norms[i], stage.weights[i])
            grad_middle = beside(middle)
            readers.backward(last, grad_made, middle, grad_middle, False)
            norms.finish(grad_middle, middle, norms.sources[last], grad_middle)
            grad_made = grad_middle
            del middle, grad_middle  # or they would still be there when the next layer makes its own
        readers.backward(i, grad_made, source, grad.narrow(-1, 0, width), True)
        del grad_made
    grad_x = beside(grad, width)
    norms.finish(grad.narrow(-1, 0, width), features.narrow(-1, 0, width), slice(0, width), grad_x)
    return Gradients(grad_x.movedim(-1, 1), readers.norms, readers.weights)


class _Readers:
    """Every norm–relu–convolution that reads features, and the parameter gradients gathered from them."""

    def __init__(self, stage: Stage, folded: Norms, need_weights: Sequence[bool]) -> None:
        self.stage, self.folded, self.need_weights = stage, folded, need_weights
        self.norms: list[Any] = [None] * len(stage.norms)
        self.weights: list[Tensor | None] = [None] * len(stage.weights)

    def backward(
        self, i: int, grad_out: Tensor, source: Tensor, grad_source: Tensor, accumulate: bool, pool: int = 1
    ) -> None:
        """Backward through reader `i`: its parameters' gradients, and its share of its source's in `grad_source`."""
        self.weights[i], *of_norm = self.folded.run.norm_relu_conv_backward(
            grad_out,
            source,
            self.folded[i],
            self.stage.weights[i],
            grad_source,
            accumulate,
            self.folded.through_of(i),
            pool,
            self.need_weights[i],
        )
        self.norms[i] = self.folded.parameter_gradients(i, *of_norm)


def _middle(
    run: ModuleType,
    source: Tensor,
    affine: Affine,
    weight: Tensor,
    place: Tensor | None = None,
    into: Statistics | None = None,
) -> Tensor:
    """The bottleneck output ``(N, *spatial, bn_size·k)``, in `place` if it fits; and, if wanted, its statistics."""
    if place is None or place.shape[-1] != weight.shape[0]:
        place = beside(source, weight.shape[0])
    run.norm_relu_conv(source, affine, weight, place, into=into)
    return place


def _drop(x: Tensor, stage: Stage, layer: int) -> None:
    x.mul_(stage.masks[layer].movedim(1, -1)).mul_(stage.mask_scale)
