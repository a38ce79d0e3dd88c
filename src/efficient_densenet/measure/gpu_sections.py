"""The sections of ``benchmarks/gpu.py``: every contender alone on the GPU, one after the other, within a fixed time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from efficient_densenet.measure.contenders import CONTENDERS
from efficient_densenet.measure.deadline import Deadline
from efficient_densenet.measure.gpu_worker import KERNELS
from efficient_densenet.measure.networks import TINY, Network
from efficient_densenet.measure.processes import Job, progress
from efficient_densenet.measure.results import Record


@dataclass(frozen=True)
class GpuSection:
    """What is measured of one network.

    Attributes:
        contenders: in the order of their worth, should the time run out.
        network: which network; None for the kernels by themselves.
        batch_size: images; None: as many as the ordinary network can take.
        dtype: of `TrainingStep`.
        memory_limit: instead of times, the largest batch in so many bytes.
    """

    contenders: Sequence[str]
    network: Network | None = None
    batch_size: int | None = None
    dtype: str = "float32"
    memory_limit: int | None = None

    def job(self, contender: str, batch_size: int, quick: bool) -> Job:
        network = self.network and (TINY if quick else self.network)
        return {
            "contender": contender,
            "quick": quick,
            "network": network and asdict(network),
            "batch_size": min(batch_size, 8) if quick else batch_size,
            "dtype": self.dtype,
            "memory_limit": self.memory_limit,
            "warmup": 3,
            "iterations": 3 if quick else 20,
        }


def measure(
    sections: Mapping[str, GpuSection],
    deadline: Deadline,
    quick: bool,
    keep: Callable[[str, list[Record]], None] = lambda *found: None,
) -> dict[str, list[Record]]:
    """The records of each section; `keep` gets those so far of a section each time that there is one more.

    Those that compile, or let cuDNN search, do that first, side by side; what tunes for minutes comes last of all.
    """
    found: dict[str, list[Record]] = {name: [] for name in sections}
    work = [(name, contender) for name, section in sections.items() for contender in section.contenders]
    work.sort(key=lambda item: _tunes(item[1]))
    batches = {name: section.batch_size for name, section in sections.items() if section.batch_size}

    def job_of(name: str, contender: str) -> Job:
        return sections[name].job(contender, batches.get(name, 0), quick)

    deadline.prepare([job_of(*item) for item in work if item[0] in batches and _is_slow_to_start(item[1])])
    for i, (name, contender) in enumerate(work):
        progress(f"{name}: {contender}")
        section = sections[name]
        if contender == KERNELS:
            request = "speeds"
        elif section.memory_limit is not None:
            request = "largest"
        else:
            request = "times"
            if name not in batches:
                largest = deadline.ask(job_of(name, "ordinary-channels-last"), "largest")
                found[name].append({"contender": "largest batch of the ordinary network", **largest})
                # Not to the last byte: a step after the first may fragment memory.
                batches[name] = int(0.95 * largest.get("largest_batch", 0))
        if request == "times" and not batches[name]:
            answer = {"failed": "no batch was found"}
        else:
            following = work[i + 1] if i + 1 < len(work) else None
            known = following is not None and (following[0] in batches or sections[following[0]].memory_limit)
            answer = deadline.ask(
                job_of(name, contender), request, job_of(*following) if following and known else None, _tunes(contender)
            )
        found[name].append({"contender": contender, **answer})
        keep(name, found[name])
    return found


def _tunes(contender: str) -> bool:
    return contender != KERNELS and CONTENDERS[contender].compile == "max-autotune"


def _is_slow_to_start(contender: str) -> bool:
    if contender == KERNELS or _tunes(contender):
        return False
    return CONTENDERS[contender].compile is not None or CONTENDERS[contender].search


def merged(before: Sequence[Record], now: Sequence[Record]) -> list[Record]:
    """What was found before and now of a section: now counts, unless it failed where there was a result before."""
    found = {record["contender"]: record for record in before}
    for record in now:
        if "failed" not in record or "failed" in found.get(record["contender"], record):
            found[record["contender"]] = record
    return list(found.values())


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """All sections, for a terminal."""
    lines = ["section                contender                             F ms     B ms   F+B ms    images/s  peak GB"]
    for name, section in found.items():
        if name != KERNELS:
            lines += [f"{name:22} {r['contender']:34} {_times(r)}" for r in section["records"]]
    for r in found.get(KERNELS, {}).get("records", []):
        failed = [r["failed"].splitlines()[-1][:100]] if "failed" in r else r.get("failed_kernels", [])
        lines += [f"failed: {text}" for text in failed]
        for row in r.get("rows", []):
            of_copy, of_product = f"{row['share_of_copy']:.0%} of a copy", f"{row['share_of_product']:.0%} of a product"
            lines.append(
                f"{row['operation']:22} {row['shape']:28} {row['dtype']:5} {row['ms']:8.3f} ms  {of_copy}, {of_product}"
            )
    return "\n".join(lines)


def _times(record: Record) -> str:
    if "failed" in record:
        return record["failed"].splitlines()[-1][:60]
    if "largest_batch" in record:
        return f"at most {record['largest_batch']} images in {record['limit_bytes'] / 1e9:.1f} GB"
    parts = [record["forward_ms"], record["backward_ms"], record["step_ms"]]
    times = " ".join(f"{'–' if part is None else format(part, '.2f'):>8}" for part in parts)
    return f"{times} {record['images_per_second']:11,.0f} {record['peak_bytes'] / 1e9:8.2f}"
