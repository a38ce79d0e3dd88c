"""The program that holds the native kernels against plain loops: how it is compiled, and what it must say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from efficient_densenet.ops import cpu

COMPILER = shutil.which("g++")
SOURCES = Path(cpu.__file__).parent
HARNESS = Path(__file__).parent / "ops" / "kernels_against_loops.cpp"
OPTIONS = ["-std=c++17", "-Wall", "-Wextra", "-Wno-psabi", f"-I{SOURCES}", str(HARNESS)]


def run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "gradient of the weight" in result.stdout
    assert "FAIL" not in result.stdout
    return result.stdout
