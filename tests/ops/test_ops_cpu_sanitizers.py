"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer: nothing beyond a row is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from efficient_densenet.ops import cpu

TESTS = Path(__file__).parent
COMPILER = shutil.which("g++")
# Not optimised: compiling takes longer than running, and no access to memory is removed before a sanitizer sees it.
FLAGS = ["-O0", "-std=c++17", "-fPIC", "-shared", "-Wno-psabi"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# Puts the kernels of the first argument in place of the installed ones, and runs the tests that the others choose. A
# process beside them goes one row too far: or nobody would know that the sanitizer sees these kernels.
PROGRAM = """
import os, sys
from pathlib import Path
import pytest, torch
from efficient_densenet.ops.cpu import library
loaded = library._loaded = library.open_library(Path(sys.argv[1]))
if os.fork() == 0:
    x, zero = torch.zeros(99, 7), torch.zeros(7)
    rows = library.Rows(x.data_ptr(), 7)
    loaded.kernels[torch.float32].finish(rows, rows, 100, 7, *[zero.data_ptr()] * 3, rows, 1)
    os._exit(0)
print("one row too many ends with", os.waitstatus_to_exitcode(os.wait()[1]))
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""

pytestmark = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux") or cpu.library.load().kernels is None,
    reason="needs g++ on Linux",
)


def sanitized(folder):
    """The kernels as a library, with the sanitizers' checks."""
    sources = sorted(Path(cpu.__file__).parent.glob("*.cpp"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    compilers = [
        subprocess.Popen([COMPILER, *FLAGS, *SANITIZERS, "-c", source, "-o", made])
        for source, made in zip(sources, objects, strict=True)
    ]
    assert [compiler.wait() for compiler in compilers] == [0] * len(sources)
    library = folder / "kernels.so"
    subprocess.run([COMPILER, *FLAGS, *SANITIZERS, *objects, "-o", library], check=True)
    return library


def test_every_header_compiles_alone():
    headers = sorted(Path(cpu.__file__).parent.glob("*.h"))
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-Wno-psabi", "-x", "c++"]
    compilers = {header.name: subprocess.Popen([*command, header]) for header in headers}
    assert [name for name, compiler in compilers.items() if compiler.wait() != 0] == []


def test_no_kernel_goes_beyond_its_memory_and_the_sanitizer_would_have_seen_it(tmp_path):
    names = ("libasan.so", "libubsan.so")
    paths = [subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip() for name in names]
    settings = {"LD_PRELOAD": ":".join(paths), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    files = [str(TESTS / "test_ops_backends.py"), str(TESTS / "test_ops_cpu.py")]
    # Vectors of 32 and of 64 bytes, and the shapes and layouts in which something lies behind a row. The level above
    # AVX-512 has kernels of its own for bfloat16 alone; for other types it has those of AVX-512.
    left_out = "eager or whole or image or channels_last or without_kernels or environment or backends_tell"
    repeated = "avx512-bfloat16 or [avx512- and torch.bfloat16 or avx512_bf16 and not bfloat16"
    chosen = f"cpu and not ({left_out} or non_finite or bit_for_bit or baseline or {repeated})"
    command = [sys.executable, "-c", PROGRAM, str(sanitized(tmp_path)), *files, "-k", chosen]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=TESTS.parents[1])
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout
    assert "one row too many ends with 1\n" in result.stdout
    assert result.stderr.count("ERROR: AddressSanitizer: heap-buffer-overflow") == 1
