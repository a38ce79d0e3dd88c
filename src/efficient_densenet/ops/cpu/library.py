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

from efficient_densenet.ops.cpu.instructions import BEST, Instructions, convolutions, limit, limit_of_pytorch

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

_int, _index, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


def _indices(*names: str) -> list[tuple[str, Any]]:
    return [(name, _index) for name in names]


# The structures and the table of functions in `interface.h`, which says what they mean.
class Rows(ctypes.Structure):
    _fields_ = [("data", _pointer), ("ld", _index)]


class Affine(ctypes.Structure):
    _fields_ = [("mean", _pointer), ("scale", _pointer), ("shift", _pointer)]


class Volume(ctypes.Structure):
    _fields_ = _indices("images", "planes", "lines", "pixels", "plane_window", "line_window", "pixel_window")


class Convolution(ctypes.Structure):
    _fields_ = _indices(
        *("images", "height", "width", "window"),
        *("outputs", "inputs", "output_stride", "input_stride", "tap_stride"),
    )


class Reader(ctypes.Structure):
    _fields_ = [
        ("convolution", Convolution),
        *[(name, _pointer) for name in ("weight", "norm_weight", "norm_bias", "mean", "variance")],
        ("eps", ctypes.c_double),
        ("first", _index),
        ("bottleneck", _pointer),
        ("grad_weight", _pointer),
    ]


class Layers(ctypes.Structure):
    _fields_ = [
        ("features", Rows),
        ("width", _index),
        ("readers", ctypes.POINTER(Reader)),
        *_indices("count", "per_layer"),
        *[(name, _pointer) for name in ("means", "variances", "inverse", "scale", "shift")],
    ]


class LayersBackward(ctypes.Structure):
    _fields_ = [
        ("grad", Rows),
        ("start", _index),
        ("made_again", _int),
        ("grad_bottleneck", _pointer),
        ("used", _index),
        *[(name, _pointer) for name in ("values", "constant", "slope", "grad_norm_weight", "grad_norm_bias")],
    ]


class Evaluation(ctypes.Structure):
    _fields_ = [
        ("x", Rows),
        ("layers", Layers),
        ("end", ctypes.POINTER(Reader)),
        ("pool", Volume),
        ("scratch", _pointer),
        ("out", Rows),
    ]


class Stem(ctypes.Structure):
    _fields_ = [
        *_indices(
            *("images", "channels", "height", "width"),
            *("image_stride", "channel_stride", "line_stride", "pixel_stride"),
            *("window_height", "window_width", "vertical_stride", "horizontal_stride"),
            *("vertical_padding", "horizontal_padding", "lines", "pixels", "outputs"),
        ),
        *[(name, _pointer) for name in ("x", "weight", "norm_weight", "norm_bias", "mean", "variance")],
        ("eps", ctypes.c_double),
    ]


_volume, _convolution = ctypes.POINTER(Volume), ctypes.POINTER(Convolution)
_layers, _layers_backward = ctypes.POINTER(Layers), ctypes.POINTER(LayersBackward)
_evaluation, _stem = ctypes.POINTER(Evaluation), ctypes.POINTER(Stem)


def _function(*arguments: Any, tells: bool = False) -> Any:
    return ctypes.CFUNCTYPE(_int if tells else None, *arguments)


