"""Arrays of NumPy in files: in pickles, and in the archives that ``np.savez`` writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import IO, Any

import torch

from efficient_densenet.weights.pickles import Stub
from efficient_densenet.weights.stored import Storage, StoredTensor

_DTYPES = {
    **{"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "b1": torch.bool, "u1": torch.uint8},
    **{"i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64},
}
_MAGIC = b"\x93NUMPY"
_HEADER = re.compile(r"\{'descr': '([<>|=]?)(\w+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \}\s*")
# As NumPy has them.
_LONGEST_HEADER = 10_000
_MOST_DIMENSIONS = 64


def array_of_pickle(made: Stub) -> StoredTensor | None:
    """The array that the pickle would have made there; None if it is not one of plain little-endian numbers."""
    name = made.name.replace("numpy._core.", "numpy.core.")  # before and since NumPy 2
    axes: list[Any] = []  # their order, where it is another than that of the memory
    try:
        if name == "numpy.core.multiarray._reconstruct":
            _, shape, dtype, by_columns, data = made.state
        elif name == "numpy.core.numeric._frombuffer":
            data, dtype, shape, order, *axes = made.arguments
            by_columns = order == "F"
        elif name == "numpy.core.multiarray.scalar":
            (dtype, data), shape, by_columns = made.arguments, (), False
        else:
            return None
        (code, *_), (_, order, *_) = dtype.arguments, dtype.state
        array = _array(order, code, shape, by_columns, *_bytes(data))
        for axis_order in axes:
            shape, stride = zip(*[(array.shape[axis], array.stride[axis]) for axis in axis_order], strict=True)
            array = replace(array, shape=shape, stride=stride)
        return array
    except (AttributeError, LookupError, TypeError, ValueError):
        return None


def array_of_archive(file: IO[bytes], nbytes: int, read: Callable[[], bytearray]) -> StoredTensor | None:
    """The array in a file ``.npy``; None if it is not one of plain little-endian numbers.

    Args:
        file: at its beginning; the header is read.
        nbytes: of the whole file.
        read: gives the whole file.

    Raises:
        ValueError: it is damaged.
    """
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("an array begins otherwise than those of NumPy")
    major, _ = file.read(2)
    length = int.from_bytes(file.read(2 if major == 1 else 4), "little")
    header = _HEADER.fullmatch(file.read(length).decode("latin-1")) if length <= _LONGEST_HEADER else None
    if header is None or header[1] == ">" or header[2] not in _DTYPES:
        return None
    order, code, by_columns, sides = header.groups()
    shape = [int(side) for side in sides.split(",") if side.strip()]
    start = file.tell()
    return _array(order, code, shape, by_columns == "True", nbytes - start, lambda: read()[start:])


def _array(
    order: str, code: str, shape: Sequence[int], by_columns: bool, nbytes: int, read: Callable[[], bytearray]
) -> StoredTensor:
    """The array whose bytes `read` gives, `nbytes` of them.

    Raises:
        LookupError, TypeError, ValueError: these do not make one of plain little-endian numbers.
    """
    dtype = _DTYPES[code.lstrip("<|=")]
    if order == ">":
        raise ValueError("its numbers are big-endian")
    if len(shape) > _MOST_DIMENSIONS or any(type(number) is not int for number in shape):
        raise TypeError("it has no shape")
    strides, step = [], 1
    for number in shape if by_columns else reversed(shape):
        strides.append(step)
        step *= number
    if step * dtype.itemsize != nbytes:  # or many small arrays could share what is read for each anew
        raise ValueError("its bytes are more or fewer than its numbers")
    stride = tuple(strides if by_columns else strides[::-1])
    return StoredTensor(Storage("", dtype, nbytes // dtype.itemsize, lambda _: read()), dtype, 0, tuple(shape), stride)


def _bytes(data: Any) -> tuple[int, Callable[[], bytearray]]:
    """How many bytes they are, and what gives them: in old protocols they are the characters of a text."""
    if isinstance(data, Stub) and data.name == "_codecs.encode" and data.arguments[1:] == ("latin1",):
        data = data.arguments[0]
    if isinstance(data, str):
        return len(data), lambda: bytearray(data, "latin-1")
    return len(data), lambda: bytearray(data)
