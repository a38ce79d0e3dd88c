"""Checkpoints that are never half written, and that are read without executing anything in them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from efficient_densenet.errors import UserError
from efficient_densenet.files import replacing
from efficient_densenet.weights.formats import Content, damage_named, shortened
from efficient_densenet.weights.pickles import Name, Stub
from efficient_densenet.weights.shards import read_content
from efficient_densenet.weights.stored import StoredTensor


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
        """What is in the file at `path`: a checkpoint, or weights alone, which Lightning hands on between processes."""
        return read_values(path)


def is_of_classifier(path: str | Path) -> bool:
    """Whether `Classifier` wrote the checkpoint at `path`, rather than another program.

    Raises:
        UserError: it cannot be read.
    """
    value = read_content(path).value
    return isinstance(value, dict) and {"state_dict", "epoch", "class_names"} <= value.keys()


def read_values(path: str | Path) -> Any:
    """All that is in the file at `path`, with tensors on the CPU.

    Raises:
        UserError: there is no such file, it is damaged, or holds more than tensors and plain data.
    """
    content = read_content(path)
    with damage_named(content.path):
        return _Loading(content).loaded(content.value, "")


class _Loading:
    """Turns the tensors in a content into real ones. What is referred to several times becomes one object again."""

    def __init__(self, content: Content) -> None:
        self.content = content
        self.done: dict[int, Any] = {}

    def loaded(self, value: Any, name: str) -> Any:
        if id(value) not in self.done:
            self.done[id(value)] = self._load(value, name)
        return self.done[id(value)]

    def _load(self, value: Any, name: str) -> Any:
        if isinstance(value, StoredTensor | Tensor):
            return self.content.load(value)
        if isinstance(value, Stub | Name):
            what = shortened(repr(value))
            raise UserError(
                f"{self.content.path} holds more than tensors and plain data: {shortened(name)} is a {what}"
            )
        if isinstance(value, Counter):
            return value
        if isinstance(value, dict):
            return {key: self.loaded(child, f"{name}.{key}" if name else str(key)) for key, child in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.loaded(child, f"{name}.{i}") for i, child in enumerate(value))
        return value


def differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """In words, what keeps the weights `found` from being those `wanted`; empty when nothing does."""
    parts = [
        f"{key} has the shape {tuple(found[key].shape)} there and {tuple(wanted[key].shape)} here"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    parts += [f"{key} is missing there" for key in wanted if key not in found]
    parts += [f"{shortened(key)} is missing here" for key in found if key not in wanted]
    more = f" (and {len(parts) - 2} more differences)" if len(parts) > 2 else ""
    return ", ".join(parts[:2]) + more
