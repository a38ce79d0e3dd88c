"""A stem in evaluation in one call of the native code, see `stem.h`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.cpu.tensors import kernels_for, rows_of
from efficient_densenet.ops.layers import Reader


def supports(x: Tensor, reader: Reader) -> bool:
    """Whether there is a kernel: for images in float32, where convolutions are ours."""
    if x.dim() != 4 or x.dtype != torch.float32 or x.dtype not in library.load().convolves:
        return False
    vectors = [reader.norm_weight, reader.norm_bias, *(reader.constants or ())]
    return reader.weight.dtype == x.dtype and all(v.dtype == x.dtype and v.is_contiguous() for v in vectors)


def evaluate(
    x: Tensor, reader: Reader, stride: Sequence[int], padding: Sequence[int], size: Sequence[int], out: Tensor
) -> bool:
    """See `ops.evaluate_stem`."""
    assert reader.constants is not None
    weight = reader.weight.contiguous(memory_format=torch.channels_last)
    tensors = x, weight, reader.norm_weight, reader.norm_bias, *reader.constants
    described = library.Stem(
        *x.shape, *x.stride(), *weight.shape[2:], *stride, *padding, *size, len(weight),
        *[tensor.data_ptr() for tensor in tensors], reader.eps,
    )  # fmt: skip
    return bool(kernels_for(x).evaluate_stem(described, rows_of(out), torch.get_num_threads()))
