"""Launches of kernels, recorded once and started again with other tensors: see `repeated`.

To find and start a kernel takes the host longer than many kernels take on the GPU: tiles are chosen, strides divided,
scratch is allocated, compiled kernels looked up. For the same shapes all of that comes out the same. What changes from
call to call is where the tensors lie; and in training that repeats too, for PyTorch gives the memory of the last step
to the next one. Launches on tensors that lie where others lay before are a CUDA graph, which is one launch.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_densenet.ops.triton import launch, tiles, tuning
from efficient_densenet.ops.triton.graphs import Graphs

_MOST = 1024  # recordings; each new size of the images makes some
_ALIGNMENT = 512  # of scratch, as of what PyTorch allocates

Operation = Callable[[], Any]
Operations = Callable[[], Iterable[Operation]]


def repeated(key: Hashable, tensors: Sequence[Tensor | None], operations: Operations) -> bool:
    """Start what some operations launch as it was recorded, or record it before.

    Args:
        key: what decides on the launches, besides the layout of the tensors.
        tensors: all that the launches work on, in an order that says what is what; the first is an activation. What
            else they work on is scratch: nobody reads it after its operation.
        operations: gives the operations in their order, where they have to be recorded.

    Returns:
        Whether it is started. Nothing is where an operation does more than to launch kernels: where it copies a tensor
        that lies in memory in another way than they want it, for one.

    Raises:
        CannotStart: see there.
    """
    distinct: dict[int, Any] = dict(zip(map(id, tensors), tensors, strict=True))  # layers may share one
    distinct.pop(id(None), None)
    given, which = [*distinct.values()], None
    if len(given) < len(tensors):
        numbers = {identity: number for number, identity in enumerate(distinct)}
        which = tuple([numbers.get(id(x)) for x in tensors])
    if isinstance(given[0], FakeTensor):  # a step is planned
        torch.empty(scratch_of(given, operations()), dtype=torch.uint8, device=given[0].device)
        return True
    addresses, device = [x.data_ptr() for x in given], given[0].device
    key = (
        *(key, which, device, tiles.device_of(device), tiles.precision(given[0])),
        tuple([(x.dtype, x.shape, x.is_contiguous() or x.stride()) for x in given]),
        tuple([address % 16 for address in addresses]),
    )
    recording = _recordings.get(key, _UNKNOWN)
    with launch.on(device):
        try:
            if recording is _UNKNOWN:
                recording = _recorded(given, operations)
                _keep(key, recording)
            if recording is not None:
                recording.start(given, addresses)
        except launch.CannotStart:
            _keep(key, None)  # it is not tried again
            raise
    return recording is not None


def scratch_of(given: Sequence[Tensor], operations: Iterable[Operation]) -> int:
    """Bytes of scratch of a recording: what the operation works on that takes most, besides these tensors."""
    most, known = 0, {x.untyped_storage()._cdata for x in given}
    for operation in operations:
        with launch.collected() as launches:
            operation()
        storages = [x.untyped_storage() for start in launches for x in start.args if isinstance(x, Tensor)]
        sizes = {storage._cdata: storage.nbytes() for storage in storages if storage._cdata not in known}
        most = max(most, sum(map(_aligned, sizes.values())))
    return most


def _aligned(size: int) -> int:
    """The bytes that a tensor of this size takes of the scratch."""
    return launch.ceil_div(size, _ALIGNMENT) * _ALIGNMENT


def _recorded(given: Sequence[Tensor], operations: Operations) -> Recording | None:
    """The launches of these operations, none of which is started; None where that is not all that they do."""
    if tuning.AUTOTUNE:  # times kernels, which is more
        for operation in operations():
            with launch.collected():
                operation()
    recording = Recording(given)
    with _Computing() as computing:
        for operation in operations():
            with launch.collected() as launches:
                operation()
            recording.add(launches)
    return None if computing.found or recording.ambiguous else recording


class _Computing(TorchDispatchMode):
    """Finds out whether PyTorch computes something, and does not only allocate memory and look at it in another way."""

    found = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.found |= "empty" not in function.__name__
        elif isinstance(result, Tensor):
            # In inference and in operators `contiguous`, `to` and `reshape` come here whole: views by their schema, and
            # yet they may copy.
            self.found |= result.untyped_storage()._cdata != args[0].untyped_storage()._cdata
        return result


class Pointer(NamedTuple):
    """Which argument of a launch points where: so many bytes behind the start of a tensor, or of the scratch."""

    argument: int
    tensor: int  # its number among those given; the scratch comes after the last
    offset: int
    dtype: torch.dtype


class Recording:
    """Launches of some operations, one after the other.

    Args:
        given: the tensors that will be others at the next time.

    Attributes:
        ambiguous: whether a launch points to where two of them are.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        self._given = [_extent(x) for x in given]
        self._starts = {extent.start: number for number, extent in enumerate(self._given)}
        self._launches: list[tuple[functools.partial, list, list[Pointer]]] = []
        self._scratch = 0
        self.ambiguous = len(self._starts) < len(given)

    def add(self, operation: Iterable[functools.partial]) -> None:
        """Take in the launches of an operation, as `launch.collected` gives them."""
        offsets: dict[int, int] = {}
        size = 0
        for started in operation:
            pointers, arguments = [], list(started.args)
            for i, argument in enumerate(arguments):
                if not isinstance(argument, Tensor):
                    continue
                address = argument.data_ptr()
                number = self._number_of(address)
                if number is not None:
                    offset = address - self._given[number].start
                else:
                    storage = argument.untyped_storage()
                    if storage.data_ptr() not in offsets:
                        offsets[storage.data_ptr()] = size
                        size += _aligned(storage.nbytes())
                    number, offset = len(self._given), offsets[storage.data_ptr()] + address - storage.data_ptr()
                pointers.append(Pointer(i, number, offset, argument.dtype))
                arguments[i] = None  # or the tensor would live on
            self._launches.append((functools.partial(started.func, **started.keywords), arguments, pointers))
        self._scratch = max(self._scratch, size)

    def _number_of(self, address: int) -> int | None:
        """Of the tensor that is there; None: it is scratch."""
        if address in self._starts:  # maybe in the gaps of another one, between its rows
            return self._starts[address]
        numbers = [number for number, extent in enumerate(self._given) if address in extent]
        self.ambiguous |= len(numbers) > 1
        return numbers[0] if numbers else None

    def start(self, given: Sequence[Tensor], addresses: Sequence[int]) -> None:
        """Start them all, in the current stream, on these tensors, which lie and are aligned as those recorded.

        Raises:
            CannotStart: see there.
        """
        device = given[0].device
        scratch = [torch.empty(self._scratch, dtype=torch.uint8, device=device)] if self._scratch else []
        if device.type == "cpu":  # the interpreter
            tensors = [*given, *scratch]
            launch.start_all(
                functools.partial(
                    start, *_filled(template, [(p.argument, _at(tensors[p.tensor], p)) for p in pointers])
                )
                for start, template, pointers in self._launches
            )
            return
        places = (*addresses, *[x.data_ptr() for x in scratch])
        start, stream = functools.partial(self._start_each, places), torch.cuda.current_stream(device).cuda_stream
        if not _graphs.replayed((self, places), len(self._launches), start, stream):
            start(stream)

    def _start_each(self, addresses: Sequence[int], stream: int) -> None:
        """All launches one by one, on tensors and scratch at these addresses, in the stream with this handle."""
        launch.start_all(
            functools.partial(
                start,
                *_filled(
                    template, [(argument, addresses[number] + offset) for argument, number, offset, _ in pointers]
                ),
                stream=stream,
            )
            for start, template, pointers in self._launches
        )


_graphs = Graphs()
_lock = threading.Lock()  # the backward pass has threads of its own
_recordings: dict[Hashable, Recording | None] = {}  # None: it cannot be recorded, or not started
_UNKNOWN: Any = object()


def _keep(key: Hashable, recording: Recording | None) -> None:
    """The latest recordings are kept."""
    with _lock:
        _recordings[key] = recording
        while len(_recordings) > _MOST:
            del _recordings[next(iter(_recordings))]


def _filled(template: Sequence[Any], values: Iterable[tuple[int, Any]]) -> list[Any]:
    """A copy of the arguments of a launch, with these values at these places."""
    arguments = [*template]
    for place, value in values:
        arguments[place] = value
    return arguments


def _extent(x: Tensor) -> range:
    """The addresses of its bytes, from the first to the last."""
    last = sum([(size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)])
    return range(x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size())


def _at(x: Tensor, pointer: Pointer) -> Tensor:
    """What begins so many bytes behind the start of a tensor, for the interpreter, which wants no addresses."""
    if x.dtype != pointer.dtype:
        return x[pointer.offset :].view(pointer.dtype)
    return x.as_strided((1,), (1,), x.storage_offset() + pointer.offset // x.element_size())
