"""Tools that look at a network from outside, or transform it: what of them is met at a call, and what it needs.

They watch or replace single operations, and the shared buffer is one operation for a whole block. docs/tools.md says,
tool by tool, what happens.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from efficient_densenet import ops
from efficient_densenet.adopt.kinds import CONVOLUTIONS
from efficient_densenet.execution.recompute import Recorder

_TRACED = "it is traced, as the ordinary operations"
# Modes that count what runs and change nothing: they may see an operation that is computed again.
_COUNTERS = "torch.utils.flop_counter"

# What the parts of a DenseNet call. (Patching tools put functions of their own there, for the whole process.)
_FUNCTIONS = itemgetter(
    *("batch_norm", "conv1d", "conv2d", "conv3d", "relu", "relu_", "pad"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
)
_TENSOR_FUNCTIONS = itemgetter("batch_norm", "cat", "conv1d", "conv2d", "conv3d", "relu", "relu_")
_CLASSES = (
    *(nn.Sequential, nn.ReLU, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, *CONVOLUTIONS),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
)


def needs_ordinary(x: Any) -> str | None:
    """Why only the ordinary operations will do at a call with `x`, if so; an empty reason is none to tell."""
    # What `is_exporting` returns; but PyTorch 2.11 takes that for true wherever it compiles.
    if torch.jit.is_tracing() or torch.compiler._is_exporting_flag:
        return _TRACED
    if torch.compiler.is_compiling():
        return _nothing_to_run_on(x)
    if any(isinstance(argument, Proxy) for argument in (x if isinstance(x, tuple) else (x,))):
        return _TRACED
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms it, for which it must consist of ordinary operations"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives need the ordinary operations"
    if torch._C._len_torch_dispatch_stack() and not ops.computes_nothing():  # as these modes of `step` have it
        for mode in _get_current_dispatch_mode_stack():
            if not isinstance(mode, Recorder) and type(mode).__module__ != _COUNTERS:
                return f"{type(mode).__name__} watches each operation, or replaces it"
    return _nothing_to_run_on(x)


def _nothing_to_run_on(x: Any) -> str | None:
    """Empty batches, and numbers that are no floating-point numbers, are what the ordinary operations make of them."""
    return "" if isinstance(x, Tensor) and not (x.numel() and x.is_floating_point()) else None


def watched_calls() -> str | None:
    """Why each function of PyTorch must be called as the ordinary network calls it, if so."""
    if torch._C._len_torch_function_stack():
        for mode in _get_current_function_mode_stack():
            if not isinstance(mode, DeviceContext):
                return f"{type(mode).__name__} watches each call of PyTorch, or replaces it"
    return replaced_calls()


def replaced_calls() -> str | None:
    """Why each function of PyTorch must be called as it is now, if somebody has replaced one."""
    return None if _called() == _CALLED else "functions or classes of PyTorch were replaced, and must be called"


def _called() -> list[Any]:
    """What is called now."""
    methods = [kind.forward for kind in _CLASSES]
    convolutions = [kind._conv_forward for kind in CONVOLUTIONS]
    return [*_FUNCTIONS(vars(F)), *_TENSOR_FUNCTIONS(vars(torch)), nn.Module.__call__, *methods, *convolutions]


_CALLED = _called()
