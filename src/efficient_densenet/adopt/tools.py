"""Tools that look at a network from outside, or transform it: what of them is met at a call, and what it needs.

They watch or replace single operations, and the shared buffer is one operation for a whole block. docs/tools.md says,
tool by tool, what happens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from efficient_densenet import ops
from efficient_densenet.execution.recompute import Recorder

_TRACED = "it is traced, as the ordinary operations"
# Modes that count what runs and change nothing: they may see an operation that is computed again.
_COUNTERS = "torch.utils.flop_counter"


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
    return None
