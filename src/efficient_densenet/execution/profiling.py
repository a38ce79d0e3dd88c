"""Labels in traces of PyTorch's profiler: which part of a network an operator belongs to, in forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function


def labelled(label: str) -> AbstractContextManager[Any]:
    """What runs in this context stands under `label` in a trace; without a profiler it does nothing."""
    return record_function(label) if _profiled() else nullcontext()


def label_backward(made: Tensor, label: str) -> None:
    """What the node of the graph that made this tensor does in backward stands under `label` too."""
    node = made.grad_fn if _profiled() else None
    if node is None:
        return
    open_labels: list[Any] = []

    def begin(_gradients: Any) -> None:
        open_labels.append(record_function(label))
        open_labels[-1].__enter__()

    def end(*_gradients: Any) -> None:
        open_labels.pop().__exit__(None, None, None)

    node.register_prehook(begin)
    node.register_hook(end)


def _profiled() -> bool:
    return not torch.compiler.is_compiling() and torch.autograd._profiler_enabled()
