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
    if _profiled() and made.grad_fn is not None:
        node: Any = made.grad_fn
        node.metadata["label"] = label


def labelled_backward(node: Any) -> AbstractContextManager[Any]:
    """The context for that. No hooks on the node: for these PyTorch would hold the gradient that it is given."""
    label = node.metadata.get("label")
    return nullcontext() if label is None else labelled(label)


def _profiled() -> bool:
    return not torch.compiler.is_compiling() and torch.autograd._profiler_enabled()
