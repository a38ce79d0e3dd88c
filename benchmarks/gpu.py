"""Measure the efficient networks on a GPU against every usual way to run a DenseNet; or compile the kernels without it.

    python benchmarks/gpu.py                  # everything, in under ten minutes, on the first GPU
    python benchmarks/gpu.py --quick          # tiny, to try this program
    python benchmarks/gpu.py --sections L40   # one part again; the others stay as they are
    python benchmarks/gpu.py --compile-only   # needs no GPU: registers, shared memory and spills, for many devices

Every contender has a process of its own. Those that compile or search for minutes do that first, side by side; then
all are measured one after the other, so that each has the GPU for itself. Results are written after each one, beside
those that exist; what there is no time for leaves an earlier result as it is: give its section a call of its own.
Results: ``results/gpu.json`` and ``results/triton_kernels.json`` beside this file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from efficient_densenet.errors import UserError
from efficient_densenet.measure import machine
from efficient_densenet.measure.processes import Job, Team
from efficient_densenet.measure.report import write_json

Record = dict[str, Any]
HERE = Path(__file__).parent
OURS = ("efficient, bottleneck", "efficient, features", "efficient, inputs", "efficient, bottleneck, graph")
MAX_AUTOTUNE = "compiled, max-autotune"
COMPILED = ("compiled", "compiled, budget 0.5", "compiled, budget 0.1", MAX_AUTOTUNE)
SLOW_TO_START = ("compiled", "cudnn.benchmark", "reduce-overhead")
"""What is in the names of contenders that compile, or search for algorithms."""
EAGER = ("ordinary", "ordinary, channels_last", "ordinary, channels_last, cudnn.benchmark")
LIBRARIES = (*EAGER, "memory_efficient", "memory_efficient, channels_last", "timm, channels_last")

# In the order of their worth, should the time run out; what tunes for minutes comes last, of all sections.
SECTIONS: dict[str, Record] = {
    "kernels": {"contenders": ("kernels",)},
    "L40": {
        "network": "cifar", "size": 32, "batch": 128, "autocast": False,
        "contenders": (
            *EAGER, *OURS, "efficient, bottleneck, reduce-overhead", "ordinary, channels_last, graph", *COMPILED,
        ),
    },
    "DenseNet-121": {
        "network": "densenet121", "size": 224, "batch": 256, "autocast": True,
        "contenders": (*LIBRARIES, *OURS, "ResNet-50, channels_last", *COMPILED),
    },
    "L40 in 12 GB": {
        "network": "cifar", "size": 32, "batch": 0, "autocast": False, "limit": 12_000_000_000,
        "contenders": ("ordinary", *OURS[:3]),
    },
    "DenseNet-264": {
        "network": "densenet264", "size": 224, "batch": None, "autocast": True,
        "contenders": (*EAGER, *OURS[:3], "memory_efficient, channels_last", "compiled"),
    },
    "DenseNet-201": {
        "network": "densenet201", "size": 224, "batch": None, "autocast": True,
        "contenders": (*EAGER, *OURS[:3], "memory_efficient, channels_last", "timm, channels_last", "compiled"),
    },
}  # fmt: skip


class Clock:
    """The seconds that are left, and the end of a contender that takes longer.

    A contender needs ten seconds before it can begin, to import what it needs: the next one does that meanwhile.
    """

    MOST = 120  # seconds for one, or a single compilation might leave none to the others
    PREPARATION = 240  # seconds for all that are prepared side by side
    SIDE_BY_SIDE = 3  # more would not fit into the GPU's memory

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self._starter = ThreadPoolExecutor(1)
        self._next: tuple[Job, Future[Team]] | None = None
        self._prepared: list[tuple[Job, Team | str]] = []

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Let contenders compile side by side, before anything is measured; each then waits for its turn."""
        end = min(self.end, time.monotonic() + self.PREPARATION)

        def prepared(job: Job) -> Team | str:
            left = end - time.monotonic()
            if left < 5:
                return f"there was no time to prepare it in the first {self.PREPARATION} s"
            try:
                team = Team("gpu_contender", job, "cuda")
            except (UserError, OSError) as error:
                return str(error)
            timer = threading.Timer(left, team.close)
            timer.start()
            try:
                team.ask("prepare")
            except (UserError, ValueError, OSError) as error:
                team.close()
                out_of_time = f"took more than {self.PREPARATION} s to compile"
                return out_of_time if time.monotonic() >= end else str(error)
            finally:
                timer.cancel()
            return team

        with ThreadPoolExecutor(self.SIDE_BY_SIDE) as pool:
            self._prepared = list(zip(jobs, pool.map(prepared, jobs), strict=True))

    def ask(self, job: Job, request: str, following: Job | None = None) -> Record:
        """The contender's answer, or why there is none; the `following` contender may get ready."""
        began = time.monotonic()
        if self.end - began < 5:
            return {"failed": "no time left"}
        end = self.end if job["contender"] == MAX_AUTOTUNE else min(self.end, began + self.MOST)
        ready = self._ready(job)
        if isinstance(ready, str):
            return {"failed": ready}
        try:
            with ready.result(end - began) as team:
                if following is not None and following != job and not self._is_prepared(following):
                    self._next = following, self._start(following)
                timer = threading.Timer(max(0, end - time.monotonic()), team.close)
                timer.start()
                try:
                    (answer,) = team.ask(request)
                finally:
                    timer.cancel()
            return {**answer, "seconds": time.monotonic() - began}
        except (UserError, ValueError, OSError, TimeoutError) as error:
            if not ready.done():
                ready.add_done_callback(self._end)  # should it get ready after all
            out_of_time = "no time left" if end == self.end else f"took more than {self.MOST} s"
            return {"failed": out_of_time if time.monotonic() >= end else str(error)}

    def close(self) -> None:
        """End whatever has been got ready."""
        if self._next is not None:
            self._end(self._next[1])
        self._starter.shutdown()
        for _, team in self._prepared:
            if not isinstance(team, str):
                team.close()

    def _start(self, job: Job) -> Future[Team]:
        return self._starter.submit(Team, "gpu_contender", job, "cuda")

    def _is_prepared(self, job: Job) -> bool:
        return any(job == prepared for prepared, _ in self._prepared)

    def _ready(self, job: Job) -> Future[Team] | str:
        """A process for the job, by now or soon; or why there is none."""
        for i, (known, team) in enumerate(self._prepared):
            if job == known:
                del self._prepared[i]
                if isinstance(team, str):
                    return team
                done: Future[Team] = Future()
                done.set_result(team)
                return done
        (prepared, team), self._next = self._next or (None, None), None
        if prepared == job and team is not None:
            return team
        if team is not None:
            self._end(team)
        return self._start(job)

    @staticmethod
    def _end(team: Future[Team]) -> None:
        if team.exception() is None:
            team.result().close()


