"""The clock of every benchmark."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch

from efficient_densenet.measure.devices import Place


class Clock:
    """Milliseconds between marks. On a GPU the device sets the marks itself, between the kernels of its stream."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._place.device_type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """From each mark to the next; waits until the device has come to the last one."""
        self._place.synchronize()
        if self._place.device_type == "cuda":
            return [start.elapsed_time(end) for start, end in pairwise(self._marks)]
        return [(end - start) * 1e3 for start, end in pairwise(self._marks)]
