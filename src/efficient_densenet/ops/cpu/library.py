"""Find and load the compiled kernels, and tell why not."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from efficient_densenet.ops.cpu.instructions import BEST, Instructions, convolutions, limit

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

_int, _index, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_rows = [_pointer, _index]  # a matrix: data, and values from row to row
_SIGNATURES = {
    "convolve": [_int, *_rows, *[_pointer] * 4, *_rows, _pointer, _int],
    "convolve_backward": [_int, *_rows, *_rows, *[_pointer] * 5, *_rows, _int, _pointer, _pointer, _int],
    "suits": [_int, _index, _index],
    "fold_norm": [_int, *[_pointer] * 4, ctypes.c_double, _index, *[_pointer] * 3],
    "prologue": [_int, *_rows, _index, _index, _pointer, _pointer, _pointer, _int],
    "prologue_pool": [_int, *_rows, _pointer, _index, _pointer, _pointer, _pointer, _int],
    "copy_moments": [_int, *_rows, _index, _index, *_rows, _pointer, _index, _int],
    "accumulate": [_int, _pointer, *_rows, _index, _index, *[_pointer] * 3, *_rows, _int, _pointer, _int],
    "accumulate_pool": [_int, _pointer, *_rows, _pointer, _index, *[_pointer] * 3, *_rows, _int, _pointer, _int],
    "max_pool": [_int, *_rows, _pointer, _index, _pointer, _pointer, *_rows, _pointer, _int],
    "max_pool_backward": [_int, *_rows, _pointer, *_rows, _pointer, _index, *[_pointer] * 3, *_rows, _pointer, _int],
    "mean": [_int, *_rows, _index, _index, _index, _pointer, _pointer, *_rows, _int],
    "mean_backward": [_int, *_rows, *_rows, _index, _index, _index, *[_pointer] * 3, *_rows, _pointer, _int],
    "finish": [_int, *_rows, *_rows, _index, _index, *[_pointer] * 3, *_rows, _int],
}  # fmt: skip
_TELLING = ("suits", "convolve", "convolve_backward")


class Loaded(NamedTuple):
    """The kernels, or None; and in words what is in use, or why there are none."""

    kernels: Any  # a ctypes.CDLL with the functions of `_SIGNATURES`
    description: str
    path: Path | None = None
    instructions: Instructions = Instructions.BASELINE
    convolves: frozenset[torch.dtype] = frozenset()  # the types for which whole convolutions are kernels of ours


_loaded: Loaded | None = None


def load() -> Loaded:
    """The kernels that were built when the package was installed; warns once where there are none.

    Raises:
        UserError: the environment variable for the instructions names no level.
    """
    global _loaded
    if _loaded is None:
        _loaded = _find()
        if _loaded.kernels is None:
            warnings.warn(
                "plain PyTorch runs in place of the native CPU kernels, with the same results, but slower: "
                f"they are {_loaded.description}",
                stacklevel=2,
            )
    return _loaded


def _find() -> Loaded:
    # The shortest name is the newest: earlier versions put the interpreter's into it, and editable installs keep files.
    path = min(Path(__file__).parent.glob("_kernels*.so"), key=lambda path: len(path.name), default=None)
    if path is None and sys.platform == "win32":
        return Loaded(None, "not built for Windows; Windows Subsystem for Linux has them")
    if path is None:
        return Loaded(None, "not built: install a C++ compiler and the package again")
    try:
        return open_library(path, limit())
    except OSError as error:
        return Loaded(None, f"{path.name} cannot be loaded: {error}")


@contextmanager
def held_to(level: Instructions, ours: bool = True) -> Iterator[Loaded]:
    """While this is open, the kernels use no better instructions than these: to test them, and to compare.

    Args:
        level: the best level to use.
        ours: False: PyTorch runs all convolutions, whatever the rule says.
    """
    global _loaded
    before = load()
    assert before.path is not None, before.description
    _loaded = open_library(before.path, level)
    if not ours:
        _loaded = _loaded._replace(convolves=frozenset())
    try:
        yield _loaded
    finally:
        open_library(before.path, before.instructions)  # the level is a setting of the library, which is loaded once
        _loaded = before


def open_library(path: Path, level: Instructions = BEST) -> Loaded:
    """Load kernels from a file, to use instructions up to this level.

    Raises:
        OSError: the file is no library for this machine.
    """
    kernels = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        function = getattr(kernels, f"ed_{name}")
        function.argtypes, function.restype = arguments, _int if name in _TELLING else None
        setattr(kernels, name, function)
    openmp = _running_openmp()
    functions: list[ctypes.c_void_p | None] = [None] * 3
    if openmp is not None:
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        functions = [ctypes.cast(getattr(openmp, name), _pointer) for name in names]
    kernels.ed_start.argtypes = [*[_pointer] * 3, _int]
    level = Instructions(kernels.ed_start(*functions, level))
    convolves = [dtype for dtype in TYPES if convolutions(level, dtype).ours]
    threads = "on PyTorch's threads" if openmp else "on one thread: PyTorch's OpenMP was not found"
    return Loaded(kernels, f"{path.name}, {level.option}, {threads}", path, level, frozenset(convolves))


def _running_openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that PyTorch has started: a second one would compete with it for the processor."""
    if sys.platform == "win32":
        return None
    candidates = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    maps = Path("/proc/self/maps")
    if maps.exists():
        paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()}
        candidates += [Path(path) for path in sorted(paths) if "omp" in Path(path).name and ".so" in path]
    for path in candidates:
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LOCAL)
            library.GOMP_parallel  # noqa: B018 (whether it has it)
        except (OSError, AttributeError):
            continue
        return library
    return None