def measure(
    names: Sequence[str], clock: Clock, quick: bool, keep: Callable[[str, list[Record]], None] = lambda *found: None
) -> dict[str, list[Record]]:
    """The records of each section; `keep` gets those so far of a section each time that there is one more."""
    found: dict[str, list[Record]] = {name: [] for name in names}
    work = [(name, contender) for name in names for contender in SECTIONS[name]["contenders"]]
    if quick:
        work = [(name, contender) for name, contender in work if not contender.startswith(("memory", "timm"))]
    work.sort(key=lambda item: item[1] == MAX_AUTOTUNE)
    batches: dict[str, int] = {}

    def job_of(name: str, contender: str) -> Job | None:
        """None while its batch is to be found."""
        job = {"warmup": 3, "iterations": 20, "limit": 0, **SECTIONS[name], "contender": contender, "quick": quick}
        if quick and "network" in job:
            job |= {"network": "tiny", "size": 32, "iterations": 3, "batch": job["batch"] and 8}
        if "batch" in job and job["batch"] is None:
            job["batch"] = batches.get(name)
        return None if "batch" in job and job["batch"] is None else job

    slow = [
        job_of(*item) for item in work if item[1] != MAX_AUTOTUNE and any(word in item[1] for word in SLOW_TO_START)
    ]
    clock.prepare([job for job in slow if job and job.get("batch")])
    for i, (name, contender) in enumerate(work):
        _progress(f"{name}: {contender}")
        job = job_of(name, contender)
        if job is None:
            batches[name] = 0
            search = job_of(name, "ordinary, channels_last")
            assert search is not None
            largest = clock.ask(search, "largest")
            found[name].append({"contender": "largest batch of the ordinary network", **largest})
            # Not to the last byte: a step after the first may fragment memory.
            batches[name] = int(0.95 * largest.get("largest_batch", 0))
            job = job_of(name, contender)
        request = "speeds" if contender == "kernels" else "times" if SECTIONS[name]["batch"] != 0 else "largest"
        if request == "times" and not (job and job["batch"]):
            answer = {"failed": "no batch was found"}
        else:
            assert job is not None
            answer = clock.ask(job, request, job_of(*work[i + 1]) if i + 1 < len(work) else None)
        found[name].append({"contender": contender, **answer})
        keep(name, found[name])
    return found


