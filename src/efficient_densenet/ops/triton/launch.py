"""From tensors to a kernel's arguments, and the launch."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import gcd, prod
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from efficient_densenet.ops.layout import row_stride, stride_of_rows
from efficient_densenet.ops.triton.tiles import Tile

RUN_TIME = (
    *("x_stride", "y_stride", "out_stride", "grad_stride", "grad_out_stride", "grad_x_stride", "through_stride"),
    *("rows", "blocks", "rows_per_block", "rows_per_part", "rows_per_image"),
    *("depth", "height", "width", "channels", "outputs", "eps"),
    *("stride_output", "stride_channel", "stride_tap", "number", "taps"),
)
"""Arguments whose values the compiler must not look at, or it would compile again for some of them."""

VECTORS = (
    *("mean", "y_mean", "variance", "inverse", "scale", "shift", "bias", "mean_out", "variance_out"),
    *("through", "count", "grad_bias"),
)
"""Numbers per channel, which begin anywhere in a longer vector: the compiler must not look at where."""


_MOST = 2**30  # rows are counted in 32 bits, and so is where a tile or a part of them would end


class CannotStart(RuntimeError):
    """A kernel cannot be compiled, loaded or started, and no other kernel of its operation has been started."""


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels start on this device."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


@contextmanager
def operation(device: torch.device) -> Iterator[None]:
    """The kernels that are `run` inside start at the end, on this device: none of them if one cannot be compiled.

    So that another way can be tried instead, which then adds to what nobody has added to before.

    Raises:
        CannotStart: see there. An exception of a later kernel's start is passed on as it is.
    """
    with on(device):
        with collected() as launches:
            yield
        start_all(launches)


@contextmanager
def collected() -> Iterator[list[functools.partial]]:
    """The kernels that are `run` inside do not start: the list gets what starts them, in their order."""
    launches: list[functools.partial] = []
    outer, _of_this_thread.launches = getattr(_of_this_thread, "launches", None), launches
    try:
        yield launches
    finally:
        _of_this_thread.launches = outer


def start_all(launches: Iterable[functools.partial]) -> None:
    """Start them.

    Raises:
        CannotStart: the first one does not start. An exception of a later one is passed on as it is.
    """
    for number, start in enumerate(launches):
        try:
            start()
        except RuntimeError as error:  # what the driver says
            if number:
                raise
            raise CannotStart(f"a kernel does not start: {_first_line(error)}") from error


_of_this_thread = threading.local()  # the backward pass has threads of its own


def run(kernel: Any, programs: int, tile: Tile, *arguments: Any) -> None:
    """Compile `kernel`, and start `programs` programs of it: at the end of the `operation`, outside of one at once.

    They start on the current device, in the current stream.

    Raises:
        CannotStart: it cannot be compiled or loaded.
    """
    if isinstance(arguments[0], FakeTensor):  # a step is planned, and what matters are the tensors
        start = functools.partial(_nothing, *arguments)
    else:
        start = _compiled_for(kernel, programs, tile, arguments)
    launches = getattr(_of_this_thread, "launches", None)
    if launches is None:
        start()
    else:
        launches.append(start)


def _nothing(*arguments: Any) -> None:
    pass


def _compiled_for(kernel: Any, programs: int, tile: Tile, arguments: tuple) -> functools.partial:
    """What starts the kernel, compiled and loaded.

    To find the compiled kernel for some arguments takes Triton three times as long as to start it: what is the same
    for the compiler is looked up here instead.
    """
    pointers, constants = _layout(kernel.fn)
    seen = [(t.dtype, t.data_ptr() % 16 == 0) for t in pointers(arguments)]
    key = (kernel.fn, tile, arguments[0].device, arguments[constants:], *seen)
    compiled = _compiled.get(key)
    try:
        if compiled is None:
            compiled = kernel.warmup(*arguments, grid=(programs,), **tile.sizes, **options(tile))
            if compiled is None:  # the interpreter compiles nothing
                return functools.partial(kernel[(programs,)], *arguments, **tile.sizes, **options(tile))
            if torch.version.hip is None:  # for ROCm the compiler looks at the sizes of memory too
                _compiled[key] = compiled
        start = compiled[(programs, 1, 1)]
    except Exception as error:  # Triton's own, of the compilers that it calls, and of the driver
        raise CannotStart(f"{kernel.fn.__name__} cannot be compiled or loaded: {_first_line(error)}") from error
    return functools.partial(start, *arguments, *tile.sizes.values())


_compiled: dict[tuple, Any] = {}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def options(tile: Tile) -> dict[str, Any]:
    """What the compiler is asked for; that includes what later versions of Triton no longer do by themselves: to fuse a
    product and a sum to one instruction."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


