"""Weights in files: read without running anything that is in them, and written whole or not at all."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from efficient_densenet.checkpoints.dialects import first_few
from efficient_densenet.errors import UserError, require
from efficient_densenet.files import replacing

OUTPUT_SUFFIXES = (".pth", ".pt", ".safetensors")

# Where training scripts keep the state dict in what they save.
_ENTRIES = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights", "state")

# What parsing damaged bytes raises, in PyTorch's reader and in its restricted unpickler: found by damaging files.
_DAMAGED = (
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
)

# How torch.save began its files before they were zip archives: a pickled magic number.
_OLD_FORMAT = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The named tensors in a checkpoint, on the CPU, in the file's dtypes.

    Reads what `torch.save` wrote (any suffix) and ``.safetensors``. The state dict may be the whole file or stand under
    a usual name in it (``state_dict``, ``model``, ...), as in Lightning's checkpoints. Prefixes that wrappers gave to
    every name (``module.``, ``_orig_mod.``, ``model.``, ...) are taken off. Nothing in the file is executed.

    Raises:
        UserError: there is no such file, or it holds no weights that can be read safely.
        MissingExtraError: the file is a safetensors file and that package is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file {path}")
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the checkpoint itself")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = _state_dict_in(content)
    if state is None:
        held = f"it holds {first_few(map(str, content))}" if isinstance(content, Mapping) else "it is something else"
        raise UserError(f"{path} holds no state dict under any usual name; {held}")
    return _without_wrappers(state)


def write_state_dict(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write named tensors to `path`: as safetensors if it ends so, else with `torch.save`.

    The file appears only when it is complete; an existing one is replaced.

    Raises:
        UserError: `path` has another suffix than `OUTPUT_SUFFIXES`, or cannot be written.
        MissingExtraError: a safetensors file is wanted and that package is not installed.
    """
    path = Path(path)
    check_output(path)
    # A copy of its own for each tensor: safetensors refuses shared memory, and torch.save would write all of it.
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in state.items()}
    if path.suffix == ".safetensors":
        data = require("safetensors.torch", "checkpoints").save(copies)
    else:
        buffer = io.BytesIO()
        torch.save(copies, buffer)
        data = buffer.getvalue()
    with replacing(path) as beside:
        beside.write_bytes(data)


def check_output(path: Path) -> None:
    """Refuse a `path` that `write_state_dict` cannot write to.

    Raises:
        UserError: its suffix is unknown, its folder is missing, or something that is no file stands there.
    """
    if path.suffix not in OUTPUT_SUFFIXES:
        raise UserError(f"cannot tell the format of the output {path}: let it end in {', '.join(OUTPUT_SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"the folder of the output {path} does not exist; create {path.parent} first")
    if path.exists() and not path.is_file():
        raise UserError(f"the output {path} exists and is not a file; choose another name")


def _read_safetensors(path: Path) -> object:
    safetensors = require("safetensors.torch", "checkpoints")
    try:
        return safetensors.load_file(path)
    except require("safetensors", "checkpoints").SafetensorError as error:
        raise UserError(f"{path} is cut short or damaged, or is not a safetensors file: {error}") from error


def _read_torch(path: Path) -> object:
    with open(path, "rb") as file:
        start = file.read(len(_OLD_FORMAT))
    if zipfile.is_zipfile(path):
        if _is_torchscript(path):  # torch.load would refuse it too, after a warning
            raise _holds_more_than_weights(path, "a TorchScript program")
    elif start.startswith(b"PK"):
        raise UserError(f"{path} is cut short: copy or download it again")
    elif start != _OLD_FORMAT:
        raise UserError(f"{path} is not a checkpoint: it is neither of torch.save nor of safetensors")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _holds_more_than_weights(path, _objects_in(path)) from error
    except _DAMAGED as error:
        raise UserError(f"{path} is cut short or damaged, or is not a checkpoint; copy or download it again") from error


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except _DAMAGED:
        return False


def _objects_in(path: Path) -> str:
    try:
        found = first_few(sorted(get_unsafe_globals_in_checkpoint(path)))
    except (pickle.UnpicklingError, *_DAMAGED):  # it looks into undamaged zip archives alone
        found = ""
    return found or "Python objects or damaged bytes"


def _holds_more_than_weights(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} holds {what} besides weights, and nothing in a file is executed here; where the model's library is "
        "installed, load it, save model.state_dict() and give that file"
    )


def _state_dict_in(content: object, depth: int = 3) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    if content and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return dict(content)
    if depth == 0:
        return None
    found = (_state_dict_in(content.get(entry), depth - 1) for entry in _ENTRIES)
    return next((state for state in found if state is not None), None)


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off the first part of the names while it is one for all: the attribute of a wrapper."""
    wrappers = {name.partition(".")[0] for name in state}
    # An encoder, which has no classifier, has nothing but features.
    if len(wrappers) > 1 or wrappers == {"features"} or not all("." in name for name in state):
        return state
    return _without_wrappers({name.partition(".")[2]: value for name, value in state.items()})
