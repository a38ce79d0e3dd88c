"""Watch modules run: every operation and every module, and what each tensor that depends on the input means.

The words for that are here; `record` gives them to tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_densenet.adopt.owners import Owners
from efficient_densenet.execution.plan import Blur, Convolution, Dropout, Entry, Norm, Step
from efficient_densenet.execution.recompute import written

_VALUES = {"numpy", "tolist", "item", "__array__", "__dlpack__", "__bool__", "__float__", "__int__", "__index__"}
_NORMS = {"batch_norm", "group_norm", "instance_norm", "layer_norm"}
_SIZES = {"shape", "size", "numel", "nelement", "__len__", "stride", "is_contiguous"}


class NotDenseError(Exception):
    """Why a module computes something else than what was looked for.

    Attributes:
        concatenates: whether it concatenates its input with what convolutions made, as dense layers do.
    """

    def __init__(self, reason: str, concatenates: bool = False) -> None:
        super().__init__(reason)
        self.concatenates = concatenates


class OtherWidthError(Exception):
    """The input should have had `width` channels."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.width = width


class Features(NamedTuple):
    """Pieces, concatenated: 0 is the input, others are made by convolutions."""

    pieces: tuple[int, ...]

    @property
    def single(self) -> int | None:
        """The piece that these are, if they are one, and not the input."""
        return self.pieces[0] if len(self.pieces) == 1 and self.pieces != (0,) else None


class Normed(NamedTuple):
    """Features behind a norm; and why it is none for the shared buffer, if so."""

    source: Features
    norm: Norm | None
    obstacle: str | None


class Active(NamedTuple):
    """Behind a norm and an activation; and why that is none for the shared buffer."""

    normed: Normed
    obstacle: str | None


class Stepped(NamedTuple):
    """A piece behind pools and the like, and then a blur."""

    piece: int
    steps: tuple[Step, ...]
    blur: Blur | None = None


class Scaled(NamedTuple):
    """Features times a constant for each channel: half of a frozen norm."""

    source: Features
    scale: Tensor


class Noise(NamedTuple):
    """An empty tensor, then what dropout multiplies by: `rate` is known once it is filled, and scaled at the end."""

    shape: torch.Size
    rate: float | None = None
    scaled: bool = False


class Zero(NamedTuple):
    """The number that dropout multiplies by if everything is dropped."""


class Other(NamedTuple):
    """Computed from the input by an operation that means nothing by itself."""

    reason: str


@dataclass(frozen=True)
class Piece:
    """What a convolution made; the input where there is no `source`; for a stem, the norm's output without convolution.

    Attributes:
        channels: that it has.
        source: what the convolution read; features only at the beginning of a stem.
        convolution: None if it is one that the shared buffer cannot run, for the reason in `obstacle`.
        kernel: its window.
        dropouts: behind it.
        entry: how it goes over the image, at the beginning of a stem.
    """

    channels: int
    source: Active | Normed | Features | None = None
    convolution: Convolution | None = None
    obstacle: str | None = None
    kernel: tuple[int, ...] = ()
    dropouts: tuple[Dropout, ...] = ()
    entry: Entry | None = None

    @property
    def normed(self) -> Normed | None:
        """What the rectifier or convolution read, if it was behind a norm."""
        return normed_of(self.source)


def normed_of(meaning: Any) -> Normed | None:
    """What is behind a norm, and perhaps an activation."""
    meaning = meaning.normed if isinstance(meaning, Active) else meaning
    return meaning if isinstance(meaning, Normed) else None


