"""Forget what concatenations, norms and activations make; compute it again in backward, bit for bit.

The autograd graph is the ordinary one, node for node: only what its nodes *store* is replaced, through saved-tensor
hooks, by a promise to compute it again. So the sums of backward run in the ordinary order, gradients of gradients
exist, and every result equals the ordinary one in its last bit.

Which operation made a tensor is known from a dispatch mode, which sees every operation that any code runs. Nothing is
asked of modules: their own forward runs, once, with their hooks, whatever it is. In backward only the operations
listed here run again, never a convolution and nothing random, on tensors that are alive anyway, or on a copy of what
is overwritten later in the same forward. Running statistics are left out of that, so they move once per step, however
often backward runs. (Checkpointing that runs a whole layer again moves them twice:
https://github.com/pytorch/pytorch/issues/96136.)

Saved for backward: references to the inputs of the forgotten operations, and small tensors (weights, batch
statistics). Extra time: one concatenation, norm and activation per convolution, in backward.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily

_aten = torch.ops.aten
# Arguments 3, 4 and 5 are the running statistics and whether the batch's own are used instead.
_BATCH_NORMS = {
    _aten.native_batch_norm,
    _aten._native_batch_norm_legit,
    _aten.cudnn_batch_norm,
    _aten.miopen_batch_norm,
}
_NAMES = """
    cat batch_norm_elemt native_group_norm native_layer_norm _fused_rms_norm relu threshold leaky_relu elu celu hardtanh
    hardswish hardsigmoid silu mish gelu softplus sigmoid tanh _prelu_kernel clamp clamp_min mul add sub div _to_copy
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_trilinear3d
"""
_RANDOM_SLOPES = {_aten.rrelu_with_noise, _aten.rrelu_with_noise_}
_CHEAP = frozenset(_BATCH_NORMS) | {getattr(_aten, name) for name in _NAMES.split() if hasattr(_aten, name)}


@contextmanager
def recomputing() -> Iterator[None]:
    """Whatever code runs in this context, autograd keeps no result of an operation that is cheap to compute again.

    For what stands around converted dense blocks, such as the decoder of a segmentation network:
    ``with recomputing(): scores = model(images)``. Backward computes concatenations, norms, activations and upsampled
    activations again, never a convolution and nothing random. Results are the same in every bit; running statistics
    move once. Dense blocks on the shared buffer keep what they keep, and code that `torch.compile` made is not
    reached. It is for one forward pass: leave it before backward, or what it has noted stays in memory.

    Raises:
        RuntimeError: hooks on saved tensors are switched off here (by PyTorch).
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    recorder = Recorder(_CHEAP)
    with saved_tensors_hooks(recorder.pack, _unpack), recorder:
        try:
            yield
        finally:
            recorder.results.clear()  # the graph, which they belong to, keeps the recorder
            recorder.readers.clear()


def unrecorded() -> AbstractContextManager[Any]:
    """What runs in this context is not looked at by `recomputing`: its operations are others'."""
    if torch.compiler.is_compiling() or not isinstance(_get_current_dispatch_mode(), Recorder):
        return nullcontext()
    return _pop_mode_temporarily()


def obstacle() -> str | None:
    """Why nothing can be forgotten here, if so."""
    if torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return None
    return "hooks on saved tensors, by which it forgets, are switched off"


class _Kept(NamedTuple):
    """A tensor that stays, with the version that autograd would have checked (hooks switch its check off)."""

    tensor: Tensor
    version: int

    def value(self) -> Tensor:
        """The tensor, if it still holds what forward saw."""
        if _version(self.tensor) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {tuple(self.tensor.shape)} is at version {self.tensor._version}, and backward "
                f"needs version {self.version} of it"
            )
        return self.tensor


class _Result:
    """The result of an operation that is cheap to compute again, and how.

    What was computed again stays until every promise of it was kept, or backward ends.
    """

    def __init__(self, function: Any, arguments: Sequence[Any], named: dict[str, Any]) -> None:
        self.function, self.arguments, self.named = function, arguments, named
        self.uses = 0  # promises that backward may ask to be kept
        self.left = 0  # of these, in the running backward
        self.again: Tensor | None = None

    def use(self) -> None:
        self.uses += 1
        if self.uses == 1:
            for argument in _leaves(self.arguments):
                if isinstance(argument, _Promise):
                    argument.result.use()

    def value(self) -> Tensor:
        if self.again is None:
            arguments = [_value(argument) for argument in self.arguments]
            with torch.no_grad():
                made = self.function(*arguments, **self.named)
            made = made[0] if isinstance(made, tuple | list) else made
            if self.uses == 1 or not _when_backward_ends(partial(_forget, weakref.ref(self))):
                return made
            self.again, self.left = made, self.uses
        made, self.left = self.again, self.left - 1
        if self.left == 0:
            self.again = None
        return made


