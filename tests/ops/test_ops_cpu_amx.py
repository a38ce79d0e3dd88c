"""The kernels for AMX, on processors that have none too: there, a library carries out its instructions in software.

Where the processor has AMX, they are carried out by the processor here as well.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from operands import LEVELS
from plain_loops import COMPILER, OPTIONS, SOURCES, run

from efficient_densenet.ops import cpu
from efficient_densenet.ops.cpu.instructions import Instructions

TESTS = Path(__file__).parents[1]
SOFTWARE = Path(__file__).parent / "amx_in_software.cpp"
# Lets the processor have AMX, and runs the tests that the arguments choose on two threads.
PROGRAM = """
import ctypes, sys
software = ctypes.CDLL(sys.argv[1])
from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.cpu.instructions import Instructions
library.instructions_of = lambda _: (Instructions.AMX, Instructions.AMX)
import pytest, torch
torch.set_num_threads(2)
failed = pytest.main(["-q", "-p", "no:faulthandler", "-p", "no:cacheprovider", *sys.argv[2:]])
print(f"products in software: {software.amx_products()}, threads that use registers: {software.amx_set_up()}")
sys.exit(failed)
"""
# A product that the processor would refuse, for the reason whose first letter the argument has.
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
  asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0");
  return amx_products() != 1;
}
"""

pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux" or max(LEVELS, default=0) < Instructions.AVX512_BF16,
    reason="needs g++, Linux, and AVX-512 with bfloat16, which these kernels use too",
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
    subprocess.run([COMPILER, *options, SOFTWARE, "-o", library], check=True)
    return library


def test_kernels_against_plain_loops(tmp_path, software):
    harness = tmp_path / "harness"
    linked = ["-Wl,--no-as-needed", software, kernels(), f"-Wl,-rpath,{software.parent}:{SOURCES}"]
    subprocess.run([COMPILER, *OPTIONS, *linked, "-o", harness], check=True)
    said = run([harness, str(int(Instructions.AMX))])
    products = int(re.search(r"(\d+) products in software, 0 threads", said)[1])
    assert (products > 0) == in_software


@pytest.mark.skipif(not in_software, reason="the processor has AMX, and all other tests use it")
def test_what_other_tests_say_of_every_level(software):
    """What is not finite goes where it must and nowhere else; a network is as near to float64 as an ordinary one."""
    files = ["ops/test_ops_cpu.py", "execution/test_shared_buffer.py"]
    pooled, finite = "amx-1-2-torch.bfloat16", "non_finite and amx and bfloat16 and ours"
    units = "amx-torch.bfloat16 and contiguous and (67-12- or 12-40- or 130-12-3)"
    network = "bfloat16-bottleneck-bottleneck"
    chosen = [*(str(TESTS / name) for name in files), "-k", f"{pooled} or {finite} or {units} or {network}"]
    command = [sys.executable, "-c", PROGRAM, software, *chosen]
    result = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert re.search(r"\b(\d+) passed", result.stdout)[1] == "25"  # so many have these names
    assert int(re.search(r"products in software: (\d+), threads that use registers: 0", result.stdout)[1]) > 0


@pytest.mark.skipif(not in_software, reason="the processor has AMX, and says so itself")
def test_what_the_processor_would_refuse_ends_the_program(tmp_path, software):
    (tmp_path / "misuse.cpp").write_text(MISUSE)
    program = tmp_path / "misuse"
    subprocess.run(
        [COMPILER, tmp_path / "misuse.cpp", software, f"-Wl,-rpath,{software.parent}", "-o", program], check=True
    )
    refused = {
        "sizes": "do not fit",
        "palette": "palettes 0 and 1",
        "rows": "16 rows of 64 bytes",
        "not set up": "before LDTILECFG",
        "unused": "has no rows",
    }
    assert subprocess.run([program, "good"]).returncode == 0
    for wrong, why in refused.items():
        result = subprocess.run([program, wrong], capture_output=True, text=True)
        assert result.returncode == -signal.SIGABRT and why in result.stderr, wrong
