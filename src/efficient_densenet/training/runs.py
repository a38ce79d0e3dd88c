"""Where a training run keeps its files: ``ROOT/NAME/version_N``, with the checkpoints in ``checkpoints``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from efficient_densenet.errors import UserError


def name_of_run(configs: Sequence[str | Path]) -> str:
    """What runs with these configuration files are called: as the last file, or as the run that the file is from."""
    if not configs:
        return "unnamed"
    last = Path(configs[-1]).absolute()
    return last.parent.parent.name if last.parent.name.startswith("version_") else last.stem


def find_checkpoint(runs: Path, wanted: str | Path | None) -> Path | None:
    """The file that `wanted` means: itself, or for ``best`` and ``last`` the newest of that name in the folder `runs`.

    None: nothing is wanted, or there is no such checkpoint yet.

    Raises:
        UserError: `wanted` is a file that does not exist.
    """
    if wanted in ("best", "last"):
        found = runs.glob(f"*/checkpoints/{wanted}.ckpt")
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    if wanted is not None and not Path(wanted).is_file():
        raise UserError(f"there is no checkpoint {wanted}; give a file, or best or last for those of the newest run")
    return None if wanted is None else Path(wanted)


def folder_of_run(checkpoint: Path | None) -> Path | None:
    """The run's folder that `checkpoint` is in; None if it is not in one."""
    in_run = checkpoint is not None and checkpoint.absolute().parent.name == "checkpoints"
    return checkpoint.absolute().parent.parent if checkpoint is not None and in_run else None
