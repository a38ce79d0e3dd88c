"""Layers of a dense block in one call of the native code, see `efficient_densenet.ops.layers`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.cpu.tensors import convolution_of, kernels_for, own_convolution, rows_of, volume_of
from efficient_densenet.ops.layers import Evaluation, Layers, LayersBackward, Reader
from efficient_densenet.ops.layout import row_stride
from efficient_densenet.ops.protocol import statistics_dtype

_MOST_KEPT = 32  # of the sizes of images that were met


def supports(x: Tensor, readers: Sequence[Reader], memo: dict[Any, Any]) -> bool:
    """Whether all convolutions are kernels of ours."""
    if x.dim() != 4:
        return False
    key, loaded = (supports, x.shape, x.dtype, len(readers)), library.load()
    if memo.get(key) is not loaded:
        if not all(own_convolution(x, reader.weight) for reader in readers):
            return False
        _remember(memo, key, loaded)
    return True


def run_layers(layers: Layers, fold: bool, measure: bool) -> int:
    described, _alive = _described(layers)
    return kernels_for(layers.features).run_layers(described, fold, measure, torch.get_num_threads())


def run_layers_backward(layers: Layers, operands: LayersBackward) -> int:
    described, _alive = _described(layers, operands)
    constant, slope = (None, None) if operands.through is None else _lines(operands.through)
    of_backward = library.LayersBackward(
        rows_of(operands.grad), operands.start, operands.made_again, operands.grad_bottleneck.data_ptr(),
        operands.used, operands.values.data_ptr(), constant, slope, *_lines(operands.grad_norms),
    )  # fmt: skip
    return kernels_for(layers.features).run_layers_backward(described, of_backward, torch.get_num_threads())


def evaluate(evaluation: Evaluation) -> bool:
    """See `ops.evaluate`."""
    x, features, memo = evaluation.x, evaluation.features, evaluation.memo
    key = _evaluation, features.shape, features.dtype
    made, alive = memo.get(key) or _evaluation(evaluation)
    if not alive:  # as in `_described`
        _remember(memo, key, (made, alive))
    here = library.Evaluation.from_buffer_copy(made)  # other threads may run the same block
    if row_stride(x) is None:
        features[..., : x.shape[-1]].copy_(x)
    else:
        here.x = rows_of(x)
    here.layers.features, here.scratch = rows_of(features), evaluation.scratch.data_ptr()
    if evaluation.out is not None:
        here.out = rows_of(evaluation.out)
    return bool(kernels_for(features).evaluate(here, torch.get_num_threads()))


def _evaluation(evaluation: Evaluation) -> tuple[library.Evaluation, list[Tensor]]:
    """As the kernel wants it, without what changes from call to call; and tensors that must live as long."""
    x, features, readers, per_layer, end, pool, _, out, _ = evaluation
    described, alive = _readers(features, readers)
    layers = library.Layers(library.Rows(), x.shape[-1], described, len(readers), per_layer)
    made = library.Evaluation(layers=layers, pool=volume_of(features, pool))
    if end is not None:
        last, others = _readers(out if pool and out is not None else features, [end])
        made.end, alive = ctypes.pointer(last[0]), alive + others
    return made, alive


def _described(layers: Layers, operands: LayersBackward | None = None) -> tuple[library.Layers, list[Tensor]]:
    """As the kernels want it; and tensors that must live as long."""
    features, count = layers.features, len(layers.readers)
    alive: list[Tensor] = []
    key = _readers, features.shape, features.dtype, count
    if key not in layers.memo:
        made, alive = _readers(layers.features, layers.readers)
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


def _readers(x: Tensor, readers: Sequence[Reader]) -> tuple[ctypes.Array[library.Reader], list[Tensor]]:
    """Readers of activations like `x`, without what changes from call to call; and tensors that must live as long."""
    dtype = statistics_dtype(x.dtype)
    alive: list[Tensor] = []

    def vector(values: Tensor) -> int:
        if values.dtype != dtype or not values.is_contiguous():
            values = values.to(dtype).contiguous()
            alive.append(values)
        return values.data_ptr()

    made = (library.Reader * len(readers))()
    for reader, described in zip(readers, made, strict=True):
        described.convolution = convolution_of(x, reader.weight)
        described.weight = reader.weight.data_ptr()
        described.norm_weight, described.norm_bias = vector(reader.norm_weight), vector(reader.norm_bias)
        if reader.constants is not None:
            described.mean, described.variance = [vector(values) for values in reader.constants]
        described.eps, described.first = reader.eps, reader.first
    return made, alive


def _lines(matrix: Tensor) -> list[int]:
    assert matrix.is_contiguous()
    return [line.data_ptr() for line in matrix.unbind()]
