"""A backend while PyTorch's profiler watches: each operation has its own and its backend's name in the trace.

The profiler counts multiplications by the names of PyTorch's own operations, and kernels of ours have none. So a
norm–relu–convolution holds an event of a matrix product of the same size. As everywhere in PyTorch, the shapes decide:
how a convolution is computed (by Winograd's transform, behind its pool) does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _RecordFunctionFast
from torch.profiler import record_function

from efficient_densenet.ops.layers import Layers, Reader


class Profiled:
    """The operations of a backend, in labels."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        operation, label = getattr(self._backend, name), f"{self._backend.__name__.rpartition('.')[2]}.{name}"

        def labelled(*arguments: Any, **named: Any) -> Any:
            with record_function(label):
                if name == "norm_relu_conv":
                    _count(arguments[0], arguments[2])
                return operation(*arguments, **named)

        return labelled


@contextmanager
def label_layers(label: str, layers: Layers, run: Sequence[Reader]) -> Iterator[None]:
    """Around a call that runs layers, for a profiler: a label, and an event for each convolution in `run`."""
    if not torch.autograd._profiler_enabled():
        yield
        return
    with record_function(label):
        for reader in run:
            _count(layers.features, reader.weight)
        yield


def _count(x: Tensor, weight: Tensor) -> None:
    """The event of a product that has the multiplications of this convolution of ``x: (N, *spatial, C)``."""
    taps = weight[0].numel()
    sizes = (x.numel() // x.shape[-1], taps), (taps, len(weight))
    rows, columns = (x.new_empty(size, device="meta") for size in sizes)
    with _RecordFunctionFast("aten::mm", [rows, columns], {}):
        pass
