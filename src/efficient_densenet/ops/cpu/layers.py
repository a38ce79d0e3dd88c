"""Layers of a dense block in one call of the native code, see `efficient_densenet.ops.layers`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.cpu.tensors import convolution_of, kernels_for, own_convolution, rows_of
from efficient_densenet.ops.layers import Layers, LayersBackward, Reader

_MOST_KEPT = 32  # of the sizes of images that were met


def supports(x: Tensor, readers: Sequence[Reader], memo: dict[Any, Any]) -> bool:
    """Whether all convolutions are kernels of ours."""
    if x.dim() != 4:
        return False
    key, loaded = (supports, x.shape, x.dtype), library.load()
    if memo.get(key) is not loaded:
        if not all(own_convolution(x, reader.weight) for reader in readers):
            return False
        _remember(memo, key, loaded)
    return True


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
    features, count = layers.features, len(layers.readers)
    alive: list[Tensor] = []
    key = _readers, features.shape, features.dtype, count
    if key not in layers.memo:
        made, alive = _readers(layers)
        if not alive:  # copies, of values that may change
            _remember(layers.memo, key, made)
    else:
        made = layers.memo[key]
    readers = type(made).from_buffer_copy(made)  # other threads may run the same layers
    for layer, bottleneck in enumerate(layers.bottlenecks):
        if bottleneck is not None:
            readers[2 * layer].bottleneck = bottleneck.data_ptr()
    if operands is not None:
        for described, grad_weight in zip(readers, operands.grad_weights, strict=True):
            described.grad_weight = None if grad_weight is None else grad_weight.data_ptr()
    return library.Layers(
        rows_of(features), layers.width, readers, count, layers.per_layer,
        *_lines(layers.statistics), *_lines(layers.folded),
    ), alive  # fmt: skip


def _remember(memo: dict[Any, Any], key: Any, value: Any) -> None:
    if len(memo) >= _MOST_KEPT:
        memo.clear()
    memo[key] = value


def _readers(layers: Layers) -> tuple[ctypes.Array[library.Reader], list[Tensor]]:
    """All readers, without what changes from call to call; and tensors that must live as long."""
    dtype, alive = layers.statistics.dtype, []

    def vector(values: Tensor) -> int:
        if values.dtype != dtype or not values.is_contiguous():
            values = values.to(dtype).contiguous()
            alive.append(values)
        return values.data_ptr()

    readers = (library.Reader * len(layers.readers))()
    for reader, described in zip(layers.readers, readers, strict=True):
        described.convolution = convolution_of(layers.features, reader.weight)
        described.weight = reader.weight.data_ptr()
        described.norm_weight, described.norm_bias = vector(reader.norm_weight), vector(reader.norm_bias)
        if reader.constants is not None:
            described.mean, described.variance = [vector(values) for values in reader.constants]
        described.eps, described.first = reader.eps, reader.first
    return readers, alive


def _lines(matrix: Tensor) -> list[int]:
    assert matrix.is_contiguous()
    return [line.data_ptr() for line in matrix.unbind()]
