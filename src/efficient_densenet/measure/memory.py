"""Bytes: of live tensors while something runs, of a process, of the machine."""

from __future__ import annotations

import gc
import os
import re
import resource
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes of tensors alive at one time during `step()`, on top of those alive before it.

    What `step` only replaces does not count: have the gradients of the parameters exist before (zeros will do), and
    they are left out. On a CPU the number is exact and the same in every run; PyTorch's profiler records every
    allocation of a tensor. On a GPU it is the caching allocator's own count.
    """
    gc.collect()  # or garbage from before, freed during the step, would be taken off
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        step()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in recording.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    )
    return max(accumulate((nbytes for _, nbytes in changes), initial=0))


def bytes_per_image(peak_of: Callable[[int], int], batches: tuple[int, int]) -> dict[str, Any]:
    """The peak bytes of two batches, and their slope, which leaves out what does not grow with the batch."""
    small, large = batches
    peaks = {n: peak_of(n) for n in batches}
    return {"peak_bytes": peaks, "bytes_per_image": (peaks[large] - peaks[small]) / (large - small)}


def resident_peak_bytes() -> int:
    """The most bytes of physical memory that this process has held at one time since it began."""
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which on Linux starts from the size of the parent process
        return _kibibytes(status, "VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int:
    """Bytes of physical memory that a new process can have, here or within the limit of this container."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = _kibibytes(meminfo, "MemAvailable")
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (_cgroup(name) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else min(available, limit - used)


def _kibibytes(file: Path, field: str) -> int:
    match = re.search(rf"^{field}:\s*(\d+) kB$", file.read_text(), re.MULTILINE)
    assert match is not None, f"{file} has no {field}"
    return int(match[1]) * 1024


def _cgroup(name: str) -> int | None:
    file = Path("/sys/fs/cgroup") / name
    text = file.read_text().strip() if file.exists() else "max"
    return None if text == "max" else int(text)