def _forget(reference: weakref.ref[_Result]) -> None:
    """What was computed again. Weakly referred to: what it was computed from is free once its promises are kept."""
    result = reference()
    if result is not None:
        result.again = None


class _Promise(NamedTuple):
    """A saved tensor that will be computed again: a view of the result of an operation."""

    result: _Result
    size: Sequence[int]
    stride: Sequence[int]
    offset: Any

    def value(self) -> Tensor:
        return self.result.value().as_strided(self.size, self.stride, self.offset)


class Recorder(TorchDispatchMode):
    """Notes which operation made each tensor, and has autograd save promises of what can be computed again."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would import the compiler, which takes seconds, and nothing here is compiled

    def __init__(self, cheap: frozenset[Any]) -> None:
        super().__init__()
        self.cheap = cheap
        # By the address of a storage, which is not reused while anything refers to it, even weakly; with its type.
        self.results: dict[int, tuple[StorageWeakRef, _Result, torch.dtype]] = {}
        # By the address of a storage, what is computed from it as it is now.
        self.readers: dict[int, list[weakref.ref[_Result]]] = {}

    def pack(self, tensor: Tensor) -> _Kept | _Promise:
        """What autograd saves in place of `tensor`: of an input before, of an output after `__torch_dispatch__`."""
        reference = self._reference(tensor)
        if isinstance(reference, _Promise):
            reference.result.use()
        elif tensor.grad_fn is not None:  # an output, which would keep the node that is to keep it
            return reference._replace(tensor=tensor.detach())
        return reference

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        cheap, in_place = self._cheap(function)
        result = None if cheap is None else self._result(cheap, args, named, in_place)
        sloped = self._reference(args[0]) if function.overloadpacket in _RANDOM_SLOPES else None
        for tensor in written(function, args, named):
            if _has_storage(tensor):
                self._before_writing(tensor)
        output = function(*args, **named)
        if sloped is not None:
            result = self._sloped(sloped, output, *args)
        if result is not None:
            made = output[0] if isinstance(output, tuple | list) else output
            if _is_whole(made) and _holds_little(result, made):
                storage = made.untyped_storage()
                self.results[storage._cdata] = StorageWeakRef(storage), result, made.dtype
                for argument in _leaves(result.arguments):
                    if isinstance(argument, _Kept) and _has_storage(argument.tensor):
                        self.readers.setdefault(_address(argument.tensor), []).append(weakref.ref(result))
        return output

    def _before_writing(self, tensor: Tensor) -> None:
        """What was computed from the values that will be lost is computed again from a copy of them."""
        address = _address(tensor)
        self.results.pop(address, None)
        copies: dict[Hashable, Tensor] = {}  # what several results are computed from is copied once
        for reference in self.readers.pop(address, ()):
            result = reference()
            if result is not None:
                result.arguments = [_copied(argument, address, copies) for argument in result.arguments]

    def _sloped(
        self, before: _Kept | _Promise, made: Tensor, x: Tensor, noise: Tensor, *settings: Any
    ) -> _Result | None:
        """RReLU in training, which multiplies its input `before` by what it has drawn, or by one.

        What it has drawn for half precision it keeps with fewer digits than it multiplies by.
        """
        training = len(settings) > 2 and settings[2]
        is_lost = isinstance(before, _Kept) and _version(before.tensor) != before.version
        is_rounded = noise.dtype not in (torch.float32, torch.float64)
        if not training or is_lost or is_rounded or not made.stride() == noise.stride() == x.stride():
            return None
        return _Result(_aten.mul.Tensor, [before, self._reference(noise)], {})

    def _cheap(self, function: Any) -> tuple[Any, bool]:
        """The operation to run again, out of place, if `function` is cheap; and whether it writes to its argument."""
        packet, overload = function.overloadpacket, function._overloadname
        if not function._schema.is_mutable or (packet in _BATCH_NORMS and "out" not in overload):
            return function if packet in self.cheap else None, False
        name = packet.__name__
        packet = getattr(_aten, name.removesuffix("_"), None) if name.endswith("_") else None
        if packet is None or packet not in self.cheap or overload not in packet.overloads():
            return None, True
        return getattr(packet, overload), True

    def _result(self, cheap: Any, args: Sequence[Any], named: dict[str, Any], in_place: bool) -> _Result | None:
        if cheap is _aten.cat.default:
            parts: list[Any] = []
            for tensor in args[0]:
                part = self._reference(tensor)
                parts += _pieces(part, tensor, args[1:]) or [part]
            return _Result(cheap, [parts, *args[1:]], named)
        arguments = [self._reference(a) if isinstance(a, Tensor) else a for a in args]
        if in_place:
            if not isinstance(arguments[0], _Promise):
                return None  # what it was computed from is gone
            if any(torch.result_type(args[0], a) != args[0].dtype for a in args if isinstance(a, Tensor)):
                return None  # out of place, its result would have another type
        if cheap.overloadpacket in _BATCH_NORMS and cheap._overloadname == "default":
            training, running = args[5], args[3:5]
            # In evaluation the result depends on them, and a later training step may move them.
            arguments[3:5] = [None if training or t is None else _Kept(t.clone(), 0) for t in running]
        return _Result(cheap, arguments, named)

    def _reference(self, tensor: Tensor) -> _Kept | _Promise:
        found = self.results.get(_address(tensor)) if _has_storage(tensor) else None
        if found is None or found[2] != tensor.dtype:  # or it is a view as another type
            return _Kept(tensor, _version(tensor))
        return _Promise(found[1], tensor.shape, tensor.stride(), tensor.storage_offset())


def _pieces(part: _Kept | _Promise, tensor: Tensor, dim: Sequence[Any]) -> list[Any] | None:
    """What a concatenation along the same dimension was made of: concatenated at once, nothing is copied twice."""
    if not isinstance(part, _Promise) or part.result.function is not _aten.cat.default or not _is_whole(tensor):
        return None
    pieces, *other = part.result.arguments
    return list(pieces) if other == list(dim) else None


def _is_whole(tensor: Tensor) -> bool:
    """Whether it is an activation, and all of its memory. (Complex numbers have views that are conjugate.)"""
    if tensor.dim() < 3 or not tensor.is_floating_point() or not _has_storage(tensor):
        return False
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # tensors made in inference mode have none


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _has_storage(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter, FakeTensor) and tensor.layout == torch.strided


def _holds_little(result: _Result, made: Tensor) -> bool:
    """Whether keeping what it is computed from takes no more memory than keeping it."""
    if result.function is _aten.cat.default:
        return True
    held = [a for a in result.arguments if isinstance(a, _Kept) and a.tensor.numel() >= made.numel()]
    return len(held) <= 1


def _leaves(arguments: Sequence[Any]) -> Iterator[Any]:
    """The arguments, and those in lists among them."""
    for argument in arguments:
        if isinstance(argument, list):
            yield from _leaves(argument)
        else:
            yield argument


def written(function: Any, args: Sequence[Any], named: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation of PyTorch writes to."""
    given = [args[i] if i < len(args) else named.get(name) for i, name in _changed(function, _trains(function, args))]
    return [tensor for tensor in _leaves(given) if isinstance(tensor, Tensor)]


