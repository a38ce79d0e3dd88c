"""Tensors in files, before they are read: what a file declares about them, checked against what it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from efficient_densenet.weights.pickles import Makers, Name, Stub

_MAX_DIMENSIONS = 16
_DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "QInt8": torch.qint8,
    "QUInt8": torch.quint8,
    "QInt32": torch.qint32,
    "QUInt4x2": torch.quint4x2,
    "QUInt2x4": torch.quint2x4,
    "Untyped": torch.uint8,
}
_STORAGES = {f"{name}Storage": dtype for name, dtype in _DTYPES.items()}
_NAMED_DTYPES = {str(dtype): dtype for dtype in _DTYPES.values() if not str(dtype).startswith("torch.q")}


@dataclass(frozen=True)
class Storage:
    """A stretch of numbers in a file.

    Args:
        key: what the file calls it.
        dtype: of the numbers.
        numel: how many there are.
        read: gives the bytes of the storage with this key, always the same object.
    """

    key: str
    dtype: torch.dtype
    numel: int
    read: Callable[[str], bytearray]

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage, like a tensor, but nothing has been read.

    Raises:
        ValueError: the shape does not lie within the storage.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.shape) > _MAX_DIMENSIONS or len(self.shape) != len(self.stride):
            raise ValueError(f"a tensor of {len(self.shape)} dimensions has {len(self.stride)} strides")
        for number in (self.offset, *self.shape, *self.stride):
            if type(number) is not int or not 0 <= number < 2**63:
                raise ValueError("a tensor's offset, size or stride is not a number that it can be")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        if 0 not in self.shape and (last + 1) * self.dtype.itemsize > self.storage.nbytes:
            raise ValueError(f"a tensor does not fit into its storage of {self.storage.nbytes} bytes")

    @property
    def nbytes(self) -> int:
        """Of a copy in which no two elements share memory."""
        return prod(self.shape) * self.dtype.itemsize

    def load(self) -> Tensor:
        """The tensor, a view of the storage's bytes."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        numbers = torch.frombuffer(self.storage.read(self.storage.key), dtype=self.dtype)
        return numbers.as_strided(self.shape, self.stride, self.offset)


def referred(reference: Any, read: Callable[[str], bytearray]) -> Any:
    """What a pickle of `torch.save` refers to by a persistent ID: ``("storage", type, key, device, numel)``.

    Before zip archives there was ``("module", class, file, source)`` too, for a class with its source code.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "module":
        return reference[1]
    if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
        raise ValueError("the pickle refers to something other than a storage")
    kind, key, _, numel, *view = reference[1:6]
    if view and view[0] is not None:
        raise ValueError("a storage is a part of another one, as only PyTorch before 0.4 wrote")
    name = kind.dotted.rpartition(".")[2] if isinstance(kind, Name) else ""
    if name not in _STORAGES or not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 2**63:
        raise ValueError("a storage has an unknown type or size")
    return Storage(key, _STORAGES[name], numel, read)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any, dtype: Any = None) -> StoredTensor | Stub:
    if isinstance(storage, Stub):  # pickled with the tensor
        return Stub("tensor that pickle.dump wrote: load it where it was made, and save it with torch.save")
    if not isinstance(storage, Storage):
        raise TypeError("a tensor has no storage")
    return StoredTensor(storage, dtype or storage.dtype, offset, tuple(size), tuple(stride))


def _tensor_with_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> StoredTensor | Stub:
    known = _NAMED_DTYPES.get(dtype.dotted) if isinstance(dtype, Name) else None
    if known is None:
        return Stub("tensor of an unknown dtype")
    return _tensor(storage, offset, size, stride, dtype=known)


def _tensor_of_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    maker = TENSOR_MAKERS.get(function.dotted) if isinstance(function, Name) else None
    if maker and maker is not _tensor_of_type:
        return maker(*arguments)
    return Stub(kind.dotted if isinstance(kind, Name) else "tensor of an unknown type")


TENSOR_MAKERS: Makers = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type": _tensor_of_type,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    "fastai.torch_core._fa_rebuild_tensor": lambda kind, *arguments: _tensor(*arguments),
    "torch._dynamo.eval_frame.OptimizedModule": lambda module, *_: module,
    "torch.Size": lambda sizes=(): tuple(sizes),
}