class Kernels(ctypes.Structure):
    _fields_ = [
        ("suits", _function(_index, _index, tells=True)),
        ("convolve", _function(Rows, _convolution, _pointer, Affine, Rows, _pointer, _int, tells=True)),
        (
            "convolve_backward",
            _function(*(Rows, Rows, _convolution, _pointer, Affine, Rows, _int, _pointer, _pointer, _int), tells=True),
        ),
        ("run_layers", _function(_layers, _int, _int, _int, tells=True)),
        ("run_layers_backward", _function(_layers, _layers_backward, _int, tells=True)),
        ("evaluate", _function(_evaluation, _int, tells=True)),
        ("evaluate_stem", _function(_stem, Rows, _int, tells=True)),
        ("fold_norm", _function(*[_pointer] * 4, ctypes.c_double, _index, *[_pointer] * 3)),
        ("prologue", _function(Rows, _index, _index, Affine, _pointer, _int)),
        ("prologue_pool", _function(Rows, _volume, _index, Affine, _pointer, _int)),
        ("copy_moments", _function(Rows, _index, _index, Rows, _pointer, _index, _int)),
        ("accumulate", _function(_pointer, Rows, _index, _index, Affine, Rows, _int, _pointer, _int)),
        ("accumulate_pool", _function(_pointer, Rows, _volume, _index, Affine, Rows, _int, _pointer, _int)),
        ("max_pool", _function(Rows, _volume, _index, Affine, Rows, _pointer, _int)),
        ("max_pool_backward", _function(Rows, _pointer, Rows, _volume, _index, Affine, Rows, _pointer, _int)),
        ("mean", _function(Rows, _index, _index, _index, Affine, Rows, _int)),
        ("mean_backward", _function(Rows, Rows, _index, _index, _index, Affine, Rows, _pointer, _int)),
        ("finish", _function(Rows, Rows, _index, _index, *[_pointer] * 3, Rows, _int)),
    ]


_STRUCTURES = (Rows, Affine, Volume, Convolution, Reader, Layers, LayersBackward, Evaluation, Stem, Kernels)


class Loaded(NamedTuple):
    """The kernels of each type, or None; and in words what is in use, or why there are none."""

    kernels: dict[torch.dtype, Kernels] | None
    description: str
    path: Path | None = None
    instructions: Instructions = Instructions.BASELINE
    pytorch: Instructions = Instructions.BASELINE  # what PyTorch's convolutions use
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
        return open_library(path, limit(), limit_of_pytorch())
    except OSError as error:
        return Loaded(None, f"{path.name} cannot be loaded: {error}")


@contextmanager
def held_to(level: Instructions, ours: bool | None = None) -> Iterator[Loaded]:
    """While this is open, the kernels use no better instructions than these: to test them, and to compare.

    Args:
        level: the best level to use, as if the processor had no better.
        ours: who runs convolutions, whatever the rule says: True: kernels of ours, where there are any; False: PyTorch.
    """
    global _loaded
    before = load()
    assert before.path is not None, before.description
    _loaded = open_library(before.path, level, level)
    if ours is not None:
        there = [dtype for dtype, kernels in (_loaded.kernels or {}).items() if ours and kernels.convolve]
        _loaded = _loaded._replace(convolves=frozenset(there))
    try:
        yield _loaded
    finally:
        _loaded = before


def open_library(path: Path, level: Instructions = BEST, pytorch: Instructions = BEST) -> Loaded:
    """Load kernels from a file.

    Args:
        path: the shared library.
        level: the best instructions that its kernels may use.
        pytorch: the best that PyTorch's convolutions may use.

    Raises:
        OSError: the file is no library for this machine.
    """
    library = ctypes.CDLL(str(path))
    interface_bytes = getattr(library, "ed_interface_bytes", int)  # older sources have no such function
    if interface_bytes() != sum(map(ctypes.sizeof, _STRUCTURES)):
        raise OSError("it was built from other sources; install the package again")
    openmp = _running_openmp()
    functions: list[ctypes.c_void_p | None] = [None] * 3
    if openmp is not None:
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        functions = [ctypes.cast(getattr(openmp, name), _pointer) for name in names]
    library.ed_use_openmp.argtypes = [_pointer] * 3
    library.ed_use_openmp(*functions)
    library.ed_kernels.restype = ctypes.POINTER(Kernels)
    processor, best = instructions_of(library)
    level, pytorch = min(level, best), min(pytorch, processor)
    kernels = {dtype: library.ed_kernels(level, type_).contents for dtype, type_ in _TYPES.items()}
    convolves = [dtype for dtype in _TYPES if convolutions(level, dtype, pytorch).ours]
    threads = "on PyTorch's threads" if openmp else "on one thread: PyTorch's OpenMP was not found"
    return Loaded(kernels, f"{path.name}, {level.option}, {threads}", path, level, pytorch, frozenset(convolves))


def instructions_of(library: ctypes.CDLL) -> tuple[Instructions, Instructions]:
    """The best level that the processor has, and the best of which the library has kernels for it."""
    return Instructions(library.ed_processor_instructions()), Instructions(library.ed_best_instructions())


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
