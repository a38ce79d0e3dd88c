"""A backend while PyTorch's profiler watches: each operation has its own and its backend's name in the trace.

The profiler counts multiplications by the names of PyTorch's own operations, and kernels of ours have none. So a
norm–relu–convolution holds an event of a matrix product of the same size. As everywhere in PyTorch, the shapes decide:
how a convolution is computed (by Winograd's transform, after its pool) does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch._C._profiler import _RecordFunctionFast
from torch.profiler import record_function


class Profiled:
    """The operations of a backend, in labels."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        operation, label = getattr(self._backend, name), f"{self._backend.__name__.rpartition('.')[2]}.{name}"

        def labelled(*arguments: Any, **named: Any) -> Any:
            with record_function(label):
                for x, weight in _convolutions(name, arguments):
                    _count(x, weight)
                return operation(*arguments, **named)

        return labelled


def _convolutions(operation: str, arguments: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The activations and the weight of each convolution that this operation computes, if there are any."""
    if operation == "norm_relu_conv":
        yield arguments[0], arguments[2]
    elif operation in ("run_layers", "run_layers_backward"):
        layers, readers = arguments[0], arguments[0].readers
        if operation == "run_layers_backward":
            readers = readers[arguments[1].start * 2 :: 2] if arguments[1].made_again else []
        for reader in readers:
            yield layers.features, reader.weight


def _count(x: Tensor, weight: Tensor) -> None:
    """The event of a product that has the multiplications of this convolution of ``x: (N, *spatial, C)``."""
    taps = weight[0].numel()
    sizes = (x.numel() // x.shape[-1], taps), (taps, len(weight))
    rows, columns = (x.new_empty(size, device="meta") for size in sizes)
    with _RecordFunctionFast("aten::mm", [rows, columns], {}):
        pass
