"""Layers of a dense block in one call of the native code, see `efficient_densenet.ops.layers`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.cpu.tensors import convolution_of, kernels_for, own_convolution, rows_of
from efficient_densenet.ops.layers import Layers, LayersBackward


def supports(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether all convolutions are kernels of ours."""
    return x.dim() == 4 and all(own_convolution(x, weight) for weight in weights)


def run(layers: Layers, fold: bool, measure: bool) -> int:
    described, _alive = _described(layers)
    return kernels_for(layers.features).run_layers(described, fold, measure, torch.get_num_threads())


def run_backward(layers: Layers, operands: LayersBackward) -> int:
    described, _alive = _described(layers, operands)
    constant, slope = (None, None) if operands.through is None else _lines(operands.through)
    of_backward = library.LayersBackward(
        rows_of(operands.grad), operands.start, operands.made_again, operands.grad_bottleneck.data_ptr(),
        operands.used, operands.values.data_ptr(), constant, slope, *_lines(operands.grad_norms),
    )  # fmt: skip
    return kernels_for(layers.features).run_layers_backward(described, of_backward, torch.get_num_threads())


def _described(layers: Layers, operands: LayersBackward | None = None) -> tuple[library.Layers, list[Tensor]]:
    """As the kernels want it; and tensors that must live as long."""
    dtype, alive = layers.statistics.dtype, []

    def vector(values: Tensor) -> int:
        if values.dtype != dtype or not values.is_contiguous():
            values = values.to(dtype).contiguous()
            alive.append(values)
        return values.data_ptr()

    readers = (library.Reader * len(layers.readers))()
    for i, (reader, described) in enumerate(zip(layers.readers, readers, strict=True)):
        described.convolution = convolution_of(layers.features, reader.weight)
        described.weight = reader.weight.data_ptr()
        described.norm_weight, described.norm_bias = vector(reader.norm_weight), vector(reader.norm_bias)
        if reader.constants is not None:
            described.mean, described.variance = [vector(values) for values in reader.constants]
        described.eps, described.first = reader.eps, reader.first
        layer, of_layer = divmod(i, layers.per_layer)
        bottleneck = layers.bottlenecks[layer] if of_layer < layers.per_layer - 1 else None
        grad_weight = None if operands is None else operands.grad_weights[i]
        described.bottleneck, described.grad_weight = [
            None if x is None else x.data_ptr() for x in (bottleneck, grad_weight)
        ]
    return library.Layers(
        rows_of(layers.features), layers.width, readers, len(readers), layers.per_layer,
        *_lines(layers.statistics), *_lines(layers.folded),
    ), alive  # fmt: skip


def _lines(matrix: Tensor) -> list[int]:
    assert matrix.is_contiguous()
    return [line.data_ptr() for line in matrix.unbind()]