@functools.cache
def _changed(function: Any, training: bool) -> list[tuple[int, str]]:
    """The arguments that an operation writes to, by their numbers and names."""
    changed = []
    for i, argument in enumerate(function._schema.arguments):
        if argument.name in ("running_mean", "running_var"):  # not all batch norms declare that they move them
            writes = training
        else:
            writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes:
            changed.append((i, argument.name))
    return changed


def _trains(function: Any, args: Sequence[Any]) -> bool:
    """Whether it is no batch norm, or one that uses the statistics of its batch."""
    return function.overloadpacket not in _BATCH_NORMS or function._overloadname != "default" or bool(args[5])


def _copied(argument: Any, address: int, copies: dict[Hashable, Tensor]) -> Any:
    """The argument, with a copy in place of a tensor at this address."""
    if isinstance(argument, list):
        return [_copied(a, address, copies) for a in argument]
    if not isinstance(argument, _Kept) or not _has_storage(argument.tensor) or _address(argument.tensor) != address:
        return argument
    tensor, version = argument
    if _version(tensor) != version:
        return argument  # it was lost before, and backward will say so
    key = tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
    if key not in copies:
        copies[key] = _copy(tensor)
    return _Kept(copies[key], _version(copies[key]))


def _copy(tensor: Tensor) -> Tensor:
    """A copy with the strides of the tensor, also if its values have gaps between them, or lie on each other."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    values = tensor.as_strided((span if tensor.numel() else 0,), (1,)).clone()
    return values.as_strided(tensor.shape, tensor.stride())


def _value(argument: Any) -> Any:
    if isinstance(argument, _Kept | _Promise):
        return argument.value()
    return [_value(a) for a in argument] if isinstance(argument, list) else argument


def _unpack(packed: _Kept | _Promise) -> Tensor:
    with torch._C._DisableAutocast():  # the operations were recorded below it, with the casts that it had made
        return packed.value()


def _when_backward_ends(callback: Callable[[], None]) -> bool:
    """Have `callback` called when the running backward is over; False if none is running."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(callback)
    except RuntimeError:
        return False
    return True