@functools.cache
def _layout(function: Callable[..., Any]) -> tuple[Callable[[Any], Any], int]:
    """What picks the tensors out of the arguments of a kernel; and the first that is a constant for the compiler."""
    parameters = list(inspect.signature(function).parameters.values())
    constants = next(i for i, p in enumerate(parameters) if "constexpr" in str(p.annotation))
    return itemgetter(*[i for i, p in enumerate(parameters[:constants]) if p.name not in RUN_TIME]), constants


def ceil_div(size: int, part: int) -> int:
    """As `triton.cdiv`, which takes microseconds on the host."""
    return -(-size // part)


def matrix(x: Tensor) -> tuple[Tensor, int]:
    """`x`, or a copy if it must be, with evenly spaced rows; and how far apart they are."""
    stride = row_stride(x)
    return (x.contiguous(), x.shape[-1]) if stride is None else (x, stride)


def packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight with its memory as that of ``(O, taps, C)``: a copy of a window's, unless it is channels-last."""
    if weight.dtype == dtype and is_packed(weight):
        return weight
    return weight.to(dtype).movedim(1, -1).contiguous().movedim(-1, 1)


def is_packed(weight: Tensor) -> bool:
    """Whether a weight's channels lie side by side, its taps after each other, and its outputs last."""
    if weight.dim() == 3:
        return weight.movedim(1, -1).is_contiguous()
    return weight.is_contiguous(memory_format=torch.channels_last if weight.dim() == 4 else torch.channels_last_3d)


def stride_of_taps(weight: Tensor) -> int:
    """How far the taps of a weight lie apart: the stride of the last direction that has several.

    A direction of a single pixel may have any stride, by which nothing is ever multiplied.
    """
    strides = [stride for size, stride in zip(weight.shape[2:], weight.stride()[2:], strict=True) if size > 1]
    return strides[-1] if strides else 0


@functools.lru_cache(maxsize=4096)  # a network asks for the same few, thousands of times
def uncovered(x: torch.Size, out: torch.Size, strides: Sequence[int], kernel: torch.Size | None, pool: int) -> str:
    """Why the kernels do not cover an operation on such shapes, with such strides of its output; or nothing."""
    if stride_of_rows(out, strides) is None:
        return "the output is no slice of the channels of a channels-last tensor"
    if max(prod(x[:-1]), prod(out[:-1])) > _MOST:
        return "there are more than 2³⁰ pixels"
    if kernel is not None and any(k % 2 == 0 for k in kernel):
        return f"the kernel's size {list(kernel)} is not odd"
    if kernel is not None and pool > 1 and max(kernel) > 1:
        return f"there is a pool of {pool} before a kernel of size {list(kernel)}"
    return ""


def cube(size: Sequence[int]) -> tuple[int, ...]:
    """1, 2 or 3 sizes as 3: missing ones are 1."""
    return (*[1] * (3 - len(size)), *size)


@functools.lru_cache(maxsize=1024)
def windows(kernel: Sequence[int], pool: int) -> tuple[int, ...]:
    """The taps of a kernel in three directions, and the pixels of a pool's window."""
    return *cube(kernel), *cube([pool] * len(kernel))


def aligned(*vectors: Tensor) -> bool:
    """Whether they all begin at multiples of 16 bytes."""
    return not any(_address(vector) % 16 for vector in vectors)


def _address(x: Tensor) -> int:
    """Where it begins; of a tensor without values, how far behind where its memory would begin."""
    return int(x.storage_offset()) * x.element_size() if isinstance(x, FakeTensor) else x.data_ptr()


def common_divisor(x: Tensor, *sizes: int) -> int:
    """The number of values, at most 16 bytes of them, by which all sizes can be divided: see `rows`."""
    return gcd(16 // x.element_size(), *sizes)
