"""Triton's interpreter for the tests, and the CPU in a GPU's place. The interpreter is on before a kernel is defined.

As a plugin (``pytest -p triton_interpreter -m gpu``, with ``TRITON_INTERPRET=1``) it runs tests that are for a GPU: to
see that the tests themselves are sound, on small shapes, where there is none. It knows no graphs, streams or autocast.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from stand_in_gpu import InPlaceOfAGpu


def _version(distribution: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(distribution).split(".")[:2])


# It makes numbers of arrays in a way that numpy 2.4 no longer allows.
needs_interpreter = pytest.mark.skipif(
    find_spec("triton") is None or (_version("triton") < (3, 7) and _version("numpy") >= (2, 4)),
    reason="Triton 3.6's interpreter needs numpy < 2.4",
)


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


def without_repetition() -> None:
    """Leave out, in this process, what takes half of the interpreter's time and changes no result."""
    from triton.runtime import interpreter

    patched = set()

    def call(self, *arguments, **named):
        """A function that a kernel calls: what its module sees of the language is patched once, not for each call."""
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **named)

    interpreter.InterpretedFunction.__call__ = call
    # Every sum and product of indices is computed again in 64 bits. In tests none comes near what 32 bits can hold.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def pytest_configure() -> None:
    from efficient_densenet.adopt import decide
    from efficient_densenet.ops import triton as kernels

    torch.cuda.is_available = lambda: True
    torch.nn.Module.cuda = lambda self: self

    def supports(x):
        reason = "" if x.dtype in kernels._TYPES else f"there are none for {x.dtype}"
        if reason:
            kernels._warn(reason)
        return not reason

    kernels.supports = supports
    decide.watched_calls = lambda: None  # the mode that takes the GPU's place changes nothing
    correct_bfloat16()
    without_repetition()
    InPlaceOfAGpu().__enter__()
