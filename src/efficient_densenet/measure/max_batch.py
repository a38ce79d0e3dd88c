"""Find the largest batch whose training step fits a given memory, by trying: every trial is a fresh process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from efficient_densenet.errors import UserError
from efficient_densenet.measure import worker
from efficient_densenet.measure.memory import available_bytes
from efficient_densenet.measure.processes import Job, OutOfMemoryError, Team, progress
from efficient_densenet.units import format_bytes

Peaks = dict[int, int | None]
"""The peak bytes of each batch that was tried; None where the device ran out of memory."""


def run(
    names: Sequence[str],
    job: Job,
    limit: int,
    device_type: str = "cpu",
    threads: int | None = None,
    gaps: list[dict[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """For each contender the largest batch that fits `limit` bytes, its peak, and the smallest that did not fit.

    On a GPU the allocator gets `limit` and runs out of it; on a CPU the peak resident size of the process decides.
    `gaps` takes those that cannot take part, with the reason; where it is None, that is an error.
    """
    ceiling = None
    if device_type == "cpu":
        ceiling = available_bytes()
        if limit > ceiling:
            raise UserError(
                f"{format_bytes(ceiling)} of memory are available, not {format_bytes(limit)}: use a smaller --max-batch"
            )
    results = []
    for name in names:
        try:
            peaks = largest_batch(partial(_peak, name, job, limit, device_type, threads), limit, ceiling)
        except UserError as error:
            if gaps is None:
                raise
            gaps.append({"contender": name, "reason": str(error)})
            continue
        largest = max((n for n, peak in peaks.items() if _fits(peak, limit)), default=0)
        smallest = min(n for n, peak in peaks.items() if not _fits(peak, limit))
        results.append(
            {
                "contender": name,
                "largest_batch": largest,
                "peak_bytes": peaks.get(largest),
                "smallest_that_did_not_fit": smallest,
                "its_peak_bytes": peaks[smallest],
                "trials": [{"batch_size": n, "peak_bytes": peak} for n, peak in peaks.items()],
            }
        )
    return results


def largest_batch(peak_of: Callable[[int], int | None], limit: int, ceiling: int | None = None) -> Peaks:
    """Try batches until the largest that fits and the smallest that does not are one image or 1 % apart.

    The peak is nearly a straight line in the batch, so the next trial is where the line through two trials meets the
    limit, but never more than twice the largest batch that fitted.

    Args:
        peak_of: the peak bytes of a batch, or None where it ran out of memory.
        limit: the most bytes that fit.
        ceiling: bytes that no trial may come near: on a CPU, running out of memory may end other programs.

    Returns:
        All trials, in their order.
    """
    peaks: Peaks = {}
    low, high = 0, None  # fits, does not fit
    halve = False
    while high is None or high - low > _tolerance(low):
        if high is None:
            batch_size = _beyond(low, peaks, limit, ceiling)
        else:
            # Every other trial halves what is left, so that a crooked line costs little.
            batch_size = (low + high) // 2 if halve else _between(low, high, peaks, limit)
            halve = not halve
        peaks[batch_size] = peak_of(batch_size)
        if _fits(peaks[batch_size], limit):
            low = batch_size
        else:
            high = batch_size
    return peaks


def _beyond(low: int, peaks: Peaks, limit: int, ceiling: int | None) -> int:
    if low == 0:
        return 1
    most = 2.0 * low
    if ceiling is not None:
        # A part of every peak does not depend on the batch: growing in proportion overestimates it.
        most = min(most, low * ceiling / _known(peaks[low]))
    other = max((n for n in peaks if n <= low / 2), default=None)
    predicted = math.inf if other is None else _meets_limit(low, other, peaks, limit)
    return max(low + _tolerance(low), int(min(predicted, most)))


def _between(low: int, high: int, peaks: Peaks, limit: int) -> int:
    other = high if peaks[high] is not None else max((n for n in peaks if n <= low / 2), default=None)
    predicted = (low + high) / 2 if other is None else _meets_limit(low, other, peaks, limit)
    return int(min(max(predicted, low + _tolerance(low)), high - _tolerance(low)))


def _meets_limit(low: int, other: int, peaks: Peaks, limit: int) -> float:
    bytes_per_image = (_known(peaks[low]) - _known(peaks[other])) / (low - other)
    return low + (limit - _known(peaks[low])) / bytes_per_image if bytes_per_image > 0 else math.inf


def _tolerance(batch_size: int) -> int:
    return max(1, batch_size // 100)


def _fits(peak: int | None, limit: int) -> bool:
    return peak is not None and peak <= limit


def _known(peak: int | None) -> int:
    assert peak is not None, "only a batch that ran out of memory has no peak"
    return peak


def _peak(name: str, job: Job, limit: int, device_type: str, threads: int | None, batch_size: int) -> int | None:
    trial = job | {"contender": name, "batch_size": batch_size, "memory_limit": limit}
    try:
        with Team(worker.__name__, trial, device_type, threads=threads) as team:
            peak: int | None = team.ask("process_bytes")[0]
    except OutOfMemoryError:
        peak = None
    shown = "out of memory" if peak is None else format_bytes(peak)
    progress(f"{name}, batch {batch_size}: {shown}")
    return peak