def table(found: dict[str, Any]) -> str:
    lines = ["section                contender                             F ms     B ms   F+B ms    images/s  peak GB"]
    for name, section in found.items():
        if name == "kernels":
            continue
        for r in section["records"]:
            head = f"{name:22} {r['contender']:34}"
            if "failed" in r:
                lines.append(f"{head} {r['failed'].splitlines()[-1][:60]}")
            elif "largest_batch" in r:
                lines.append(f"{head} at most {r['largest_batch']} images in {r['limit_bytes'] / 1e9:.1f} GB")
            else:
                parts = [r["forward_ms"], r["backward_ms"], r["step_ms"]]
                times = " ".join(f"{'–' if part is None else format(part, '.2f'):>8}" for part in parts)
                lines.append(f"{head} {times} {r['images_per_second']:11,.0f} {r['peak_bytes'] / 1e9:8.2f}")
    for r in found.get("kernels", {}).get("records", []):
        failed = [r["failed"].splitlines()[-1][:100]] if "failed" in r else r.get("failed_kernels", [])
        lines += [f"failed: {text}" for text in failed]
        for row in r.get("rows", []):
            of_copy, of_product = f"{row['share_of_copy']:.0%} of a copy", f"{row['share_of_product']:.0%} of a product"
            lines.append(
                f"{row['operation']:22} {row['shape']:28} {row['dtype']:5} {row['ms']:8.3f} ms  {of_copy}, {of_product}"
            )
    return "\n".join(lines)


def compile_only(output: Path, targets: Sequence[str] | None) -> int:
    """Compile every kernel for these devices; those of others stay in the file of results as they are."""
    import gpu_compiled
    import triton

    targets = targets or tuple(gpu_compiled.TARGETS)

    file = output / "triton_kernels.json"
    found = json.loads(file.read_text())["records"] if file.exists() else []
    found = [record for record in found if record.get("target") not in (None, *targets)]
    for target in targets:
        for kind, launched in gpu_compiled.distinct(target):
            _progress(f"{target} {kind} {launched.shape.name}: {launched.name}")
            found.append(gpu_compiled.record(target, kind, launched))
    about = machine.describe("cpu")
    about["versions"]["triton"] = triton.__version__
    write_json(file, {"note": "compiled, not run", **about, "records": found})
    print(gpu_compiled.table(found))
    faults = [fault for record in found for fault in gpu_compiled.faults(record)]
    print(f"\n{len(found)} kernels, {len(faults)} faults", *faults, sep="\n")
    return 1 if faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="measure the efficient networks on a GPU")
    parser.add_argument(
        "--sections", nargs="*", choices=tuple(SECTIONS), default=list(SECTIONS), help="what to measure"
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks, to try this program")
    parser.add_argument("--minutes", type=float, default=9.5, help="when to stop (9.5)")
    parser.add_argument("--compile-only", action="store_true", help="only compile the kernels; needs no GPU")
    parser.add_argument("--targets", nargs="*", help="devices to compile for (all)")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the results")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.compile_only:
        return compile_only(arguments.output, arguments.targets)
    if not torch.cuda.is_available():
        print(
            "there is no GPU that PyTorch can use: run this where there is one, or give --compile-only", file=sys.stderr
        )
        return 2
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    file = arguments.output / ("gpu-quick.json" if arguments.quick else "gpu.json")
    found: Record = json.loads(file.read_text()) if file.exists() else {}
    about = machine.describe("cuda")
    about["versions"] |= {"driver": _driver(), "triton": _version("triton"), "timm": _version("timm")}

    before = {name: section["records"] for name, section in found.items() if _comparable(section, about)}

    def keep(name: str, records: list[Record]) -> None:
        found[name] = {"quick": arguments.quick, **about, "records": merged(before.get(name, []), records)}
        write_json(file, found)

    clock = Clock(60 * arguments.minutes)
    if not arguments.quick:
        import gpu_compiled

        _progress("compiling the kernels")
        gpu_compiled.compile_everything_here()
    try:
        measure(arguments.sections, clock, arguments.quick, keep)
    finally:
        clock.close()
    print(table(found))
    return 0


def merged(before: Sequence[Record], now: Sequence[Record]) -> list[Record]:
    """What was found before and now of a section: now counts, unless it failed where there was a result before."""
    found = {record["contender"]: record for record in before}
    for record in now:
        if "failed" not in record or "failed" in found.get(record["contender"], record):
            found[record["contender"]] = record
    return list(found.values())


def _comparable(section: Record, about: Record) -> bool:
    """Whether a section was measured on such a machine, with such versions, of this commit."""
    return all(section.get(name) == about[name] for name in ("hardware", "versions", "commit"))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Of NVIDIA's devices, as the kernel module tells it."""
    module = Path("/proc/driver/nvidia/version")
    return module.read_text().splitlines()[0] if module.exists() else None


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
