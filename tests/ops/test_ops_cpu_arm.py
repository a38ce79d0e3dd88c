"""The native kernels without Python, against plain loops: here, and for ARM in an emulator."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from plain_loops import COMPILER, OPTIONS, SOURCES, run

from efficient_densenet.ops import cpu

ARM, EMULATOR = (shutil.which(name) for name in ("aarch64-linux-gnu-g++", "qemu-aarch64"))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the commands are those of Linux")


@pytest.mark.skipif(COMPILER is None or cpu.library.load().path is None, reason="needs g++ and the kernels")
def test_kernels_of_this_processor_against_plain_loops(tmp_path):
    kernels = cpu.library.load().path
    subprocess.run([COMPILER, *OPTIONS, kernels, f"-Wl,-rpath,{SOURCES}", "-o", tmp_path / "harness"], check=True)
    run([tmp_path / "harness"])


@pytest.mark.skipif(ARM is None or EMULATOR is None, reason="needs g++-aarch64-linux-gnu and qemu-user")
def test_kernels_for_arm_against_plain_loops(tmp_path):
    kernels = sorted(set(SOURCES.glob("*.cpp")) - {SOURCES / "older_libstdcxx.cpp"})  # what links it all has that
    subprocess.run([ARM, "-static", "-O1", *OPTIONS, *kernels, "-o", tmp_path / "harness"], check=True)
    run([EMULATOR, tmp_path / "harness"])
