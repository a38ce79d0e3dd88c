"""Writing files so that nobody ever sees half of one, and reading lines of text."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from efficient_densenet.errors import UserError

_HOST = re.sub(r"\W", "-", platform.node())
_PARTIAL = re.compile(rf"\..*\.{re.escape(_HOST)}-(\d+)\.partial(\.[^.]*)?")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, without what is blank around them.

    Raises:
        UserError: it is not text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors put a mark before it
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8; save it as such") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the folder of `path` to write to; once it is on the disk, it is renamed to `path`.

    Raises:
        UserError: it cannot be written (the disk is full, the folder is write-protected). What was at `path` is still
            there, and nothing else is left behind; this holds for every other exception too.
    """
    temporary = path.with_name(f".{path.stem}.{_HOST}-{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(path.parent.glob(".*"))
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # the contents must be on the disk before the name is
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what was there before is untouched"
        ) from error
    finally:
        with suppress(NotADirectoryError):  # the folder is a file
            temporary.unlink(missing_ok=True)


def remove_left_over(paths: Iterable[Path]) -> None:
    """Remove those of `paths` that `replacing` was writing to when its process, on this machine, was killed."""
    for path in paths:
        match = _PARTIAL.fullmatch(path.name)
        if match and not _is_running(int(match[1])):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True
