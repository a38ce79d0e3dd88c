"""Which modules hold the tensors of an operation, and what it is in a plan: a norm, a convolution or a filter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from efficient_densenet.adopt.kinds import is_plain_convolution
from efficient_densenet.execution.plan import Blur, Convolution, Norm, Step

_aten = torch.ops.aten
_OF_A_NORM = ("weight", "bias", "running_mean", "running_var")
_PADS = {_aten.reflection_pad2d: "reflect", _aten.constant_pad_nd: "constant"}


class Owners:
    """Modules by their numbers, and parameters and buffers by the modules that hold them.

    The arguments of the methods are those of an operation of PyTorch, and the innermost module that runs meanwhile.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.numbers = {module: i for i, module in enumerate(modules)}
        self._found: dict[int, tuple[int, str]] = {}  # number of the module and name there, by the tensor's identity
        for i, module in enumerate(modules):
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    self._found.setdefault(id(tensor), (i, name))

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._found

    def batch_norm(self, module: Any, args: Sequence[Any]) -> tuple[Norm | None, str | None]:
        """The norm that a batch norm of PyTorch's is; or None, and why it is none for the shared buffer."""
        tensors, (training, momentum, eps) = args[1:5], args[5:]
        found = [None if t is None else self._found.get(id(t)) for t in tensors]
        names: Any = _OF_A_NORM
        part = self.numbers.get(module, -1)
        own = isinstance(module, _BatchNorm) and all(
            t is None or f == (part, n) for t, f, n in zip(tensors, found, names, strict=True)
        )
        if not own:
            parts = {f[0] for f in found if f is not None}
            if len(parts) != 1 or any(t is not None and f is None for t, f in zip(tensors, found, strict=True)):
                return None, "the tensors of a norm are computed, or belong to several modules"
            (part,) = parts
            names = tuple(None if f is None else f[1] for f in found)
            module = self.modules[part]
        uses_batch = module.training or tensors[2] is None
        if training and not uses_batch:
            return None, f"{type(module).__name__} uses the batch's statistics in evaluation"
        own_eps = own and module.eps == eps
        frozen = uses_batch and not training
        return Norm(part, names, (0, 0), (), None if own_eps else eps, None if own else momentum, frozen), None

    def frozen_norm(self, module: Any) -> tuple[Norm | None, str | None]:
        """That of a scale and a shift made of a module's tensors; whether they are made so is tried."""
        if module in self.numbers and all(isinstance(getattr(module, n, None), Tensor) for n in _OF_A_NORM):
            eps = None if isinstance(getattr(module, "eps", None), float) else 1e-5
            return Norm(self.numbers[module], _OF_A_NORM, (0, 0), (), eps, 0.0, True), None
        name = "it" if module is None else type(module).__name__
        return None, f"{name} scales and shifts, and is not a norm of known tensors"

    def convolution(self, module: nn.Module | None, weight: Tensor, bias: Tensor | None) -> Convolution | None:
        """Where weight and bias belong, if they belong to one module."""
        if is_plain_convolution(module):
            assert module is not None
            return Convolution(self.numbers[module], ("weight", "bias"))
        owner, of_bias = self._found.get(id(weight)), None if bias is None else self._found.get(id(bias))
        if owner is None or (bias is not None and (of_bias is None or of_bias[0] != owner[0])):
            return None
        return Convolution(owner[0], (owner[1], None if of_bias is None else of_bias[1]))

    def blur(self, pad: Step, args: Sequence[Any], channels: int) -> Blur | None:
        """A convolution that filters each channel by a constant, with the padding before it; None if it is another."""
        _, weight, bias, stride, padding, dilation, transposed, _, groups = args
        part, name = self._found.get(id(weight), (-1, ""))
        constant = part >= 0 and name in self.modules[part]._buffers
        plain = bias is None and not transposed and not any(padding) and set(dilation) == {1}
        packet: Any = getattr(pad.function, "overloadpacket", None)  # dropout is a plain function
        mode = _PADS.get(packet)
        if not constant or not plain or not (groups == weight.shape[0] == channels) or mode is None:
            return None
        if any(pad.arguments[1:]) or len(stride) != 2 or len(pad.arguments[0]) != 4:
            return None
        return Blur(part, name, tuple(pad.arguments[0]), mode, tuple(stride))
