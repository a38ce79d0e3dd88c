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
FLAGS = ["-O1", "-g", "-std=c++17", "-fPIC", "-shared", "-Wno-psabi"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# Puts the kernels of the first argument in place of the installed ones.
BEGIN = """
import sys
from pathlib import Path
from efficient_densenet.ops.cpu import library
loaded = library._loaded = library.open_library(Path(sys.argv[1]))
"""
RUN_TESTS = "import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[2:]]))"
ONE_ROW_TOO_MANY = """
import torch
x, zero = torch.zeros(99, 7), torch.zeros(7)
rows = library.Rows(x.data_ptr(), 7)
loaded.kernels[torch.float32].finish(rows, rows, 100, 7, *[zero.data_ptr()] * 3, rows, 1)
"""

pytestmark = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux") or cpu.library.load().kernels is None,
    reason="needs g++ on Linux",
)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    sources = sorted(Path(cpu.__file__).parent.glob("*.cpp"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    # Side by side: they take a minute.
    compilers = [
        subprocess.Popen([COMPILER, *FLAGS, *SANITIZERS, "-c", source, "-o", made])
        for source, made in zip(sources, objects, strict=True)
    ]
    assert [compiler.wait() for compiler in compilers] == [0] * len(sources)
    library = folder / "kernels.so"
    subprocess.run([COMPILER, *FLAGS, *SANITIZERS, *objects, "-o", library], check=True)
    return library


def run(library, code, *arguments):
    names = ("libasan.so", "libubsan.so")
    paths = [subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip() for name in names]
    settings = {"LD_PRELOAD": ":".join(paths), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-c", BEGIN + code, str(library), *arguments]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=TESTS.parents[1])


def test_every_header_compiles_alone():
    headers = sorted(Path(cpu.__file__).parent.glob("*.h"))
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-Wno-psabi", "-x", "c++"]
    compilers = {header.name: subprocess.Popen([*command, header]) for header in headers}
    assert [name for name, compiler in compilers.items() if compiler.wait() != 0] == []


def test_no_kernel_goes_beyond_its_memory(sanitized):
    files = [str(TESTS / "test_ops_backends.py"), str(TESTS / "test_ops_cpu.py")]
    # Vectors of 32 and of 64 bytes, and the shapes and layouts in which something lies behind a row.
    left_out = "eager or whole or image or channels_last or without_kernels or environment or backends_tell"
    chosen = f"cpu and not ({left_out} or non_finite or bit_for_bit or baseline or avx512- or avx512])"
    result = run(sanitized, RUN_TESTS, *files, "-k", chosen)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "passed" in result.stdout


def test_the_sanitizer_would_have_seen_it(sanitized):
    result = run(sanitized, ONE_ROW_TOO_MANY)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
