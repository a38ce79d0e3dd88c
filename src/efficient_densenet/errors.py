"""What can go wrong because of what a user gave, in one place.

A `UserError` carries one clear sentence: what was given, what is supported, the way out. Commands print it and
exit with code 2; everywhere else it is an ordinary `ValueError`. Any other exception is a bug and keeps its trace.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(ValueError):
    """Something the user gave cannot work; the message says what to do instead."""


class EfficiencyWarning(UserWarning):
    """Something runs slower, or takes more memory, than was asked for; the message says why."""


class MissingExtraError(UserError, ImportError):
    """An optional dependency is not installed; the message holds the command that installs it."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or name the command that installs it.

    Args:
        module: the module to import, for example ``"safetensors.torch"``.
        extra: the extra of this distribution that brings it, for example ``"checkpoints"``.

    Raises:
        MissingExtraError: the distribution that holds the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the package is there, and something inside it is broken: that is not ours to explain
        raise MissingExtraError(
            f"this needs the package {module.split('.')[0]!r}, which is not installed; "
            f"install it with: pip install 'efficient-densenet[{extra}]'"
        ) from error
