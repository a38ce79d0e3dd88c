"""Threads that share a network: none runs modules while another looks at them, for then they hold other tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from efficient_densenet.execution.plan import parts

_entering = threading.RLock()  # is held while modules are looked at that others might run
_running: dict[int, nn.Module] = {}  # by thread, the outermost module of ours that it runs
_on_trial: set[int] = set()  # threads that run modules as they were before they were adopted


def in_turn(module: Any, arguments: tuple, named: dict[str, Any]) -> Any:
    """Run a module of ours once no other thread looks at it; on trial, as what it was before it was adopted."""
    thread = threading.get_ident()
    if thread in _on_trial:
        return module.original.forward(module, *arguments, **named)
    if thread in _running:
        return module.run(*arguments, **named)
    with _entering:
        _running[thread] = module
    try:
        return module.run(*arguments, **named)
    finally:
        del _running[thread]


@contextmanager
def alone(modules: Sequence[nn.Module]) -> Iterator[bool]:
    """Whether no other thread runs any of these modules; as long as this is open, none begins to."""
    with _entering:
        others = [module for thread, module in list(_running.items()) if thread != threading.get_ident()]
        yield not others or set(parts(modules)).isdisjoint(parts(others))


@contextmanager
def trial() -> Iterator[None]:
    """While this is open, modules of ours run in this thread as what they were before they were adopted."""
    thread = threading.get_ident()
    _on_trial.add(thread)
    try:
        yield
    finally:
        _on_trial.discard(thread)
