"""The error of image files that cannot be read."""

from __future__ import annotations

import os

from efficient_densenet.errors import UserError


class UnreadableImageError(UserError):
    """An image file is corrupt, cut short or of a kind that cannot be used; the message names it.

    When it comes out of a worker process, ``DataLoader`` builds it anew from the text of the whole traceback. That
    text ends with the message, and only the message is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rstrip().rpartition(f"{UnreadableImageError.__name__}: ")[2])


def unreadable(path: str | os.PathLike[str], error: Exception) -> UnreadableImageError:
    """What to raise when `error` came out of reading the file at `path`."""
    reason = " ".join(str(error).split())
    return UnreadableImageError(f"cannot read the image {os.fspath(path)!r} ({reason}); replace or remove it")
