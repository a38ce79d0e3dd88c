"""The programs in benchmarks/ run, on tiny networks; what they measure is tested elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import engine

    yield engine
    for name in ("engine", "engine_report"):
        del sys.modules[name]


def test_the_memory_of_the_engine(engine, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert engine.main(["--quick", "--sections", "memory", "depth", "--output", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"engine.json", "engine.md", "engine.png"}
    found = json.loads((tmp_path / "engine.json").read_text())
    assert set(found) == {"memory", "depth"} and found["depth"]["hardware"]["cpu"]
    ordinary, *shared = found["depth"]["records"]
    assert all(record["largest_residual"] < 0.01 < ordinary["largest_residual"] for record in shared)
    table = (tmp_path / "engine.md").read_text()
    assert capsys.readouterr().out == table and "TINY NETWORKS" in table

    (tmp_path / "engine.md").unlink()
    assert engine.main(["--sections", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "engine.md").read_text() == table


def test_every_section_has_a_table(engine):
    import engine_report

    assert set(engine.SECTIONS) == set(engine_report._TABLES)


def test_times_and_largest_batches_are_tables(engine):
    import engine_report

    row = {"contender": "inputs", "F": {"median": 1000.0}, "B": {"median": 2.0}, "F+B": 3.0, "F+B to ordinary": 0.5}
    machine = {
        "quick": False,
        "hardware": {"cpu": "c", "cores": 2},
        "versions": {"torch": "2"},
        "commit": None,
        "date": "d",
    }
    batches = [{"contender": "ordinary", "largest_batch": 3}, {"contender": "inputs", "largest_batch": 36}]
    found = {
        "time": machine | {"records": [{"network": "n", "batch_size": 8, "summary": [row]}]},
        "max-batch": machine | {"records": [{"network": "n", "limit_bytes": 2e9, "results": batches}]},
    }
    text = engine_report.tables(found)
    assert "| n, batch 8 | inputs | 1,000 | 2 | 3 | 0.500 |" in text
    assert "| n | 2 GB | inputs | 36 | 12.0 |" in text


@pytest.fixture
def cpu_script(engine):
    import cpu

    yield cpu
    del sys.modules["cpu"]


def test_the_cpu_backend(cpu_script, tmp_path, capsys):
    """Two contests, one of them held to a level, and the profile; figures of another processor stay."""
    other = {"training": {"quick": False, "hardware": {"cpu": "another", "cores": 2}, "versions": {"torch": "2"}}}
    other["training"] |= {"commit": None, "date": "d", "records": []}
    (tmp_path / "cpu.json").write_text(json.dumps({"another": other}))
    options = ["--quick", "--rounds", "1", "--output", str(tmp_path), "--contenders", "ordinary,bottleneck"]
    assert cpu_script.main([*options, "--sections", "avx2-evaluation", "bfloat16", "profile"]) == 0
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert found.pop("another") == other
    ((processor, sections),) = found.items()
    assert processor.endswith(cpu_script.cpu.library.load().instructions.option)
    assert set(sections) == {"avx2-evaluation", "bfloat16", "profile"} <= set(cpu_script.SECTIONS)
    assert all(r["backward_ms"] == [[0.0]] for r in sections["avx2-evaluation"]["records"][0]["results"])
    for record in sections["profile"]["records"][:2]:
        assert 0 < record["convolutions_ms"] + record["passes_ms"] < record["whole_ms"]
    text = (tmp_path / "cpu.md").read_text()
    assert capsys.readouterr().out == text and text.count("TINY NETWORKS") == 3
    assert f"## {processor}" in text and "## another" in text


def test_the_memory_and_the_conversion_of_other_libraries_models(engine, tmp_path, capsys):
    pytest.importorskip("monai")
    import adoption

    assert adoption.main(["--quick", "--output", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"adoption.json", "adoption.md"}
    found = json.loads((tmp_path / "adoption.json").read_text())
    assert set(found) == {"memory", "conversion"} and found["memory"]["hardware"]["cpu"]
    ordinary, *adopted = (record["bytes_per_image"] for record in found["memory"]["records"])
    assert len(adopted) == 3 and ordinary > 2 * max(adopted)
    text = (tmp_path / "adoption.md").read_text()
    assert capsys.readouterr().out == text and "TINY NETWORKS" in text and "1.00 reached" in text

    (tmp_path / "adoption.md").unlink()
    assert adoption.main(["--sections", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "adoption.md").read_text() == text
    del sys.modules["adoption"]
