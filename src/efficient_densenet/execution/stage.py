"""One dense block on one buffer, and the transition or the head after it if there is one: forward and backward.

The mathematics is derived in docs/algorithm.md. In short, with ``X: (N, *spatial, C_T)`` the block's features:

- layer l reads the prefix ``X[..., :C_l]`` and writes its channels after it; nothing is concatenated;
- mean and variance belong to the channel: they are computed once, when it is written, and every norm that reads it
  turns them into its own scale ``a = γ/√(σ² + eps)`` and shift ``b = β − μ·a``;
- in backward one buffer ``D`` collects ``Σ_l a_l·g_l`` over the readers of each channel, and what flows through the
  batch statistics, ``A + B·(x − μ)`` with ``A = Σ_l a_l·Σg_l / M`` and ``B = Σ_l a_l·inv_l²·Σg_l·(x − μ) / M``, is
  subtracted once per channel, when backward reaches the layer that made it;
- a transition and a head (norm, relu, mean over all pixels) are readers of all channels, and take part in all this.

Kept for backward: see `Stage.keep`. Everything here is on tensors; nothing knows modules, autograd or policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficient_densenet import ops
from efficient_densenet.execution.block import Stage
from efficient_densenet.execution.buffers import empty_activation, empty_like, take_rows
from efficient_densenet.execution.norms import Folded, Norms, empty_folded
from efficient_densenet.ops.layers import Evaluation, Layers, LayersBackward
from efficient_densenet.ops.protocol import BackwardOperands, Statistics, statistics_dtype


class Kept(NamedTuple):
    """What the backward pass needs. The folded norms are small; `Stage.keep` decides on the rest."""

    folded: Folded
    bottlenecks: list[Tensor]  # (N, *spatial, bn_size·k) each, of `Stage.kept_bottlenecks`
    features: Tensor | None  # X


def forward(x: Tensor, stage: Stage) -> tuple[Tensor, Kept]:
    """Run the stage on ``x: (N, C_0, *spatial)``, in any memory layout.

    Returns:
        The output, channels-last in memory and channels first in shape: X itself, or what the transition makes of it,
        or the head's ``(N, C_T)``; and what backward needs.
    """
    output = _with_input(x, stage)
    features = output.movedim(1, -1)
    folded = empty_folded(
        features, features.shape[-1] + stage.bottleneck_channels, sum([stop - start for start, stop in stage.sources])
    )
    norms = Norms(features, stage.norms, stage.sources, folded, stage.group)
    bottlenecks = _run_layers(features, stage, norms, first=True)
    made = _empty_output(output, stage)
    if made is not None:
        output, rows = made, made.movedim(1, -1)
        if stage.head:
            norms.run.norm_relu_mean(features, norms.fold(-1), rows)
        else:
            norms.run.norm_relu_conv(features, norms.fold(-1), stage.weights[-1], rows, stage.pool)
            if stage.biases:
                rows.add_(stage.biases[-1])
    return output, Kept(folded, bottlenecks, features if stage.keeps_features else None)


def evaluate(x: Tensor, stage: Stage) -> Tensor:
    """The output of `forward`, where nothing is kept for backward; in one call, where the backend has one."""
    output = _evaluate_in_one_call(x, stage) if stage.evaluates(x.movedim(1, -1)) else None
    return forward(x, stage)[0] if output is None else output


def _evaluate_in_one_call(x: Tensor, stage: Stage) -> Tensor | None:
    """None where a layer is left to the operations of `Backend`, see `forward`."""
    features = empty_activation(x, x.shape[1] + stage.growth, x.shape[2:])
    output = _empty_output(features, stage)
    bottleneck = features[:, 0].numel() * stage.widest_bottleneck
    pooled = output[:, 0].numel() * features.shape[1] if output is not None and stage.pool > 1 else 0
    evaluation = Evaluation(
        x.movedim(1, -1), features.movedim(1, -1), stage.readers, stage.per_layer, stage.end, stage.pool,
        x.new_empty(max(bottleneck, pooled)), None if output is None else output.movedim(1, -1), stage.memo
    )  # fmt: skip
    if not ops.evaluate(evaluation):
        return None
    return features if output is None else output


def _empty_output(features: Tensor, stage: Stage) -> Tensor | None:
    """For what the transition or the head makes of ``features: (N, C_T, *spatial)``; None: there is neither."""
    if stage.pool:
        size = [n // stage.pool for n in features.shape[2:]]
        return empty_activation(features, stage.weights[-1].shape[0], size)
    return features.new_empty(features.shape[:2]) if stage.head else None


def _with_input(x: Tensor, stage: Stage) -> Tensor:
    """An empty ``(N, C_T, *spatial)`` that begins with `x`; `x` itself where that is all of the features."""
    if not stage.growth:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    features = empty_activation(x, x.shape[1] + stage.growth, x.shape[2:])
    features[:, : x.shape[1]].copy_(x)
    return features


def _run_layers(features: Tensor, stage: Stage, norms: Norms, first: bool) -> list[Tensor]:
    """Fill `features`, and at the `first` time find the statistics too, and fold the norms.

    Returns:
        The bottleneck outputs to keep.
    """
    measure = first and stage.uses_batch
    width = features.shape[-1] - stage.growth
    if measure:
        norms.measure(features.narrow(-1, 0, width), 0, width)
    kept = {i: empty_like(features, stage.weights[i].shape[0]) for i in stage.kept_bottlenecks}
    bottlenecks = _bottleneck_outputs(features, stage, kept, stage.layers)
    done = 0
    if stage.runs_layers(features):
        done = ops.run_layers(_layers(features, stage, norms, bottlenecks), first, measure)
    for layer, i in enumerate(stage.layers):
        last = i + stage.per_layer - 1
        stop = width + stage.weights[last].shape[0]
        if layer >= done:
            source, new = features.narrow(-1, 0, width), features.narrow(-1, width, stop - width)
            if stage.per_layer == 2:
                _convolve(norms, i, stage, source, bottlenecks[layer], norms.sources[last] if measure else None, first)
                source = bottlenecks[layer]
            if stage.masks:
                _convolve(norms, last, stage, source, new, None, first)
                _drop(new, stage, layer)
                if measure:  # of the values after dropout
                    norms.measure(new, width, stop)
            else:
                _convolve(norms, last, stage, source, new, (width, stop) if measure else None, first)
        width = stop
    return list(kept.values())


def _bottleneck_outputs(features: Tensor, stage: Stage, kept: dict[int, Tensor], layers: Sequence[int]) -> list[Tensor]:
    """That of each of these layers, if it has any: those kept, by the index of their convolution, or an empty tensor.

    Layers whose bottleneck outputs are not kept write to the same tensor, one after the other.
    """
    if stage.per_layer == 1:
        return []
    shared: dict[int, Tensor] = {}
    for i in layers:
        channels = stage.weights[i].shape[0]
        if i not in kept and channels not in shared:
            shared[channels] = empty_like(features, channels)
    return [kept[i] if i in kept else shared[stage.weights[i].shape[0]] for i in layers]


def _layers(
    features: Tensor, stage: Stage, norms: Norms, bottlenecks: Sequence[Tensor | None], stop: int | None = None
) -> Layers:
    """The layers before number `stop`, for a backend that runs several in one call."""
    readers = stage.readers[: len(stage.layers[:stop]) * stage.per_layer]
    width = features.shape[-1] - stage.growth
    return Layers(
        features,
        width,
        readers,
        stage.per_layer,
        bottlenecks,
        norms.folded.statistics,
        norms.folded.vectors,
        stage.memo,
    )


def _convolve(
    norms: Norms, i: int, stage: Stage, source: Tensor, out: Tensor, measured: tuple[int, int] | None, first: bool
) -> None:
    """Norm, relu and convolution `i` of `source`; and the statistics of the channels `measured`, which it makes."""
    affine = norms.fold(i) if first else norms.affine(i)
    into = None if measured is None else norms.statistics(*measured)
    norms.run.norm_relu_conv(source, affine, stage.weights[i], out, into=into)
    if stage.biases:
        _add_bias(out, stage.biases[i], into)
    if measured is not None:
        norms.share(*measured)


def _add_bias(out: Tensor, bias: Tensor, statistics: Statistics | None) -> None:
    """It moves the mean, and leaves the variance."""
    out.add_(bias)
    if statistics is not None:
        statistics.mean.add_(bias)


class Gradients(NamedTuple):
    """Of the input (anything, if not wanted), of norms' weights and biases, and of convolutions' (None: not wanted)."""

    x: Tensor
    norms: list[tuple[Tensor, Tensor]]
    weights: list[Tensor | None]
    biases: list[Tensor]

    def in_sequence(self) -> list[Tensor]:
        """All that are wanted, in the order in which the operators return them."""
        of_norms = chain.from_iterable(zip(*self.norms, strict=True))
        return [self.x, *of_norms, *[weight for weight in self.weights if weight is not None], *self.biases]


def backward(
    grad_out: list[Tensor], x: list[Tensor], stage: Stage, kept: Kept, types: Sequence[torch.dtype | None]
) -> Gradients:
    """The gradients of `forward` for the gradient of its output.

    What is large is taken out of the lists as soon as it is used up, so that it is freed if nobody else has it.

    Args:
        grad_out: in a list of one: ``(N, C, *spatial)``, or ``(N, C_T)`` of a head; is left as it is.
        x: in a list of one, the block's input; nothing where the features are kept.
        stage, kept: as `forward` had and returned them.
        types: that the gradient of each convolution's weight will have in the end; None where it is not wanted.
    """
    folded, bottlenecks, features = kept
    if features is None:
        features = _with_input(x.pop(), stage).movedim(1, -1)
    norms = Norms(features, stage.norms, stage.sources, folded, stage.group)
    if not stage.keeps_features:
        _run_layers(features, stage, norms, first=False)
    norms.begin_backward()
    readers = _Readers(stage, norms, types)
    grad = empty_like(features) if stage.pool or stage.head else take_rows(grad_out, to_write=True)
    if stage.pool:
        # Rows of channels, as all activations here are.
        grad_made = grad_out.pop().movedim(1, -1).contiguous()
        readers.backward(len(stage.norms) - 1, grad_made, features, grad, False, stage.pool)
        del grad_made
    elif stage.head:
        of_norm = norms.run.norm_relu_mean_backward(
            grad_out.pop(), features, norms.affine(-1), grad, norms.through_of(-1)
        )
        readers.of_norms[-1] = norms.parameter_gradients(-1, *of_norm)
    remaining = dict(zip(stage.kept_bottlenecks, bottlenecks, strict=True))
    bottlenecks.clear()
    width = features.shape[-1]
    _finish_made(norms, stage, features, grad, width, len(stage.layers) - 1)
    left = len(stage.layers)
    if stage.runs_layers(features):
        left = readers.run_layers_backward(features, grad, remaining)
    for layer, i in reversed(list(enumerate(stage.layers))):
        last, stop = i + stage.per_layer - 1, width
        width -= stage.weights[last].shape[0]
        if layer >= left:
            continue
        source, grad_made = features.narrow(-1, 0, width), grad.narrow(-1, width, stop - width)
        if stage.masks:
            _drop(grad_made, stage, layer)
        if stage.per_layer == 2:
            bottleneck = remaining.pop(i) if i in remaining else _bottleneck_again(norms, i, stage, source)
            grad_bottleneck = empty_like(bottleneck)
            readers.backward(last, grad_made, bottleneck, grad_bottleneck, False)
            grad_made = grad_bottleneck
            norms.finish(grad_made, bottleneck, *norms.sources[last], grad_made)
            del bottleneck, grad_bottleneck  # or they would still be there when the next layer makes its own
        readers.backward(i, grad_made, source, grad.narrow(-1, 0, width), True)
        del grad_made
        _finish_made(norms, stage, features, grad, width, layer - 1)
    grad_x = empty_like(grad, width)
    norms.finish(grad.narrow(-1, 0, width), features.narrow(-1, 0, width), 0, width, grad_x)
    return Gradients(grad_x.movedim(-1, 1), readers.of_norms, readers.of_weights, readers.of_biases)


def _finish_made(norms: Norms, stage: Stage, features: Tensor, grad: Tensor, stop: int, layer: int) -> None:
    """Finish the gradient of what a layer has made, the features before `stop`, in place: nobody needs it as it was."""
    if layer >= 0:
        count = stage.weights[stage.layers[layer] + stage.per_layer - 1].shape[0]
        grad_made, made = (x.narrow(-1, stop - count, count) for x in (grad, features))
        norms.finish(grad_made, made, stop - count, stop, grad_made)


class _Readers:
    """Every norm–relu–convolution that reads features, and the parameter gradients gathered from them."""

    def __init__(self, stage: Stage, norms: Norms, types: Sequence[torch.dtype | None]) -> None:
        self.stage, self.norms, self.types = stage, norms, types
        self.of_norms: list[Any] = [None] * len(stage.norms)
        self.of_weights: list[Tensor | None] = [None] * len(stage.weights)
        self.of_biases: list[Any] = [None] * len(stage.biases)

    def backward(
        self,
        i: int,
        grad_out: Tensor,
        source: Tensor,
        grad_source: Tensor,
        accumulate: bool,
        pool: int = 1,
    ) -> None:
        """Backward through reader `i`: its parameters' gradients, and its share of its source's in `grad_source`."""
        if self.stage.biases:
            bias, pixels = self.stage.biases[i], tuple(range(grad_out.dim() - 1))
            self.of_biases[i] = torch.sum(grad_out, pixels, dtype=statistics_dtype(grad_out.dtype)).to(bias.dtype)
        norm, through = self.norms.affine(i), self.norms.through_of(i)
        weight, need_weight = self.stage.weights[i], self.types[i] is not None
        operands = BackwardOperands(grad_out, source, norm, weight, grad_source, accumulate, through, pool, need_weight)
        self.of_weights[i], *of_norm = self.norms.run.norm_relu_conv_backward(operands)
        self.of_norms[i] = self.norms.parameter_gradients(i, *of_norm)

    def run_layers_backward(self, features: Tensor, grad: Tensor, kept: dict[int, Tensor]) -> int:
        """Backward through layers in as few calls as can be, from the last on; returns how many layers are left.

        Of `kept`, the bottleneck outputs by the index of their convolution, remain those of the layers that are left.
        """
        layers, left, done = self.stage.layers, len(self.stage.layers), 1
        while left and done:
            # All at once whose bottleneck outputs are kept; they are freed before others are made again.
            again = layers[left - 1] not in kept
            start = next((layer + 1 for layer in reversed(range(left)) if (layers[layer] not in kept) != again), 0)
            done = self._run_layers_backward(features, grad, kept, start, left)
            left -= done
        return left

    def _run_layers_backward(
        self, features: Tensor, grad: Tensor, kept: dict[int, Tensor], start: int, stop: int
    ) -> int:
        """Layers from `start` to `stop` in one call: how many of them, from the last on, are done."""
        stage, norms = self.stage, self.norms
        bottlenecks = _bottleneck_outputs(features, stage, kept, stage.layers[start:stop])
        layers = _layers(features, stage, norms, [*[None] * start, *bottlenecks], stop)
        sizes = [len(reader.norm_weight) for reader in layers.readers]
        grad_norms = norms.folded.vectors.new_empty(2 * sum(sizes))
        first, any_type = start * stage.per_layer, ops.converts_gradients(features)
        grad_weights = [
            None if dtype is None or i < first else torch.empty_like(weight, dtype=dtype if any_type else None)
            for i, (weight, dtype) in enumerate(zip(stage.weights[: len(sizes)], self.types, strict=False))
        ]
        largest = max([bottleneck.shape[-1] for bottleneck in bottlenecks], default=0)
        made_again = bool(bottlenecks) and stage.layers[start] not in kept
        operands = LayersBackward(
            grad, start, made_again, empty_like(features, largest), norms.used_features, norms.total, norms.through,
            grad_weights, grad_norms.view(2, -1),
        )  # fmt: skip
        done = ops.run_layers_backward(layers, operands)
        # Parts of one tensor, but no views of it to autograd: who changes one in place does not touch the others.
        of_norms = torch.unsafe_split_with_sizes(grad_norms, [*sizes, *sizes])
        for i in range(len(sizes) - done * stage.per_layer, len(sizes)):
            self.of_weights[i] = grad_weights[i]
            self.of_norms[i] = norms.parameter_gradients(i, of_norms[i], of_norms[i + len(sizes)])
            kept.pop(i, None)
        return done


def _bottleneck_again(norms: Norms, i: int, stage: Stage, source: Tensor) -> Tensor:
    bottleneck = empty_like(source, stage.weights[i].shape[0])
    _convolve(norms, i, stage, source, bottleneck, None, first=False)
    return bottleneck


def _drop(x: Tensor, stage: Stage, layer: int) -> None:
    x.mul_(stage.masks[layer].movedim(1, -1)).mul_(stage.mask_scales[layer])