class Meanings:
    """What each tensor is that depends on the input, while modules run.

    Attributes:
        owners: of the tensors of all modules that may run, in the order of `plan.parts`.
        looks_at_sizes: whether a forward asked for the size of such a tensor, or gave it another.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.owners = Owners(modules)
        # By the address of the memory (which the tensors keep from being used for others), and the view of it.
        self.known: dict[int, dict[tuple, tuple[Any, Tensor]]] = {}
        # Memory that was written to: what is not known to be something else has none of its former meanings.
        self.written: set[int] = set()
        self.looks_at_sizes = False
        self.looks_at_values = False  # of tensors that do not depend on the input, such as buffers
        self.made: dict[int, Tensor] = {}

    def watch(self, module: nn.Module, x: Tensor) -> Any:
        """Run the module, and show every operation in it, and every module, to the methods below."""
        for one in self.owners.modules:
            one._forward_pre_hooks[0] = self._enter
            one._forward_hooks[0] = self._leave
        try:
            with _Attributes(self), _Operations(self):
                return module(x)
        finally:
            for one in self.owners.modules:
                one._forward_pre_hooks.clear()
                one._forward_hooks.clear()

    def meaning(self, tensor: Any) -> Any:
        """What the tensor is; None where it does not depend on the input."""
        if not isinstance(tensor, Tensor) or tensor in self.owners:
            return None
        address = storage(tensor)
        if address not in self.known:
            return None
        found = self.known[address].get(_geometry(tensor))
        if found is None and address in self.written:
            return Other("it writes into a part of a tensor")
        return None if found is None else found[0]

    def knows(self, tensor: Any) -> bool:
        """Whether it depends on the input."""
        with torch._C.DisableTorchFunction():
            return self.meaning(tensor) is not None

    def set(self, tensor: Tensor, meaning: Any) -> None:
        self.known.setdefault(storage(tensor), {})[_geometry(tensor)] = meaning, tensor

    def _enter(self, module: nn.Module, inputs: tuple) -> None:
        with torch._C.DisableTorchFunction():
            self.enter(module, self.meaning(inputs[0]) if len(inputs) == 1 else None)

    def _leave(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        with torch._C.DisableTorchFunction():
            self.leave(module, output)

    @property
    def module(self) -> nn.Module | None:
        """The innermost one whose forward is running."""
        return None

    @property
    def inside_torch(self) -> bool:
        """Whether that is a module of PyTorch's own, which does not decide by what it asks."""
        return self.module is not None and type(self.module).__module__.startswith("torch.nn.")

    def enter(self, module: nn.Module, given: Any) -> None:
        """A module begins to run, on one tensor of the meaning `given`, or on something else (None)."""

    def leave(self, module: nn.Module, output: Any) -> None:
        """It has run."""

    def before(self, packet: Any, args: Sequence[Any]) -> None:
        """An operation is about to run."""

    def before_norm(self, x: Any, vectors: Sequence[Tensor]) -> None:
        """A norm with these vectors is about to run, and may check their lengths before any operation does."""

    def after(self, function: Any, args: Sequence[Any], named: dict[str, Any], output: Any) -> None:
        """It has run."""


class _Operations(TorchDispatchMode):
    """Shows every operation to a record."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would import the compiler, which takes seconds, and nothing here is compiled

    def __init__(self, record: Meanings) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        with torch._C.DisableTorchFunction():  # or the record would see its own questions
            self.record.before(function.overloadpacket, args)
            for tensor in written(function, args, named):
                if tensor not in self.record.owners and storage(tensor) not in self.record.made:
                    raise NotDenseError("its forward writes to a tensor of something else")
            output = function(*args, **named)
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, Tensor):
                    self.record.made[storage(tensor)] = tensor  # which keeps the address from being used again
            self.record.after(function, args, named, output)
        return output


class _Attributes(TorchFunctionMode):
    """Shows a record what the forward asks a tensor, other than to compute with it."""

    def __init__(self, record: Meanings) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in _NORMS and args:
            vectors = [a for a in (*args[1:], *(kwargs or {}).values()) if isinstance(a, Tensor)]
            with torch._C.DisableTorchFunction():
                self.record.before_norm(args[0], vectors)
        if name == "__get__":
            name = getattr(getattr(function, "__self__", None), "__name__", "")
        if name in _VALUES and args and isinstance(args[0], Tensor) and not self.record.knows(args[0]):
            self.record.looks_at_values |= not self.record.inside_torch
        if name in _SIZES | _VALUES and args and self.record.knows(args[0]):
            if name in _VALUES:
                raise NotDenseError("its forward looks at the values of its features")
            self.record.looks_at_sizes |= not self.record.inside_torch
        return function(*args, **(kwargs or {}))


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _geometry(tensor: Tensor) -> tuple:
    return tensor.storage_offset(), tensor.shape, tensor.stride()
