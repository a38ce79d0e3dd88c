"""Checkpoints in one file, or in several, as Hugging Face writes large ones: shards, and an index of all tensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from efficient_densenet.errors import UserError
from efficient_densenet.weights.formats import Content, read_file, shortened
from efficient_densenet.weights.stored import StoredTensor

# What a checkpoint is called in a folder of Hugging Face, in the order in which its libraries look for it.
USUAL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")


def read_content(path: str | os.PathLike[str]) -> Content:
    """What is in a checkpoint: a file (see `read_file`), the index of one in shards, or a folder with one of
    `USUAL_FILES`.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or of another kind; a shard is missing, or is not one of
            those that the index was written with.
        MissingExtraError: it is of safetensors and that package is not installed.
    """
    path = _checkpoint_in(Path(path))
    shard = _SHARD.fullmatch(path.name)
    if shard and int(shard[2]) > 1:
        raise UserError(
            f"{path} is one of {int(shard[2])} shards of a checkpoint: give {shard[1]}{shard[3]}.index.json, or the "
            "folder"
        )
    return _read_shards(path) if is_index(path) else read_file(path)


def is_index(path: Path) -> bool:
    """Whether the name of a file is that of an index of shards."""
    return path.name.endswith("index.json")


def read_index(path: Path) -> dict[str, list[str]]:
    """The names of the tensors in each shard, by the shard's path from the folder of the index at `path`.

    Raises:
        UserError: it is not an index, or a shard would lie outside that folder.
    """
    try:
        files = json.loads(path.read_bytes())["weight_map"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not an index of shards, or is cut short: copy or download it again") from error
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{path} is not an index of shards: its weight_map does not name a file for each tensor")
    names: dict[str, list[str]] = {}
    for name, file in files.items():
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise UserError(f"{path} names the shard {shortened(file)}, which is outside its folder: it is refused")
        names.setdefault(file, []).append(name)
    return names


def _checkpoint_in(path: Path) -> Path:
    """`path`, or the checkpoint in that folder."""
    if not path.is_dir():
        return path
    if (path / ".metadata").exists():
        raise UserError(
            f"{path} is a folder of torch.distributed.checkpoint; make one file of it with dcp_to_torch_save of "
            "torch.distributed.checkpoint.format_utils"
        )
    found = next((path / name for name in USUAL_FILES if (path / name).exists()), None)
    if found is None:
        raise UserError(
            f"{path} is not a file but a folder, and holds none of {', '.join(USUAL_FILES)}; give the checkpoint itself"
        )
    return found


def _read_shards(index: Path) -> Content:
    names = read_index(index)
    shards = {file: index.parent / file for file in names}
    if missing := [file for file, path in shards.items() if not path.is_file()]:
        raise UserError(
            f"{index} names the shard {shortened(missing[0])}, which is missing: copy or download all "
            f"{len(shards)} shards into its folder"
        )
    tensors: dict[str, Any] = {}
    for file, path in shards.items():
        shard = read_file(path)
        held = shard.value if isinstance(shard.value, Mapping) else {}
        for name in names[file]:
            if name not in held:
                raise UserError(
                    f"{path} lacks the tensor {shortened(name)}, which {index.name} says it holds: the two are not of "
                    "one checkpoint, or the shard is not complete"
                )
            value = held[name]
            tensors[name] = shard.load(value) if isinstance(value, StoredTensor | Tensor) else value
    return Content(index, tensors, tuple(shards.values()))
