from __future__ import annotations

import torch

import efficient_densenet
from efficient_densenet.cli import main


def test_env_prints_what_a_report_of_a_bug_needs(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    for name in ("cpu", "cores", "memory_bytes", "system", "commit"):
        assert f"\n{name}: " in f"\n{printed}"
    assert f"torch {torch.__version__}\n" in printed
    assert printed.endswith(f"{efficient_densenet.backends()}\n")
