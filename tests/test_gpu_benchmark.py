"""The programs that measure on a GPU, where there is none."""

from __future__ import annotations

import time
from typing import ClassVar

import pytest
import torch

from efficient_densenet.errors import UserError

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.config.rootpath / "benchmarks"))


def test_the_benchmark_needs_a_gpu_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    import gpu as benchmark

    assert benchmark.main(["--quick"]) == 2
    assert "there is no GPU" in capsys.readouterr().err


def test_the_product_beside_the_kernels_is_in_tf32_and_nothing_after_it(monkeypatch):
    import gpu_kernels

    before = torch.backends.cuda.matmul.fp32_precision
    with gpu_kernels._tf32():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == before


class Contender:
    """In place of a process."""

    alive: ClassVar[list[str]] = []

    def __init__(self, module, job, device):
        if job["contender"] == "broken":
            raise UserError("it does not start")
        if job["contender"] == "slow":
            time.sleep(0.5)
        self.name = job["contender"]
        self.alive.append(self.name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        if self.name in self.alive:
            self.alive.remove(self.name)

    def ask(self, request):
        return [{"answered": f"{self.name}: {request}"}]


def test_contenders_get_ready_while_others_are_measured_and_none_is_left(monkeypatch):
    import gpu as benchmark

    monkeypatch.setattr(benchmark, "Team", Contender)
    clock = benchmark.Clock(60)
    jobs = [{"contender": name} for name in ("a", "b", "c", "broken", "d")]
    answers = [clock.ask(job, "times", then) for job, then in zip(jobs, [*jobs[1:], None], strict=True)]
    assert [answer.get("answered") for answer in answers] == ["a: times", "b: times", "c: times", None, "d: times"]
    assert answers[3] == {"failed": "it does not start"} and not Contender.alive
    clock.ask(jobs[0], "times", jobs[1])
    assert clock.ask(jobs[2], "times", jobs[0])["answered"] == "c: times"  # another than was expected
    monkeypatch.setattr(clock, "MOST", 0.1)
    assert clock.ask({"contender": "slow"}, "times") == {"failed": "took more than 0.1 s"}
    clock.close()
    assert not Contender.alive
    assert benchmark.Clock(0).ask(jobs[0], "times") == {"failed": "no time left"}


def test_the_benchmark_measures_everything_and_has_a_table(monkeypatch):
    """With an answer in place of each process: every section, in the order of its worth; kept as it comes."""
    import gpu as benchmark

    asked, expected, kept = [], [], {}

    class Clock:
        def ask(self, job, request, following=None):
            asked.append(job["contender"])
            expected.append(following)
            if request == "speeds":
                row = {"operation": "forward", "shape": "s", "dtype": "bf16", "ms": 1.0}
                return {"rows": [row | {"share_of_copy": 0.5, "share_of_product": 0.1}]}
            if request == "largest":
                return {"largest_batch": 100, "limit_bytes": 12e9}
            if job["contender"] == "timm, channels_last":
                return {"failed": "no time left"}
            times = {"forward_ms": None, "backward_ms": None, "step_ms": 2.0}
            return times | {"batch": job["batch"], "images_per_second": 1.0, "peak_bytes": 1e9}

    found = benchmark.measure(list(benchmark.SECTIONS), Clock(), False, kept.__setitem__)
    assert kept == found
    assert asked[-1] == "compiled, max-autotune" and asked[0] == "kernels"
    ready = [(job["contender"], then) for job, then in zip(expected[:-1], asked[1:], strict=True) if job]
    assert len(ready) > 30 and all(prepared == then for prepared, then in ready)
    assert [r["batch"] for r in found["DenseNet-264"] if "batch" in r] == [95] * 7
    table = benchmark.table({name: {"records": records} for name, records in found.items()})
    assert "at most 100 images in 12.0 GB" in table and "no time left" in table and "50% of a copy" in table
