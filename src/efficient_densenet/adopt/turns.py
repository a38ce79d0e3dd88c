"""Threads that share a network: none runs modules while another looks at them, for then they hold other tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from efficient_densenet.execution.plan import parts

_entering = threading.RLock()  # is held while modules are looked at
_running: dict[int, nn.Module] = {}  # by thread, the outermost module of ours that it runs


def in_turn(module: nn.Module, run: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run `module`, by calling this with these arguments, once no other thread looks at modules."""
    thread = threading.get_ident()
    if thread in _running:
        return run(*arguments, **named)
    with _entering:
        _running[thread] = module
    try:
        return run(*arguments, **named)
    finally:
        del _running[thread]


@contextmanager
def alone(modules: Sequence[nn.Module]) -> Iterator[bool]:
    """Whether no other thread runs any of these modules; as long as this is open, none begins to."""
    with _entering:
        others = [module for thread, module in list(_running.items()) if thread != threading.get_ident()]
        yield not others or set(parts(modules)).isdisjoint(parts(others))
