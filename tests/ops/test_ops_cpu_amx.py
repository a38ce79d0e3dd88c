"""The kernels for AMX, on processors that have none too: there, a library carries out its instructions in software.

Where the processor has AMX, they are carried out by the processor here as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from operands import LEVELS
from test_ops_cpu_arm import NATIVE, OPTIONS, SOURCES, run

from efficient_densenet.ops import cpu
from efficient_densenet.ops.cpu.instructions import Instructions

TESTS = Path(__file__).parents[1]
SOFTWARE = Path(__file__).parent / "amx_in_software.cpp"
# Lets the processor have AMX, and runs the tests that the arguments choose on three threads.
PROGRAM = """
import ctypes, sys
software = ctypes.CDLL(sys.argv[1])
from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.cpu.instructions import Instructions
library.instructions_of = lambda _: (Instructions.AMX, Instructions.AMX)
import pytest, torch
torch.set_num_threads(3)
failed = pytest.main(["-q", "-p", "no:faulthandler", "-p", "no:cacheprovider", *sys.argv[2:]])
print("products in software:", software.amx_products(), "threads that use registers:", software.amx_set_up())
sys.exit(failed)
"""
# One instruction after the other, of which the last one is wrong.
MISUSE = """
extern "C" long amx_products();
int main(int, char **arguments) {
  unsigned char sizes[64] = {1}, memory[16 * 64] = {};
  for (int i = 0; i < 3; ++i)
    sizes[16 + 2 * i] = 64, sizes[48 + i] = 16;
  long distance = 64;
  switch (arguments[1][0]) {
  case 's': sizes[18] = 32; break;
  case 'p': sizes[0] = 2; break;
  case 'r': sizes[49] = 17; break;
  }
  if (arguments[1][0] != 'n')
    asm volatile("ldtilecfg %0" : : "m"(sizes));
  asm volatile("tileloadd (%0,%1,1), %%tmm1" : : "r"(memory), "r"(distance) : "memory");
  if (arguments[1][0] == 'u')
    asm volatile("tilezero %tmm3");
  if (arguments[1][0] == 't')
    asm volatile("tdpbf16ps %tmm1, %tmm1, %tmm0");
  asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0");
  return amx_products() != 1;
}
"""

pytestmark = pytest.mark.skipif(
    NATIVE is None or sys.platform != "linux" or max(LEVELS, default=0) < Instructions.AVX512_BF16,
    reason="needs g++, Linux, and what these kernels use beside AMX: AVX-512 with bfloat16",
)
in_software = Instructions.AMX not in LEVELS


def kernels():
    path = cpu.library.load().path
    assert path is not None
    return path


@pytest.fixture(scope="module")
def software(tmp_path_factory):
    library = tmp_path_factory.mktemp("amx") / "amx_in_software.so"
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run([NATIVE, *options, SOFTWARE, "-o", library], check=True)
    return library


def test_kernels_against_plain_loops(tmp_path, software):
    harness = tmp_path / "harness"
    subprocess.run([NATIVE, *OPTIONS, software, kernels(), f"-Wl,-rpath,{SOURCES}", "-Wl,--no-as-needed", "-o", harness], check=True)
    run([harness, "4"])


@pytest.mark.skipif(not in_software, reason="the processor has AMX, and every other test uses it")
def test_what_other_tests_say_of_every_level(software):
    """Also what few values, and values that are not finite, may change, and whole networks."""
    files = ["ops/test_ops_cpu.py", "ops/test_ops_backends.py", "execution/test_shared_buffer.py"]
    operations = "amx and bfloat16"
    chosen = f"{operations}"
    command = [sys.executable, "-c", PROGRAM, software, *(str(TESTS / name) for name in files), "-k", chosen, "--durations=20"]
    result = subprocess.run(command, env=os.environ, capture_output=True, text=True, cwd=TESTS.parent)
    print(result.stdout[-6000:])
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
