"""Launches of kernels, recorded once and started again with other tensors.

To find and start a kernel takes the host longer than many kernels take on the GPU: tiles are chosen, strides divided,
scratch is allocated, compiled kernels looked up. For the same shapes all of that comes out the same. What changes from
call to call is where the tensors lie; and in training that repeats too, for PyTorch gives the memory of the last step
to the next one. Launches on tensors that lie where others lay before are a CUDA graph, which is one launch.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.ops.triton import launch

_MOST = 256  # recordings; each new size of the images makes some
_MOST_GRAPHS = 4  # of a recording; a training step gets the same few places again and again
_MOST_CAPTURES = 32  # of a recording: to capture takes longer than to launch
_MOST_SEEN = 16  # places where the tensors of a recording lay
_ALIGNMENT = 512  # of scratch, as of what PyTorch allocates


class Pointer(NamedTuple):
    """Which argument of a launch points where: so many bytes behind the start of a tensor, or of the scratch."""

    argument: int
    tensor: int  # its number among those given; the scratch comes after the last
    offset: int
    dtype: torch.dtype


class Recording:
    """Launches of some operations, one after the other.

    Args:
        given: the tensors that will be others at the next time, none of which overlaps with another now, while it is
            recorded. What else the launches work on is scratch: nobody reads it after its operation.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        self._given = [_extent(x) for x in given]
        self._launches: list[tuple[functools.partial, list, list[Pointer]]] = []
        self._scratch = 0
        self._seen: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self._graphs: OrderedDict[tuple[int, ...], torch.cuda.CUDAGraph] = OrderedDict()
        self._captures = 0
        self.operations = 0

    def add(self, operation: Iterable[functools.partial]) -> None:
        """Take in the launches of an operation, as `launch.operation` gives them."""
        self.operations += 1
        offsets: dict[int, int] = {}
        size = 0
        for started in operation:
            pointers, arguments = [], list(started.args)
            for i, argument in enumerate(arguments):
                if not isinstance(argument, Tensor):
                    continue
                address = argument.data_ptr()
                number = next((n for n, extent in enumerate(self._given) if address in extent), len(self._given))
                if number < len(self._given):
                    offset = address - self._given[number].start
                else:
                    storage = argument.untyped_storage()
                    if storage.data_ptr() not in offsets:
                        offsets[storage.data_ptr()] = size
                        size += launch.ceil_div(storage.nbytes(), _ALIGNMENT) * _ALIGNMENT
                    offset = offsets[storage.data_ptr()] + address - storage.data_ptr()
                pointers.append(Pointer(i, number, offset, argument.dtype))
                arguments[i] = None  # or the tensor would live on
            self._launches.append((functools.partial(started.func, **started.keywords), arguments, pointers))
        self._scratch = max(self._scratch, size)

    def start(self, given: Sequence[Tensor]) -> None:
        """Start them all, in the current stream, on these tensors, which lie and are aligned as those recorded."""
        scratch = torch.empty(self._scratch, dtype=torch.uint8, device=given[0].device)
        tensors = [*given, scratch]
        if not scratch.is_cuda:  # the interpreter
            for start, template, pointers in self._launches:
                arguments = template.copy()
                for pointer in pointers:
                    arguments[pointer.argument] = _at(tensors[pointer.tensor], pointer)
                start(*arguments)
            return
        addresses = tuple([x.data_ptr() for x in tensors])
        graph = self._graph_of(addresses)
        if graph is None:
            self._start_each(addresses, torch.cuda.current_stream(scratch.device).cuda_stream)
        else:
            graph.replay()

    def _start_each(self, addresses: Sequence[int], stream: int) -> None:
        for start, template, pointers in self._launches:
            arguments = template.copy()
            for argument, number, offset, _ in pointers:
                arguments[argument] = addresses[number] + offset
            start(*arguments, stream=stream)

    def _graph_of(self, addresses: tuple[int, ...]) -> torch.cuda.CUDAGraph | None:
        """The launches on these addresses as a graph, from the second time on that they are asked for."""
        if torch.cuda.is_current_stream_capturing():  # a graph of somebody else's gets the launches themselves
            return None
        with _lock:
            graph = self._graphs.get(addresses)
            if graph is not None:
                self._graphs.move_to_end(addresses)
            elif addresses in self._seen and self._captures < _MOST_CAPTURES:
                graph = self._graphs[addresses] = self._captured(addresses)
                self._captures += 1
                while len(self._graphs) > _MOST_GRAPHS:
                    self._graphs.popitem(last=False)
            else:
                self._seen[addresses] = None
                while len(self._seen) > _MOST_SEEN:
                    self._seen.popitem(last=False)
        return graph

    def _captured(self, addresses: Sequence[int]) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), _stream(torch.cuda.current_device())
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._start_each(addresses, stream.cuda_stream)
            finally:
                graph.capture_end()
        return graph


_lock = threading.Lock()  # the backward pass has threads of its own


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """On which graphs are captured: nothing else runs there."""
    return torch.cuda.Stream(device)


class Recordings:
    """The latest recordings, by what decides on the launches."""

    def __init__(self) -> None:
        self._found: OrderedDict[Hashable, Recording] = OrderedDict()

    def get(self, key: Hashable) -> Recording | None:
        with _lock:
            found = self._found.get(key)
            if found is not None:
                self._found.move_to_end(key)
            return found

    def keep(self, key: Hashable, recording: Recording) -> None:
        with _lock:
            self._found[key] = recording
            while len(self._found) > _MOST:
                self._found.popitem(last=False)


def layout(given: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """What about tensors decides on the launches that work on them: all but where they lie."""
    return tuple([(x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in given])


def overlap(given: Sequence[Tensor]) -> bool:
    """Whether any two of them share memory, so that a launch's pointer may lie in both."""
    extents = sorted([(extent.start, extent.stop) for extent in map(_extent, given)])
    return any(stop > start for (_, stop), (start, _) in pairwise(extents))


def _extent(x: Tensor) -> range:
    """The addresses of its bytes, from the first to the last."""
    last = sum([(size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)])
    return range(x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size())


def _at(x: Tensor, pointer: Pointer) -> Tensor:
    """What begins so many bytes behind the start of a tensor, for the interpreter, which wants no addresses."""
    if x.dtype != pointer.dtype:
        return x[pointer.offset :].view(pointer.dtype)
    return x.as_strided((1,), (1,), x.storage_offset() + pointer.offset // x.element_size())
