"""Find and load the compiled kernels, and tell why not."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

INSTRUCTIONS = {0: "baseline (SSE2 or NEON)", 1: "AVX2", 2: "AVX-512", 3: "AVX-512 with bfloat16"}
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

_int, _index, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_rows = [_pointer, _index]  # a matrix: data, and values from row to row
_SIGNATURES = {
    "convolve": [_int, *_rows, *[_pointer] * 4, *_rows, _pointer, _int],
    "convolve_backward": [_int, *_rows, *_rows, *[_pointer] * 5, *_rows, _int, _pointer, _pointer, _int],
    "suits": [_int, _index, _index],
    "prologue": [_int, *_rows, _index, _index, _pointer, _pointer, _pointer, _int],
    "prologue_pool": [_int, *_rows, _pointer, _index, _pointer, _pointer, _pointer, _int],
    "copy_moments": [_int, *_rows, _index, _index, *_rows, _pointer, _index, _int],
    "accumulate": [_int, _pointer, *_rows, _index, _index, *[_pointer] * 3, *_rows, _int, _pointer, _int],
    "accumulate_pool": [_int, _pointer, *_rows, _pointer, _index, *[_pointer] * 3, *_rows, _int, _pointer, _int],
    "max_pool": [_int, *_rows, _pointer, _index, _pointer, _pointer, *_rows, _pointer, _int],
    "max_pool_backward": [_int, *_rows, _pointer, *_rows, _pointer, _index, *[_pointer] * 3, *_rows, _pointer, _int],
    "finish": [_int, *_rows, *_rows, _index, _index, *[_pointer] * 3, *_rows, _int],
}  # fmt: skip
_TELLING = ("suits", "convolve", "convolve_backward")


class Loaded(NamedTuple):
    """The kernels, or None; and in words what is in use, or why there are none."""

    kernels: Any  # a ctypes.CDLL with the functions of `_SIGNATURES`
    description: str
    convolves: frozenset[torch.dtype] = frozenset()  # for which types there are products on this processor


@functools.cache
def load() -> Loaded:
    """The kernels that were built when the package was installed; warns once where there are none."""
    found = sorted(Path(__file__).parent.glob("_kernels*"))
    library = next((path for path in found if path.suffix in (".so", ".pyd", ".dylib")), None)
    if library is None:
        loaded = Loaded(None, "not built: there was no C++ compiler when the package was installed")
    else:
        try:
            loaded = open_library(library)
        except OSError as error:
            loaded = Loaded(None, f"{library.name} cannot be loaded: {error}")
    if loaded.kernels is None:
        warnings.warn(
            f"the native CPU kernels are {loaded.description}; plain PyTorch runs in their place, with the same "
            "results, but slower: install a C++ compiler and the package again",
            stacklevel=2,
        )
    return loaded


def open_library(path: Path, instructions: int = max(INSTRUCTIONS)) -> Loaded:
    """Load kernels from a file, to use instructions up to these.

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
    chosen = INSTRUCTIONS[kernels.ed_start(*functions, instructions)]
    convolves = frozenset(dtype for dtype, number in TYPES.items() if kernels.ed_convolves(number))
    threads = "on PyTorch's threads" if openmp else "on one thread: PyTorch's OpenMP was not found"
    return Loaded(kernels, f"{path.name}, {chosen}, {threads}", convolves)


def _running_openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that PyTorch has started: a second one beside it would fight with it for the processor."""
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
