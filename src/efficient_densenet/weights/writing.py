"""Weights written to files: whole or not at all."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from efficient_densenet.errors import UserError, require
from efficient_densenet.files import replacing

OUTPUT_SUFFIXES = (".pth", ".pt", ".safetensors")


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
    with replacing(path) as temporary:
        temporary.write_bytes(data)


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
