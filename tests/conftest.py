"""Options and order of the tests, and which of them are slow: ``./test.sh -m "not slow"`` answers in about a minute."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import forked_workers
import pytest

from efficient_densenet.ops.cpu import library

# What shows at once that something is broken: each package's definitions, and recognition as a whole.
QUICK = {
    *("test_imports.py", "test_errors.py", "test_ops_reference.py", "test_ops_backends.py", "test_densenet.py"),
    *("test_recognition.py", "test_dense_block_function.py", "test_shared_memory.py", "test_python_calls.py"),
    *("test_dialects.py", "test_convert.py", "test_published_figures.py"),
}

# With single tests that take long: they begin first, or one of them would run alone at the end.
LONG = {"test_ops_cpu_sanitizers.py", "test_ops_triton.py", "test_ops_triton_compiled.py", "test_kills.py"}
LONG |= {"test_gpu_benchmark.py", "test_nothing_in_silence.py", "test_adopt_distributed.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: Path(item.path).name not in LONG)
    for item in items:
        if Path(item.path).name not in QUICK:
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--damaged-files", type=int, default=2000, help="how many damaged files the reader of weights is tried on"
    )


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """Looking for garbage among all that the libraries brought would take most of the time that measures memory."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def own_convolutions() -> Iterator[None]:
    """Kernels of ours run whole convolutions wherever there are any: on ARM, PyTorch's run otherwise."""
    with library.held_to(library.load().instructions, ours=True):
        yield


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of commands are forks, where it does not matter how a process begins: that has tests of its own."""
    monkeypatch.setattr("efficient_densenet.measure.processes.subprocess", forked_workers)
