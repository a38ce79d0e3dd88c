"""What a file of weights holds, as plain values and tensors that are not read yet. Nothing in a file is executed.

Memory: at most 16 times the size of the file and 128 MiB, whatever the file declares.
"""

from __future__ import annotations

import codecs
import errno
import io
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from efficient_densenet.errors import UserError, require
from efficient_densenet.weights.arrays import array_of_archive
from efficient_densenet.weights.pickles import Stub, read_pickle
from efficient_densenet.weights.stored import TENSOR_MAKERS, Storage, StoredTensor, referred

# What parsing damaged bytes raises: found by damaging files.
_DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the files that torch.save wrote before they were zip archives
_PROTOCOL = 1001  # their second one
_SLACK = 2**20  # for small files, in bytes
_KINDS_BY_START = {
    b"version https://git-lfs": "a pointer of Git LFS: get the file itself with `git lfs pull`",
    b"<": "a web page: download the file again",
    b"\x1f\x8b": "compressed: unpack it with gunzip",
    b"BZh": "compressed: unpack it with bunzip2",
    b"\xfd7zXZ": "compressed: unpack it with unxz",
    b"\x89HDF": "an HDF5 file, as Keras writes: only files of PyTorch and of safetensors are read",
    b"\x93NUMPY": "a single array: write all weights into one file, with np.savez(path, **weights)",
    b"{": "text, such as JSON: get the file with the weights",
}


class Content:
    """What a file holds.

    Attributes:
        path: of the file.
        value: nested dictionaries, lists and plain values, with `StoredTensor` (or tensors) and `Stub` among them.
        files: all that was read: the file, or the index of shards and the shards.
    """

    def __init__(self, path: Path, value: Any, shards: Sequence[Path] = ()) -> None:
        self.path = path
        self.value = value
        self.files = (path, *shards)
        self._left = 2 * sum(file.stat().st_size for file in self.files) + _SLACK

    def check_size(self, tensors: Iterable[StoredTensor | Tensor]) -> None:
        """Refuse `tensors` that cannot all be in this file.

        Raises:
            UserError: they, and those that were read before, are larger than twice the file.
        """
        if sum(tensor.nbytes for tensor in tensors) > self._left:
            raise UserError(
                f"{self.path} declares tensors that are larger than the whole file: it is damaged or hostile"
            )

    def load(self, tensor: StoredTensor | Tensor) -> Tensor:
        """Read one of its tensors.

        Raises:
            UserError: its bytes are damaged, or all that were read would be larger than twice the file.
        """
        self.check_size([tensor])
        self._left -= tensor.nbytes
        with damage_named(self.path):
            return tensor.load() if isinstance(tensor, StoredTensor) else tensor


def read_file(path: Path) -> Content:
    """What is in a file of `torch.save` (of any version, with any suffix), of safetensors or of ``np.savez``.

    A dictionary that `pickle.dump` wrote is read too, but not the tensors of PyTorch in it.

    Raises:
        UserError: there is no such file, it is damaged, or of another kind.
        MissingExtraError: it is a safetensors file and that package is not installed.
    """
    if not path.exists():
        raise UserError(f"there is no file {path}")
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the checkpoint itself")
    with open(path, "rb") as file:
        start = file.read(64)
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path} is cut short: it is empty; copy or download it again")
    if path.suffix == ".safetensors" or (start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size):
        return Content(path, _read_safetensors(path))
    for beginning, kind in _KINDS_BY_START.items():
        if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(beginning):
            raise UserError(f"{path} is not a checkpoint but {kind}")
    with damage_named(path):
        if zipfile.is_zipfile(path):
            return Content(path, _read_archive(path, size))
        if start.startswith(b"\x80"):
            return Content(path, _read_old_format(path, size))
    if start.startswith(b"PK"):
        raise UserError(f"{path} is cut short: copy or download it again")
    raise UserError(f"{path} is not a checkpoint: it is neither of torch.save nor of safetensors")


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turns whatever damaged bytes raise into one sentence about the file at `path`."""
    try:
        yield
    except UserError:
        raise
    except (*_DAMAGED, OSError) as error:
        # A declared position outside the file gives EINVAL; any other OSError is about the disk, not about the file.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        reason = shortened(str(error)) or type(error).__name__
        raise UserError(
            f"{path} is cut short or damaged, or is not a checkpoint ({reason}); copy or download it again"
        ) from error


def shortened(text: str, length: int = 120) -> str:
    """`text` for a message: on one line, and shortened where it is long, whatever a file calls its tensors."""
    text = " ".join(text.split())
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= length else f"{text[: length - 21]}…{text[-20:]}"


def first_few(names: Mapping[str, Any] | list[str], limit: int = 3) -> str:
    """The first of `names` and how many more there are, for a message."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(map(shortened, listed[:limit])) + more


