"""Triton's interpreter for the tests, and the CPU in a GPU's place. The interpreter is on before a kernel is defined.

As a plugin (``pytest -p triton_interpreter -m gpu``, with ``TRITON_INTERPRET=1``) it runs tests that are for a GPU: to
see that the tests themselves are sound, on small shapes, where there is none. It knows no graphs, streams or autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def correct_bfloat16(setattr_: Any = setattr) -> None:
    """Two things that every device does and the interpreter does not.

    It takes the bits of bfloat16 for numbers in a product, and cuts them off instead of rounding to the nearest.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, *rest):
        single = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, *single, *rest)

    def cast_impl(self, source, to):
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            bits = torch.tensor(source.data).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, source, to)

    setattr_(builder, "create_dot", create_dot)
    setattr_(builder, "cast_impl", cast_impl)


class InPlaceOfAGpu(TorchFunctionMode):
    """Whatever is said to be on a GPU is on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def pytest_configure() -> None:
    from efficient_densenet.ops import triton as kernels

    torch.cuda.is_available = lambda: True
    torch.nn.Module.cuda = lambda self: self

    def supports(x):
        reason = "" if x.dtype in kernels._TYPES else f"there are none for {x.dtype}"
        if reason:
            kernels._warn(reason)
        return not reason

    kernels.supports = supports
    correct_bfloat16()
    InPlaceOfAGpu().__enter__()
