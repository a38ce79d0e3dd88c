"""README, docs and pictures say what the measurements say, and these reach what they are to reach."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from efficient_densenet.measure import plots, results

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "benchmarks" / "results"


@pytest.fixture
def redraw(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import redraw

    yield redraw
    for name in ("redraw", "adoption", "cpu", "curves", "engine", "exactness", "peers", "planner"):
        del sys.modules[name]


def test_every_table_and_picture_is_what_the_measurements_make_it(redraw, capsys):
    assert redraw.main(["--check"]) == 0, capsys.readouterr().out


def test_what_differs_from_the_measurements_is_found_and_redrawn(redraw, monkeypatch, tmp_path, capsys):
    for table in redraw.TABLES:
        (tmp_path / table.document).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / table.document, tmp_path / table.document)
    shutil.copytree(PUBLISHED, tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(redraw, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    before = readme.read_text()
    readme.write_text(before.replace("| 20.4 |", "| 20.5 |"))
    (tmp_path / "benchmarks" / "results" / "memory_against_depth.png").unlink()
    stale = "README.md", "benchmarks/results/memory_against_depth.png"
    assert redraw.main(["--check"]) == 1
    assert capsys.readouterr().out == "".join(f"differs from its data: {name}\n" for name in stale)
    assert redraw.main([]) == 0
    assert capsys.readouterr().out == "".join(f"written: {name}\n" for name in stale)
    assert readme.read_text() == before and redraw.main(["--check"]) == 0

    readme.write_text(before.replace("<!-- end of memory -->", ""))
    with pytest.raises(ValueError, match="no place for the table memory"):
        redraw.main(["--check"])


@pytest.mark.parametrize("draw", [plots.time_against_memory, plots.errors_against_float64])
def test_a_picture_of_other_measurements_is_stale(draw, tmp_path):
    pytest.importorskip("matplotlib")
    row = {"contender": "inputs", "step_bytes_per_image": 2e6, "F+B": 5.0}
    errors = {"dtype": "float32", "contender": "inputs", "output": 1e-7, "gradient": 1e-6}
    records = [{"network": "n", "batch_size": 2, "summary": [row], **errors}]
    file = tmp_path / "picture.png"
    plots.save(draw, records, file)
    assert plots.is_current(records, file)
    assert not plots.is_current([records[0] | {"batch_size": 3}], file)
    assert not plots.is_current(records, tmp_path / "none.png")


AT_MOST = {
    ("L=40 k=12", "bottleneck"): 2.1e6,
    ("L=40 k=12", "features"): 2.1e6,
    ("L=40 k=12", "inputs"): 1.8e6,
    ("BC L=100 k=12", "bottleneck"): 6.5e6,
    ("BC L=100 k=12", "features"): 2.9e6,
    ("BC L=100 k=12", "inputs"): 2.4e6,
    ("DenseNet-121", "bottleneck"): 34e6,
    ("DenseNet-121", "features"): 16e6,
    ("DenseNet-121", "inputs"): 14.5e6,
    ("torchvision densenet121", "bottleneck"): 36e6,
    ("torchvision densenet121", "features"): 18e6,
    ("timm densenet121", "bottleneck"): 36e6,
    ("timm densenet121", "features"): 18e6,
}
"""Bytes per image."""


def sections(script, section):
    """That section of every processor."""
    for found in results.read(PUBLISHED / f"{script}.json").values():
        if section in found:
            yield found[section]["records"]


@pytest.mark.parametrize("script", ["engine", "adoption"])
def test_activations_take_little_memory(script):
    for records in sections(script, "memory"):
        found = {(r["network"], r["contender"]): r["bytes_per_image"] for r in records}
        wanted = [key for key in AT_MOST if key in found]
        assert len(wanted) >= 4 and all(found[key] <= AT_MOST[key] for key in wanted)


def test_volumes_take_a_quarter_of_the_memory():
    for records in sections("adoption", "memory"):
        found = {r["contender"]: r["bytes_per_image"] for r in records if r["network"] == "MONAI DenseNet121, 3D"}
        assert found["features"] <= 0.25 * found["ordinary"]


def test_conversion_takes_less_than_two_seconds():
    for records in sections("adoption", "conversion"):
        assert all(max(record["seconds"]) <= 2 for record in records)


def test_what_is_planned_is_within_a_tenth_of_what_a_step_takes():
    for records in sections("planner", "peaks"):
        assert all(abs(record["planned"] / record["measured"] - 1) <= 0.1 for record in records)


def test_gradients_in_float32_are_no_further_from_float64_than_the_ordinary_networks():
    for records in sections("exactness", "every-type"):
        found = {r["contender"]: r["gradient"] for r in records if r["dtype"] == "float32"}
        assert max(found.values()) <= max(found["ordinary"], found["ordinary-channels-last"])
