from __future__ import annotations

import platform
import re

import pytest
import torch

import efficient_densenet
from efficient_densenet.cli import main
from efficient_densenet.measure import machine


def test_env_prints_what_a_report_of_a_bug_needs(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert re.match(r"cpu: .+, \d+ cores, [\d.,]+ [MG]B\nsystem: .+\ncommit: .+\n", re.sub("gpu: .*\\n", "", printed))
    assert f"torch {torch.__version__}\n" in printed
    assert printed.endswith(f"{efficient_densenet.backends()}\n")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("processor\t: 0\nmodel name\t: Make: Type 7\n\nprocessor\t: 1\nmodel name\t: Make: Type 7\n", "Make: Type 7"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n", "ARM, implementer 0x41, part 0xd0c"),
        (None, platform.processor() or platform.machine()),
    ],
    ids=["with a name", "ARM", "not Linux"],
)
def test_processors_have_different_names(said, name, tmp_path, monkeypatch):
    """Figures are kept by them."""
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    if said is not None:
        (tmp_path / "cpuinfo").write_text(said)
    assert machine.processor().startswith(f"{name}, ")
