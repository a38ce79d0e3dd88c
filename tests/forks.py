"""Processes that are forks of one that has imported what they need, which takes seconds, and has run nothing."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

_imported: list[str] = []


def forks_with(*modules: str) -> ForkServerContext:
    """What begins such processes. Call it on import: the first that begins has what all files asked for."""
    _imported.extend(modules)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_imported])
    return context
