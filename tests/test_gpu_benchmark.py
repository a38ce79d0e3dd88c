"""The programs that measure on a GPU, where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from triton_interpreter import needs_interpreter

import efficient_densenet
from efficient_densenet.errors import UserError
from efficient_densenet.measure import deadline, gpu_sections, gpu_worker

pytest.importorskip("triton")
from efficient_densenet.ops.triton import ahead_of_time, speeds


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.config.rootpath / "benchmarks"))


def test_the_benchmark_needs_a_gpu_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    import gpu as benchmark

    assert benchmark.main(["--quick"]) == 2
    assert "there is no GPU" in capsys.readouterr().err


def test_compiled_kernels_take_a_line_each_and_those_of_other_devices_stay(monkeypatch, tmp_path, capsys):
    import gpu as benchmark

    spilled, file = 0, tmp_path / "triton_kernels.json"

    def record(*one):
        results = {"shared_bytes": 0, "registers": 9, "spilled_bytes": spilled, "spills_in_loop": False}
        return ahead_of_time.asked_for(*one) | results | {"tensor_cores": True, "overtaken": ""}

    monkeypatch.setattr(ahead_of_time, "record", record)
    monkeypatch.setattr(ahead_of_time, "SHAPES", ahead_of_time.SHAPES[:1])
    monkeypatch.setattr(ahead_of_time, "FEW_PIXELS", ())
    options = ["--compile-only", "--output", str(tmp_path), "--targets"]
    assert benchmark.main([*options, "sm_90"]) == 0
    before = json.loads(file.read_text())["kernels"]
    spilled = 8
    assert benchmark.main([*options, "sm_80"]) == 1
    assert "it spills 8 bytes" in capsys.readouterr().out
    kernels = json.loads(file.read_text())["kernels"]
    assert list(kernels) == ["sm_90", "sm_80"] and kernels["sm_90"] == before["sm_90"]
    found = ahead_of_time.records_of(kernels)
    assert found[0]["target"] == "sm_90" and ahead_of_time.tables(found) == kernels
    assert all(
        file.read_text().count(f'["{kind}", ') == sum(one["type"] == kind for one in found) for kind in ("bf16", "tf32")
    )


def test_the_product_beside_the_kernels_is_in_tf32_and_nothing_after_it(monkeypatch):
    before = torch.backends.cuda.matmul.fp32_precision
    with speeds._tf32():
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
        for _ in range(100):
            if self.name == "compiled for long" and request == "prepare":
                time.sleep(0.1)
                if self.name not in self.alive:
                    raise UserError("it was killed")
        return [{"answered": f"{self.name}: {request}"}]


def test_contenders_get_ready_while_others_are_measured_and_none_is_left(monkeypatch):
    monkeypatch.setattr(deadline, "Team", Contender)
    left = deadline.Deadline(60)
    jobs = [{"contender": name} for name in ("a", "b", "c", "broken", "d")]
    answers = [left.ask(job, "times", then) for job, then in zip(jobs, [*jobs[1:], None], strict=True)]
    assert [answer.get("answered") for answer in answers] == ["a: times", "b: times", "c: times", None, "d: times"]
    assert answers[3] == {"failed": "it does not start"} and not Contender.alive
    left.ask(jobs[0], "times", jobs[1])
    assert left.ask(jobs[2], "times", jobs[0])["answered"] == "c: times"  # another than was expected
    monkeypatch.setattr(left, "MOST", 0.1)
    assert left.ask({"contender": "slow"}, "times") == {"failed": "took more than 0.1 s"}
    left.close()
    assert not Contender.alive
    assert deadline.Deadline(0).ask(jobs[0], "times") == {"failed": "no time left"}


def test_contenders_that_compile_do_it_side_by_side_and_wait_for_their_turn(monkeypatch):
    monkeypatch.setattr(deadline, "Team", Contender)
    left = deadline.Deadline(60)
    jobs = [{"contender": name} for name in ("compiled", "broken", "compiled for long", "never asked")]
    monkeypatch.setattr(left, "PREPARATION", 5.3)
    left.prepare(jobs)
    assert sorted(Contender.alive) == ["compiled", "never asked"]
    assert left.ask(jobs[0], "times", jobs[3])["answered"] == "compiled: times"
    assert left.ask(jobs[1], "times") == {"failed": "it does not start"}
    assert left.ask(jobs[2], "times") == {"failed": "took more than 5.3 s to compile"}
    assert Contender.alive == ["never asked"]
    left.close()
    assert not Contender.alive


def test_the_benchmark_measures_everything_and_has_a_table(monkeypatch):
    """With an answer in place of each process: every section, in the order of its worth; kept as it comes."""
    import gpu

    asked, expected, kept, prepared = [], [], {}, []

    class Everything:
        def prepare(self, jobs):
            prepared.extend(job["contender"] for job in jobs)

        def ask(self, job, request, following=None, until_the_end=False):
            asked.append(job["contender"])
            expected.append(following)
            if request == "speeds":
                row = {"operation": "forward", "shape": "s", "dtype": "bf16", "ms": 1.0}
                return {"rows": [row | {"share_of_copy": 0.5, "share_of_product": 0.1}]}
            if request == "largest":
                return {"largest_batch": 100, "limit_bytes": 12e9}
            if job["contender"] == "timm-channels-last":
                return {"failed": "no time left"}
            times = {"forward_ms": None, "backward_ms": None, "step_ms": 2.0}
            return times | {"batch": job["batch_size"], "images_per_second": 1.0, "peak_bytes": 1e9}

    found = gpu_sections.measure(gpu.SECTIONS, Everything(), False, kept.__setitem__)
    assert kept == found
    assert asked[-1] == "torchvision-compiled-max-autotune" and asked[0] == "kernels"
    assert {"ordinary-cudnn-benchmark", "torchvision-cudnn-benchmark", "compiled-budget-0.1"} <= set(prepared)
    assert not [name for name in prepared if name.endswith("max-autotune")]
    ready = [(job["contender"], then) for job, then in zip(expected[:-1], asked[1:], strict=True) if job]
    assert len(ready) > 30 and all(prepared == then for prepared, then in ready)
    assert [r["batch"] for r in found["DenseNet-264"] if "batch" in r] == [95] * 8
    table = gpu_sections.table({name: {"records": records} for name, records in found.items()})
    assert "at most 100 images in 12.0 GB" in table and "no time left" in table and "50% of a copy" in table


def program(path, shell):
    path.write_text(f"#!/bin/sh\n{shell}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """An environment in which every Python takes the CPU for a GPU, and there is something for a sanitizer."""
    programs = tmp_path_factory.mktemp("programs")
    program(programs / "python", f'exec "{sys.executable}" "$@"')
    program(programs / "compute-sanitizer", 'shift 2; echo sanitized: "$@"')  # which is run by itself already
    here = Path(__file__).parent
    source = Path(efficient_densenet.__file__).parents[1]
    return os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{here / 'stand_in'}:{here}:{source}",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "TEST_WORKERS": "0",
        "QUICK": "1",
    }


def first(stand_in, call, folder):
    script = Path(__file__).parents[1] / "benchmarks" / "gpu_first.sh"
    return subprocess.run(["bash", script, call, folder], env=stand_in, capture_output=True, text=True, timeout=300)


@needs_interpreter
def test_the_first_call_on_a_gpu(stand_in, tmp_path):
    result = first(stand_in, "1", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {file.stem for file in tmp_path.iterdir()} == {"race", "tests", "memcheck", "kernels", "gpu-quick"}
    (race,) = (found["race"] for found in json.loads((tmp_path / "race.json").read_text()).values())
    assert [(record["wait"], record["faults"]) for record in race["records"]] == [(True, []), (False, [])]
    assert "1 passed" in (tmp_path / "tests.log").read_text()
    assert "sanitized: python -m pytest -q -m gpu " in (tmp_path / "memcheck.log").read_text()
    (kernels,) = json.loads((tmp_path / "gpu-quick.json").read_text())["stand-in"]["kernels"]["records"]
    assert len(kernels["rows"]) == 20 and not kernels["failed_kernels"]


@needs_interpreter
@pytest.mark.parametrize(("call", "section"), [("2", "L40"), ("3", "DenseNet-121")])
def test_the_later_calls_on_a_gpu_measure_every_contender_and_keep_what_is_there(stand_in, tmp_path, call, section):
    import gpu

    before = {"another": {}, "stand-in": {"kept": {"quick": True, "records": []}}}
    (tmp_path / "gpu-quick.json").write_text(json.dumps(before))
    result = first(stand_in | {"ONE_PROCESS": "1"}, call, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    kept = json.loads((tmp_path / "gpu-quick.json").read_text())
    found = kept.pop("stand-in")
    assert kept == {"another": {}} and set(found) == {"kept", section} | ({"kernels"} if call == "2" else set())
    records = {record["contender"]: record for record in found[section]["records"]}
    assert list(records) == sorted(gpu.SECTIONS[section].contenders, key=gpu_sections._tunes)
    assert not [record for record in records.values() if "failed" in record]


def test_a_step_that_fails_is_told_and_the_others_run(stand_in, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    program(programs / "python", "echo no torch here >&2; exit 3")
    result = first(stand_in | {"PATH": f"{programs}:{stand_in['PATH']}"}, "1", tmp_path / "results")
    assert result.returncode == 1
    for name in ("race", "tests", "kernels"):
        assert (tmp_path / "results" / f"{name}.log").read_text() == f"no torch here\n== {name} ended with 3\n"


@pytest.mark.parametrize("arguments", [[], ["1"], ["4", "folder"]])
def test_the_first_calls_say_how_they_are_used(stand_in, arguments, tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "gpu_first.sh"
    result = subprocess.run(["bash", script, *arguments], env=stand_in, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("usage: ")


def test_a_result_is_not_lost_to_a_later_failure():
    before = [{"contender": "a", "step_ms": 1}, {"contender": "b", "failed": "no time left"}, {"contender": "c"}]
    now = [{"contender": "a", "failed": "no time left"}, {"contender": "b", "step_ms": 2}, {"contender": "d"}]
    expected = [{"contender": "a", "step_ms": 1}, {"contender": "b", "step_ms": 2}, {"contender": "c"}, now[2]]
    assert gpu_sections.merged(before, now) == expected


def test_the_largest_batch_is_searched_within_the_limit(monkeypatch):
    tried = []

    class Step:
        def peak(self, batch_size):
            tried.append(batch_size)
            return None if batch_size > 40 else 1000 + 10 * batch_size

    monkeypatch.setattr(gpu_worker, "limit_memory", tried.append)
    found = gpu_worker.GpuStep.largest(Step(), 1300)
    assert found["largest_batch"] == 30 and found["limit_bytes"] == tried[0] == 1300
    assert set(tried[2:]) == set(found["trials"])