def _read_safetensors(path: Path) -> object:
    safetensors = require("safetensors.torch", "checkpoints")
    try:
        return safetensors.load_file(path)
    except (require("safetensors", "checkpoints").SafetensorError, *_DAMAGED) as error:
        raise UserError(
            f"{path} is cut short or damaged, or is not a safetensors file ({shortened(str(error))})"
        ) from error


def _read_archive(path: Path, size: int) -> object:
    """A zip archive of `torch.save`: the pickle ``ROOT/data.pkl``, and each storage as ``ROOT/data/KEY``.

    Or one of ``np.savez``: each array as ``NAME.npy``.
    """
    archive = zipfile.ZipFile(path)
    records = {record.filename: record for record in archive.infolist()}
    if not any(record.CRC for record in records.values()):  # torch.serialization.set_crc32_options(False)
        for record in records.values():
            del record.CRC
    left = 2 * size + _SLACK  # deflated records
    read: dict[str, bytearray] = {}

    def read_record(name: str) -> bytearray:
        nonlocal left
        if name not in read:
            left -= records[name].file_size
            if left < 0:
                raise ValueError("its records are larger than the file")
            read[name] = bytearray(archive.read(name))
        return read[name]

    roots = [name.removesuffix("data.pkl") for name in records if f"/{name}".endswith("/data.pkl")]
    if not roots and records and all(name.endswith(".npy") for name in records):
        return _arrays(path, archive, read_record)
    if not roots:
        held = f"; unpack it if a checkpoint is in it: it holds {first_few(records)}" if records else ""
        raise UserError(f"{path} is a zip archive without the record data.pkl: it is not of torch.save{held}")
    root = min(roots, key=len)
    byteorder = records.get(f"{root}byteorder")
    if byteorder and byteorder.file_size == len("big"):
        raise UserError(f"{path} was written on a big-endian machine; save it again on a little-endian one")
    pickled = records[f"{root}data.pkl"]
    if pickled.file_size > size + _SLACK:
        raise ValueError("it declares a pickle larger than the file")

    def refer(reference: Any) -> Any:
        storage = referred(reference, lambda key: read_record(f"{root}data/{key}"))
        if isinstance(storage, Storage) and storage.nbytes != records[f"{root}data/{storage.key}"].file_size:
            raise ValueError("a record is not as large as its storage")
        return storage

    return read_pickle(io.BytesIO(archive.read(pickled)), TENSOR_MAKERS, refer, _limit(size))


def _arrays(path: Path, archive: zipfile.ZipFile, read: Callable[[str], bytearray]) -> dict[str, StoredTensor]:
    found = {}
    for name in archive.namelist():
        with archive.open(name) as file:
            array = array_of_archive(file, archive.getinfo(name).file_size, partial(read, name))
        if array is None:
            raise UserError(
                f"{path}: the array {shortened(name)} is not one of plain numbers; write the weights with "
                "np.savez(path, **weights), one array each"
            )
        found[name.removesuffix(".npy")] = array
    return found


def _read_old_format(path: Path, size: int) -> object:
    """Pickles one after another (a magic number, a version, the machine, the object, the keys), then the storages.

    Each storage is its number of elements, in eight bytes, and the elements.
    """
    with open(path, "rb") as opened:
        file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)  # reads no more than there is
    storages: dict[str, Storage] = {}
    starts: dict[str, int] = {}
    read: dict[str, bytearray] = {}

    def read_storage(key: str) -> bytearray:
        if key not in read:
            read[key] = bytearray(file[starts[key] : starts[key] + storages[key].nbytes])
        return read[key]

    def refer(reference: Any) -> Any:
        storage = referred(reference, read_storage)
        return storages.setdefault(storage.key, storage) if isinstance(storage, Storage) else storage

    def read_next() -> Any:
        return read_pickle(file, TENSOR_MAKERS, refer, _limit(size))

    first = read_next()
    if isinstance(first, dict | Stub):
        return first  # of pickle.dump
    if first != _MAGIC:
        raise UserError(f"{path} is a pickle, but not of torch.save; load it where it was made, and save a state dict")
    if read_next() != _PROTOCOL:
        raise ValueError("its format has an unknown version")
    machine = read_next()
    if not machine["little_endian"]:
        raise UserError(f"{path} was written on a big-endian machine; save it again on a little-endian one")
    content, keys = read_next(), read_next()
    position = file.tell()
    for key in keys:
        (numel,) = struct.unpack("<q", file[position : position + 8])
        starts[key] = position + 8
        position += 8 + storages[key].nbytes
        if numel != storages[key].numel or position > size:
            raise ValueError("a storage is not as large as it should be")
    return content


def _limit(size: int) -> int:
    """Instructions of a pickle in a file of so many bytes."""
    return 1_000_000 + size // 64
