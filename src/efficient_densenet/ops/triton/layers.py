"""Layers of a dense block in one call, see `efficient_densenet.ops.layers`: launches are recorded and repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from torch import Tensor

from efficient_densenet.ops.layers import Layers, LayersBackward
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics
from efficient_densenet.ops.triton import backward, forward, launch, moments, norms, tiles
from efficient_densenet.ops.triton.backward import ParameterGradients
from efficient_densenet.ops.triton.recording import Recording, Recordings, layout, overlap

_recordings = Recordings()


def run(layers: Layers, fold: bool, measure: bool) -> int:
    block = _Block(layers)
    tensors: list[Tensor | None] = [*block.tensors, *layers.bottlenecks]
    if fold:
        tensors += [vector for reader in layers.readers for vector in (reader.norm_weight, reader.norm_bias)]
        tensors += [reader.constants.variance for reader in layers.readers if reader.constants]
    return _replayed((fold, measure), block, tensors, lambda: block.forward(fold, measure))


def run_backward(layers: Layers, operands: LayersBackward) -> int:
    block = _Block(layers, operands.start)
    tensors = [
        *(*block.tensors, *layers.bottlenecks, operands.grad, operands.grad_bottleneck, operands.values),
        *(operands.through, *operands.grad_weights, operands.grad_norms),
    ]
    key = operands.start, operands.made_again, operands.used
    return _replayed(key, block, tensors, lambda: block.backward(operands))


def _replayed(
    key: Any, block: _Block, tensors: Sequence[Tensor | None], launches: Callable[[], Iterator[list[partial]]]
) -> int:
    """Start the launches of all layers as recorded, or record them; returns how many layers are done.

    Args:
        tensors: all that the launches work on, besides scratch, in an order that says what is what.
    """
    layers, device = block.layers, block.features.device
    given = list({id(x): x for x in tensors if x is not None}.values())  # layers may share a bottleneck output
    numbers = {id(x): i for i, x in enumerate(given)}
    key = (
        *(key, layers.width, layers.per_layer, tiles.precision(layers.features), device, tiles.device_of(device)),
        layout(given),
        tuple([None if x is None else numbers[id(x)] for x in tensors]),
        tuple([(reader.eps, reader.first, reader.constants is None) for reader in layers.readers]),
    )
    found = _recordings.get(key)
    if found is not None:
        if found.operations:
            with launch.on(device):
                found.start(given)
        return found.operations
    if overlap(given) or not all(map(Tensor.is_contiguous, block.vectors)):
        return 0  # vectors would be copied, which is no launch
    recording = Recording(given)
    try:
        for of_layer in launches():
            recording.add(of_layer)
    except launch.CannotStart:  # operation by operation it will be found out which one, and why
        _recordings.keep(key, Recording(()))
    else:
        _recordings.keep(key, recording)
    return recording.operations


class _Block:
    """What every reader of the layers from layer `start` on has in common; and the launches, layer by layer."""

    def __init__(self, layers: Layers, start: int = 0) -> None:
        self.layers, self.features = layers, layers.features
        before, dtype = start * layers.per_layer, layers.features.dtype
        self.weights = [
            launch.packed(reader.weight, dtype) if i >= before else reader.weight
            for i, reader in enumerate(layers.readers)
        ]
        self.vectors = [x for r in layers.readers for x in (r.norm_weight, r.norm_bias, *(r.constants or ()))]
        self.means = [reader.constants.mean for reader in layers.readers if reader.constants]
        self.tensors = [self.features, layers.statistics, layers.folded, *self.weights, *self.means]
        self.count = len(layers.readers) // layers.per_layer
        made = [weight.shape[0] for weight in self.weights[layers.per_layer - 1 :: layers.per_layer]]
        self.widths = list(accumulate(made, initial=layers.width))
        """The channels before each layer, and after the last."""

    def forward(self, fold: bool, measure: bool) -> Iterator[list[partial]]:
        layers = self.layers
        for layer in range(self.count):
            with launch.operation(self.features.device) as launches:
                for i in self._readers_of(layer):
                    out, first = self._made(i)
                    into = Statistics(*layers.statistics.narrow(1, first, out.shape[-1])) if measure else None
                    norm = self._norm(i)
                    if fold:
                        reader = layers.readers[i]
                        variance = layers.statistics[1].narrow(0, reader.first, len(norm.scale))
                        statistics = reader.constants or Statistics(norm.mean, variance)
                        norms.fold_norm(statistics, reader.norm_weight, reader.norm_bias, reader.eps, norm)
                    forward.norm_relu_conv(self._source(i), norm, self.weights[i], out, 1, into)
            yield launches

    def backward(self, operands: LayersBackward) -> Iterator[list[partial]]:
        for layer in reversed(range(operands.start, self.count)):
            with launch.operation(self.features.device) as launches:
                first, last = self._readers_of(layer)[0], self._readers_of(layer)[-1]
                start, stop = self.widths[layer : layer + 2]
                grad_made, grad = operands.grad[..., start:stop], operands.grad[..., :start]
                if first != last:
                    source = self._source(last)
                    if operands.made_again:
                        norm = self._norm(first)
                        forward.norm_relu_conv(self._source(first), norm, self.weights[first], source, 1, None)
                    grad_source = operands.grad_bottleneck.view(-1)[: source.numel()].view(source.shape)
                    self._differentiate(last, grad_made, grad_source, False, operands)
                    if operands.through is not None and self.layers.readers[last].constants is None:
                        self._finish(grad_source, source, self.layers.readers[last].first, operands)
                    grad_made = grad_source
                self._differentiate(first, grad_made, grad, True, operands)
                if layer and operands.through is not None and start <= operands.used:
                    made = slice(self.widths[layer - 1], start)
                    self._finish(operands.grad[..., made], self.features[..., made], made.start, operands)
            yield launches

    def _readers_of(self, layer: int) -> range:
        return range(layer * self.layers.per_layer, (layer + 1) * self.layers.per_layer)

    def _source(self, i: int) -> Tensor:
        """What reader `i` reads."""
        layer, of_layer = divmod(i, self.layers.per_layer)
        bottleneck = self.layers.bottlenecks[layer] if of_layer else None
        return self.features[..., : self.widths[layer]] if bottleneck is None else bottleneck

    def _made(self, i: int) -> tuple[Tensor, int]:
        """What reader `i` makes, and the number of its first channel."""
        layer, of_layer = divmod(i, self.layers.per_layer)
        if of_layer == self.layers.per_layer - 1:
            return self.features[..., self.widths[layer] : self.widths[layer + 1]], self.widths[layer]
        bottleneck = self.layers.bottlenecks[layer]
        assert bottleneck is not None
        return bottleneck, self.layers.readers[i + 1].first

    def _norm(self, i: int) -> Affine:
        reader, channels = self.layers.readers[i], self.weights[i].shape[1]
        at = sum([weight.shape[1] for weight in self.weights[:i]])
        mean = self.layers.statistics[0].narrow(0, reader.first, channels)
        return Affine(reader.constants.mean if reader.constants else mean, *self.layers.folded.narrow(1, at, channels))

    def _differentiate(
        self, i: int, grad_out: Tensor, grad_x: Tensor, accumulate: bool, operands: LayersBackward
    ) -> None:
        """Backward through reader `i`."""
        reader, channels = self.layers.readers[i], self.weights[i].shape[1]
        at = sum([weight.shape[1] for weight in self.weights[:i]])
        through = None if reader.constants else operands.through
        through = None if through is None else through.narrow(1, reader.first, channels)
        of_norm = operands.grad_norms.narrow(1, at, channels)
        backward.norm_relu_conv_backward(
            BackwardOperands(
                grad_out,
                self._source(i),
                self._norm(i),
                self.weights[i],
                grad_x,
                accumulate,
                through,
                need_weight=operands.grad_weights[i] is not None,
            ),
            ParameterGradients(operands.grad_weights[i], *of_norm),
        )

    def _finish(self, grad: Tensor, x: Tensor, first: int, operands: LayersBackward) -> None:
        """Subtract from `grad`, of the channels of `x` from `first` on, what flows through their statistics."""
        assert operands.through is not None
        count = x.shape[-1]
        mean, through = self.layers.statistics[0].narrow(0, first, count), operands.through.narrow(1, first, count)
        moments.finish(grad, x, mean, through, operands.values, grad)
