"""Launches on addresses that repeat, as CUDA graphs: which are captured, and which are kept.

The driver is asked for the graphs, and not PyTorch, whose `torch.cuda.CUDAGraph` prepares for operations that allocate
memory and draw random numbers. These launches do neither. PyTorch 2.11 would start two kernels more at each replay, and
where a capture fails would leave its allocator and its random numbers as if the capture went on
(pytorch/pytorch#180395): the next dropout would raise.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

_MOST_LAUNCHES = 4096  # in all graphs together: each takes some 20 to 64 kB of the GPU's memory, by what others counted
_MOST_SEEN = 4096  # keys that are remembered
_UNUSED = 4096  # calls after which a graph that was not replayed may make room
_MOST_FAILURES = 3  # a lack of memory stays, but what another thread does to a capture happens once
_THREAD_LOCAL, _NON_BLOCKING = 1, 1  # cuda.h

Start = Callable[[int], None]
"""Starts kernels in the stream with this handle."""


class Graphs:
    """The graphs of a process. A key becomes one when it is met for the second time, if there is room.

    A graph makes room only when nobody has replayed it for long. So where there are too many keys, some are graphs and
    stay it, the others start kernel by kernel, and none is captured to be given up at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # the backward pass has threads of its own
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()  # those replayed last are the last
        self._seen: OrderedDict[int, None] = OrderedDict()  # hashes of keys, which may be long
        self._launches = self._calls = self._failures = 0

    def replayed(self, key: Hashable, launches: int, start: Start, stream: int) -> bool:
        """Whether these launches are started, as a graph; if not, none of them is. On the current device.

        Args:
            key: what decides on the launches, with all addresses.
            launches: how many there are.
            start: starts them, in the stream that it is given.
            stream: in which the graph is replayed.
        """
        # A graph of somebody else's gets the launches themselves. On ROCm no graph has been tried: a query of an event
        # by another thread, as that of NCCL, ends a capture there.
        if launches < 2 or torch.version.hip is not None or torch.cuda.is_current_stream_capturing():
            return False
        try:
            graph = self._graph_of(key, launches, start)
            if graph is not None:
                graph.replay(stream)
        # A graph takes memory of its own, also when it is first replayed. Another thread may have ended the capture,
        # which is `CannotStart` of a kernel that may well start outside of it. If it does not, that is raised there.
        except (RuntimeError, OSError, AttributeError) as error:  # the last two: another driver than is known here
            with self._lock:
                self._drop(key)
                self._failures += 1
                first = self._failures == 1
            if first:
                warnings.warn(
                    f"kernels start one by one, for a CUDA graph of them cannot be made or replayed: {error}",
                    stacklevel=2,
                )
            return False
        return graph is not None

    def _graph_of(self, key: Hashable, launches: int, start: Start) -> Graph | None:
        with self._lock:
            self._calls += 1
            known = self._kept.get(key)
            if known is not None:
                self._kept.move_to_end(key)
                known.call = self._calls
                return known.graph
            if self._is_new(key) or self._failures >= _MOST_FAILURES or not self._has_room(launches):
                return None
            graph = Graph(start)
            self._kept[key] = _Kept(graph, launches, self._calls)
            self._launches += launches
            return graph

    def _is_new(self, key: Hashable) -> bool:
        number = hash(key)
        if number in self._seen:
            return False
        self._seen[number] = None
        while len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return True

    def _has_room(self, launches: int) -> bool:
        while self._launches + launches > _MOST_LAUNCHES:
            oldest = next(iter(self._kept), None)
            if oldest is None or self._calls - self._kept[oldest].call < _UNUSED:
                return False
            self._drop(oldest)
        return True

    def _drop(self, key: Hashable) -> None:
        known = self._kept.pop(key, None)
        self._launches -= known.launches if known else 0


class Graph:
    """What a function starts, as one launch, on what then lies at its addresses. On the current device.

    Raises:
        RuntimeError: the driver says no, now or in a replay.
    """

    def __init__(self, start: Start) -> None:
        stream, captured = _stream(torch.cuda.current_device()), ctypes.c_void_p()
        self._executable = ctypes.c_void_p()
        _ask("cuStreamBeginCapture_v2", stream, _THREAD_LOCAL)
        try:
            try:
                start(stream)
            finally:
                _ask("cuStreamEndCapture", stream, ctypes.byref(captured))
            _ask("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), captured, 0)
        finally:
            if captured:
                _ask("cuGraphDestroy", captured)
        # If it is still running, the driver does that later.
        weakref.finalize(self, _driver().cuGraphExecDestroy, self._executable).atexit = False

    def replay(self, stream: int) -> None:
        """Start it."""
        _ask("cuGraphLaunch", self._executable, stream)


@dataclass
class _Kept:
    graph: Graph
    launches: int
    call: int
    """The number of the call in which it was last replayed."""


@functools.cache
def _stream(device: int) -> int:
    """On which graphs are captured. One of PyTorch's may be somebody else's too, whose launches would get into it."""
    stream = ctypes.c_void_p()
    _ask("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
    assert stream.value
    return stream.value


def _ask(name: str, *arguments: Any) -> None:
    """Call a function of the driver."""
    error = getattr(_driver(), name)(*arguments)
    if error:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(error, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()}")


_HANDLE, _RESULT = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
_ARGUMENTS = {
    "cuStreamCreate": (_RESULT, ctypes.c_uint),
    "cuStreamBeginCapture_v2": (_HANDLE, ctypes.c_int),
    "cuStreamEndCapture": (_HANDLE, _RESULT),
    "cuGraphInstantiateWithFlags": (_RESULT, _HANDLE, ctypes.c_ulonglong),
    "cuGraphDestroy": (_HANDLE,),
    "cuGraphLaunch": (_HANDLE, _HANDLE),
    "cuGraphExecDestroy": (_HANDLE,),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}
"""Of the functions that are used, as in cuda.h; all return an error, or 0."""


@functools.cache
def _driver() -> Any:
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    for name, types in _ARGUMENTS.items():
        getattr(driver, name).argtypes = types
    return driver
