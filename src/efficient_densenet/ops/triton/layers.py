"""Layers of a dense block in one call, see `efficient_densenet.ops.layers`: launches are recorded and repeated."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from itertools import accumulate

from torch import Tensor

from efficient_densenet.ops.layers import Layers, LayersBackward
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics
from efficient_densenet.ops.triton import backward, forward, launch, moments, norms
from efficient_densenet.ops.triton.recording import Operation, Operations, repeated


def run(layers: Layers, fold: bool, measure: bool) -> int:
    weights = _packed(layers)
    tensors = [*_read(layers, weights), *layers.bottlenecks]
    if fold:
        tensors += [vector for reader in layers.readers for vector in (reader.norm_weight, reader.norm_bias)]
        tensors += [reader.constants.variance for reader in layers.readers if reader.constants]
    done = _repeated((fold, measure), layers, tensors, lambda: _Block(layers, weights).forward(fold, measure))
    return len(layers.readers) // layers.per_layer if done else 0


def run_backward(layers: Layers, operands: LayersBackward) -> int:
    weights = _packed(layers, operands.start)
    tensors = [
        *(*_read(layers, weights), *layers.bottlenecks, operands.grad, operands.grad_bottleneck, operands.values),
        *(operands.through, *operands.grad_weights, operands.grad_norms),
    ]
    key = operands.start, operands.made_again, operands.used
    done = _repeated(key, layers, tensors, lambda: _Block(layers, weights).backward(operands))
    return len(layers.readers) // layers.per_layer - operands.start if done else 0


def _packed(layers: Layers, start: int = 0) -> list[Tensor]:
    """The weights of all readers, from layer `start` on as kernels want them."""
    before, dtype = start * layers.per_layer, layers.features.dtype
    return [
        launch.packed(reader.weight, dtype) if i >= before else reader.weight for i, reader in enumerate(layers.readers)
    ]


def _read(layers: Layers, weights: Sequence[Tensor]) -> list[Tensor]:
    """What is read in both directions."""
    means = [reader.constants.mean for reader in layers.readers if reader.constants]
    return [layers.features, layers.statistics, layers.folded, *weights, *means]


def _repeated(key: Hashable, layers: Layers, tensors: Sequence[Tensor | None], operations: Operations) -> bool:
    """Whether the launches of all layers are started, as they are recorded."""
    of_readers = tuple([(reader.eps, reader.first, reader.constants is None) for reader in layers.readers])
    try:
        return repeated((key, layers.width, layers.per_layer, of_readers), tensors, operations)
    except launch.CannotStart:  # operation by operation it will be found out which one, and why
        return False


class _Block:
    """The operations of layers with these packed weights, one after the other."""

    def __init__(self, layers: Layers, weights: Sequence[Tensor]) -> None:
        self.layers, self.features, self.weights = layers, layers.features, weights
        shape, strides = self.features.shape, self.features.stride()
        regular = all(reader.weight.is_contiguous() or launch.is_packed(reader.weight) for reader in layers.readers)
        if not regular or any(launch.uncovered(shape, shape, strides, weight.shape[2:], 1) for weight in weights):
            raise launch.CannotStart("not all operations of these layers have kernels")
        self.count = len(layers.readers) // layers.per_layer
        made = [weight.shape[0] for weight in weights[layers.per_layer - 1 :: layers.per_layer]]
        self.widths = list(accumulate(made, initial=layers.width))
        """The channels before each layer, and after the last."""
        self.read = list(accumulate([weight.shape[1] for weight in weights], initial=0))
        """The channels that all readers before each read."""

    def forward(self, fold: bool, measure: bool) -> Iterator[Operation]:
        layers = self.layers
        for i, reader in enumerate(layers.readers):
            out, first = self._made(i)
            into = Statistics(*layers.statistics.narrow(1, first, out.shape[-1])) if measure else None
            norm = self._norm(i)
            if fold:
                variance = layers.statistics[1].narrow(0, reader.first, len(norm.scale))
                statistics = reader.constants or Statistics(norm.mean, variance)
                yield partial(norms.fold_norm, statistics, reader.norm_weight, reader.norm_bias, reader.eps, norm)
            yield partial(forward.norm_relu_conv, self._source(i), norm, self.weights[i], out, 1, into)

    def backward(self, operands: LayersBackward) -> Iterator[Operation]:
        for layer in reversed(range(operands.start, self.count)):
            first, last = layer * self.layers.per_layer, (layer + 1) * self.layers.per_layer - 1
            start, stop = self.widths[layer : layer + 2]
            grad_made, grad = operands.grad[..., start:stop], operands.grad[..., :start]
            if first != last:
                source = self._source(last)
                if operands.made_again:
                    weight, norm = self.weights[first], self._norm(first)
                    yield partial(forward.norm_relu_conv, self._source(first), norm, weight, source, 1, None)
                grad_source = operands.grad_bottleneck.view(-1)[: source.numel()].view(source.shape)
                yield self._differentiated(last, grad_made, grad_source, False, operands)
                if operands.through is not None and self.layers.readers[last].constants is None:
                    yield self._finished(grad_source, source, self.layers.readers[last].first, operands)
                grad_made = grad_source
            yield self._differentiated(first, grad_made, grad, True, operands)
            if layer and operands.through is not None and start <= operands.used:
                made = slice(self.widths[layer - 1], start)
                yield self._finished(operands.grad[..., made], self.features[..., made], made.start, operands)

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
        mean = self.layers.statistics[0].narrow(0, reader.first, channels)
        return Affine(
            reader.constants.mean if reader.constants else mean, *self.layers.folded.narrow(1, self.read[i], channels)
        )

    def _differentiated(
        self, i: int, grad_out: Tensor, grad_x: Tensor, accumulate: bool, operands: LayersBackward
    ) -> Operation:
        """Backward through reader `i`."""
        reader, channels = self.layers.readers[i], self.weights[i].shape[1]
        through = None if reader.constants else operands.through
        through = None if through is None else through.narrow(1, reader.first, channels)
        of_norm = operands.grad_norms.narrow(1, self.read[i], channels)
        return partial(
            backward.norm_relu_conv_backward,
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
            (operands.grad_weights[i], *of_norm),
        )

    def _finished(self, grad: Tensor, x: Tensor, first: int, operands: LayersBackward) -> Operation:
        """Subtract from `grad`, of the channels of `x` from `first` on, what flows through their statistics."""
        assert operands.through is not None
        count = x.shape[-1]
        mean, through = self.layers.statistics[0].narrow(0, first, count), operands.through.narrow(1, first, count)
        return partial(moments.finish, grad, x, mean, through, operands.values, grad)
