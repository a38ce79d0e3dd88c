"""The programs in benchmarks/ run, on tiny networks; what they measure is tested elsewhere."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from efficient_densenet.measure import machine, tables
from efficient_densenet.measure.contenders import CONTENDERS, FORMS, PEERS, PEERS_IN_EVALUATION


@pytest.fixture
def script(monkeypatch):
    """Imports a program of that folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    imported = []

    def find(name):
        imported.append(name)
        return importlib.import_module(name)

    yield find
    for name in imported:
        del sys.modules[name]


def sections(folder, name):
    """What was measured on this processor."""
    return json.loads((folder / f"{name}.json").read_text())[machine.processor()]


@pytest.mark.usefixtures("forked")
def test_the_memory_of_the_engine(script, tmp_path, capsys):
    engine = script("engine")
    assert engine.main(["--quick", "--sections", "memory", "depth", "--output", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"engine.json", "engine.md"}
    found = sections(tmp_path, "engine")
    assert set(found) == {"memory", "depth"} and found["depth"]["hardware"]["cpu"]
    ordinary, *shared = found["depth"]["records"]
    assert all(record["largest_residual"] < 0.01 < ordinary["largest_residual"] for record in shared)
    text = (tmp_path / "engine.md").read_text()
    assert capsys.readouterr().out == text and "TINY NETWORKS" in text

    (tmp_path / "engine.md").unlink()
    assert engine.main(["--sections", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "engine.md").read_text() == text


def test_what_the_host_does_in_a_step_on_a_gpu(script, monkeypatch, capsys):
    pytest.importorskip("triton")
    host = script("gpu_host")
    monkeypatch.setattr(host, "_STEPS", 1)
    monkeypatch.setattr(host, "KEEP", ("bottleneck",))
    assert host.main([]) == 0
    found = re.findall(r"(.+), bottleneck: (\d+) operations, (\d+) launches, [\d.]+ ms\n", capsys.readouterr().out)
    text = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text()
    for name, operations, launches in found:
        assert re.search(rf"{name}.*\b{operations}\b.*\b{launches}\b", text, re.DOTALL)
    assert len(found) == 2


def test_times_and_largest_batches_are_tables():
    row = {"contender": "inputs", "F": {"median": 1000.0}, "B": {"median": 2.0}, "F+B": 3.0, "F+B to ordinary": 0.5}
    times = tables.times([{"network": "n", "batch_size": 8, "summary": [row]}])
    assert "| n, batch 8 | inputs | 1,000 | 2 | 3 | 0.500 |" in times
    batches = [{"contender": "ordinary", "largest_batch": 3}, {"contender": "inputs", "largest_batch": 36}]
    fitting = tables.fitting([{"network": "n", "limit_bytes": 2e9, "results": batches}])
    assert "| n in 2 GB | inputs | 36 | 12.0 |" in fitting


@pytest.mark.usefixtures("forked")
def test_the_cpu_backend(script, tmp_path, capsys):
    """Two contests, one of them held to a level; figures of another processor stay."""
    cpu = script("cpu")
    other = {"training": {"quick": False, "hardware": {"cpu": "another", "cores": 2}, "versions": {"torch": "2"}}}
    other["training"] |= {"commit": None, "date": "d", "records": []}
    (tmp_path / "cpu.json").write_text(json.dumps({"another": other}))
    options = ["--quick", "--rounds", "1", "--output", str(tmp_path), "--contenders", "ordinary,bottleneck"]
    assert cpu.main([*options, "--sections", "avx2-evaluation", "bfloat16"]) == 0
    assert json.loads((tmp_path / "cpu.json").read_text())["another"] == other
    found = sections(tmp_path, "cpu")
    assert set(found) == {"avx2-evaluation", "bfloat16"} <= set(cpu.SCRIPT.sections)
    assert all(r["backward_ms"] == [[0.0]] for r in found["avx2-evaluation"]["records"][0]["results"])
    text = (tmp_path / "cpu.md").read_text()
    assert capsys.readouterr().out == text and text.count("TINY NETWORKS") == 2
    assert f"## {machine.processor()}" in text and "## another" in text


def test_the_memory_and_the_conversion_of_other_libraries_models(script, tmp_path, capsys):
    pytest.importorskip("monai")
    assert script("adoption").main(["--quick", "--output", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"adoption.json", "adoption.md"}
    found = sections(tmp_path, "adoption")
    assert set(found) == {"memory", "conversion"} and found["memory"]["hardware"]["cpu"]
    ordinary, *adopted = (record["bytes_per_image"] for record in found["memory"]["records"])
    *kept, recomputing = adopted
    assert len(kept) == 3 and ordinary > 2 * max(kept) and recomputing <= kept[-1]
    text = (tmp_path / "adoption.md").read_text()
    assert capsys.readouterr().out == text and "TINY NETWORKS" in text


@pytest.mark.usefixtures("forked")
def test_peers_side_by_side(script, tmp_path):
    """The command's contenders are tested with it; here a contest and the search, as tables."""
    peers = script("peers")
    tiny = replace(peers.QUICK, rounds=1)
    found = peers.race(["ordinary", "onnxruntime"], lambda plan: plan.large)(tiny)
    assert [result["contender"] for result in found[0]["results"]] == ["ordinary"]
    table = tables.side_by_side(found)
    assert table.startswith("tiny, batch 2\n\n| contender |") and "Not measured: onnxruntime: " in table
    assert all(set(names) <= set(CONTENDERS) for names in (PEERS, PEERS_IN_EVALUATION, FORMS))


def test_errors_against_float64(script, tmp_path, capsys):
    exactness = script("exactness")
    assert exactness.main(["--quick", "--output", str(tmp_path)]) == 0
    records = sections(tmp_path, "exactness")["every-type"]["records"]
    assert {(r["dtype"], r["contender"]) for r in records} == set(product(exactness.DTYPES, exactness.WAYS))
    assert all(
        0 < r[what] < (1e-5 if r["dtype"] == "float32" else 0.2) for r in records for what in ("output", "gradient")
    )
    assert "| bottleneck |" in capsys.readouterr().out


def test_what_is_planned(script, tmp_path, capsys):
    planner = script("planner")
    assert planner.main(["--quick", "--output", str(tmp_path)]) == 0
    records = sections(tmp_path, "planner")["peaks"]["records"]
    assert {record["way"] for record in records} == set(planner.WAYS)
    assert max(abs(planner.error(record)) for record in records) < 0.1
    assert "The planner's largest error" in capsys.readouterr().out
