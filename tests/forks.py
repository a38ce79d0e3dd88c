"""Processes that are forks of a server that has imported what they need, which takes seconds, and has run nothing.

The server starts with the first process and imports what all files asked for until then. All forks have the environment
variables of that moment, whoever begins them.
"""

from __future__ import annotations

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
_imported: list[str] = []


def preload(*modules: str) -> None:
    """Have the server import these modules. Call it on import, before a process begins."""
    _imported.extend(modules)
    FORKS.set_forkserver_preload([*_imported])
