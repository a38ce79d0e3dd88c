"""Checkpoints that are never half written, and that are read without executing anything in them."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from efficient_densenet.errors import UserError
from efficient_densenet.files import replacing


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames, so that a kill or a full disk leaves the previous checkpoint; unpickles
    nothing but tensors and plain data.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            UserError: it cannot be written; what stood at `path` before still does.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with replacing(Path(path)) as beside:
            beside.write_bytes(buffer.getbuffer())

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        return read_checkpoint(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of the Lightning checkpoint at `path`, on the CPU.

    Raises:
        UserError: there is no such file, it is cut short, holds more than tensors and plain data, or is not a
            checkpoint of a training run.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise UserError(
            f"cannot read the checkpoint {path}: it is cut short, not a checkpoint, or holds more than tensors and "
            "plain data"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "epoch" not in checkpoint:
        raise UserError(f"{path} is not a checkpoint of a training run (those hold weights, optimiser and epoch)")
    return checkpoint


def differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """In words, what keeps the weights `found` from being those `wanted`; empty when nothing does."""
    parts = [
        f"{key} has the shape {tuple(found[key].shape)} there and {tuple(wanted[key].shape)} here"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    parts += [f"{key} is missing there" for key in wanted if key not in found]
    parts += [f"{key} is missing here" for key in found if key not in wanted]
    more = f" (and {len(parts) - 2} more differences)" if len(parts) > 2 else ""
    return ", ".join(parts[:2]) + more
