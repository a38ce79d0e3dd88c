"""Ctrl-C and SIGTERM: where they end a run, and with which exit code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import Callback

TERMINATED = 128 + signal.SIGTERM  # the exit code that shells and schedulers know


class EndBetweenBatches(Callback):
    """While a network is trained, a signal ends the run behind the present batch: a checkpoint that is being written is
    finished, and so is a line of a log. Before and after, and at the second signal, it does so at once.
    """

    def __init__(self) -> None:
        self.training = False
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM raises `SystemExit` with the code 143, and Ctrl-C `KeyboardInterrupt`."""
        previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as of a job in the background
                    previous[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            for which, handler in previous.items():
                signal.signal(which, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, number
        if not (self.training and first):
            self._end()

    def _end(self, *_: Any) -> None:
        if self.received is not None:
            self.training = False
            raise KeyboardInterrupt if self.received == signal.SIGINT else SystemExit(TERMINATED)

    def on_train_start(self, *_: Any) -> None:
        self.training = True

    def on_train_end(self, *_: Any) -> None:
        self.training = False

    def on_train_batch_end(self, *_: Any) -> None:
        self._end()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._end()
