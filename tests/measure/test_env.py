from __future__ import annotations

import re

import torch

import efficient_densenet
from efficient_densenet.cli import main


def test_env_prints_what_a_report_of_a_bug_needs(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert re.match(r"cpu: .+, \d+ cores, [\d.,]+ [MG]B\nsystem: .+\ncommit: .+\n", re.sub("gpu: .*\\n", "", printed))
    assert f"torch {torch.__version__}\n" in printed
    assert printed.endswith(f"{efficient_densenet.backends()}\n")
