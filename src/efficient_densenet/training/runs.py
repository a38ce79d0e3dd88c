"""Where a training run keeps its files: ``ROOT/NAME/version_N``, with the checkpoints in ``checkpoints``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from efficient_densenet.errors import UserError

_VERSION = re.compile(r"version_(\d+)")


def name_of_run(name: str | None, configs: Sequence[str | Path]) -> str:
    """What a run is called: `name`, or as the last configuration file, or as the run that this file is from.

    Raises:
        UserError: `name` cannot be that of a folder.
    """
    if name is not None:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise UserError(f"--name is the name of a folder, which {name!r} cannot be")
        return name
    if not configs:
        return "unnamed"
    last = Path(configs[-1]).absolute()
    return last.parent.parent.name if _VERSION.fullmatch(last.parent.name) else last.stem


class RunLogger(TensorBoardLogger):
    """Writes TensorBoard's events, and decides about the folder of a run.

    Args:
        runs: the folder of all runs of a name.
        version: the name of the folder in it; None: a new one.
    """

    def __init__(self, runs: Path, version: str | None) -> None:
        super().__init__(runs, "", version, default_hp_metric=False)

    @property
    def version(self) -> str:
        if self._version is None:
            # The first process claims it. The others ask the first one where it writes, not their own logger.
            self._version = claim_folder(Path(self.root_dir)).name if rank_zero_only.rank == 0 else "version_0"
        return str(self._version)

    def finalize(self, status: str) -> None:
        """Close the events. Where the run failed before it began, they are all that there is, and are removed."""
        super().finalize(status)
        if status != "failed" or self._version is None or rank_zero_only.rank != 0:
            return
        folder = Path(self.log_dir)
        if folder.is_dir() and all(path.name.startswith("events.out.") for path in folder.iterdir()):
            shutil.rmtree(folder)


def claim_folder(runs: Path) -> Path:
    """A new folder ``version_N`` in the folder `runs`, of this process alone, also when others begin at the same time.

    Raises:
        UserError: it cannot be made.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        taken = [int(match[1]) for match in map(_VERSION.fullmatch, (path.name for path in runs.iterdir())) if match]
        for number in count(max(taken, default=-1) + 1):
            folder = runs / f"version_{number}"
            try:
                folder.mkdir()
            except FileExistsError:  # another one was faster
                continue
            return folder
    except OSError as error:
        raise UserError(f"cannot make a folder for the run in {runs}: {error.strerror or error}") from error
    raise AssertionError


def find_checkpoint(runs: Path, wanted: str | Path | None) -> Path | None:
    """The file that `wanted` means: itself, or for ``best`` and ``last`` the newest of that name in the folder `runs`.

    None: nothing is wanted, or there is no such checkpoint yet.

    Raises:
        UserError: `wanted` is a file that does not exist.
    """
    if wanted in ("best", "last"):
        found = runs.glob(f"*/checkpoints/{wanted}.ckpt")
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    if wanted is not None and not Path(wanted).exists():
        raise UserError(f"there is no checkpoint {wanted}; give a file, or best or last for those of the newest run")
    return None if wanted is None else Path(wanted)


def folder_of_run(checkpoint: Path | None) -> Path | None:
    """The run's folder that `checkpoint` is in; None if it is not in one."""
    in_run = checkpoint is not None and checkpoint.absolute().parent.name == "checkpoints"
    return checkpoint.absolute().parent.parent if checkpoint is not None and in_run else None
