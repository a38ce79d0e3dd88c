"""Which tensors the operators can take: dense ones of PyTorch's own class, all with memory on one device.

Kernels find values by their address. A tensor that wraps another one, or whose memory was given back, has none.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from efficient_densenet import ops

_PLAIN = (Tensor, nn.Parameter)


class UnsuitableError(RuntimeError):
    """The operators were given a tensor that they cannot take."""


def unsuitable(tensors: Iterable[Tensor], device: torch.device | None = None) -> str | None:
    """What the first of these tensors is that the operators cannot take, if there is one.

    Args:
        tensors: some tensors.
        device: where they must be; None: wherever they are, and their memory need not be there yet.
    """
    has_memory = device is not None and device.type != "meta"
    for tensor in tensors:
        kind = type(tensor)
        if kind is FakeTensor and ops.computes_nothing():  # a step is planned
            continue
        if kind not in _PLAIN and not _adds_nothing(kind):
            return f"a {kind.__name__}, a tensor of another kind"
        if tensor.layout is not torch.strided or tensor.is_quantized:
            return "a nested tensor" if tensor.is_nested else f"a tensor of another kind ({tensor.layout})"
        if device is not None and tensor.device != device:
            return f"a tensor on {tensor.device}, not on {device}"
        # Not by its address: to ask for that makes a copy of memory that is copied when somebody writes.
        if has_memory and not tensor.untyped_storage().nbytes() and tensor.numel():
            return "a tensor without memory"
    return None


def _adds_nothing(kind: type) -> bool:
    """Whether this class of parameters behaves as its base does."""
    return (
        issubclass(kind, nn.Parameter)
        and kind.__torch_function__ is nn.Parameter.__torch_function__
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )
