"""The search for the largest batch, on memory that is made up."""

from __future__ import annotations

import itertools
import math

import pytest

from efficient_densenet.measure.max_batch import largest_batch


def search(memory, limit, **kwargs):
    tried = []

    def peak(batch_size):
        tried.append(batch_size)
        return memory(batch_size)

    assert largest_batch(peak, limit, **kwargs).keys() == set(tried) and len(tried) == len(set(tried))
    fitting = max((n for n in tried if memory(n) is not None and memory(n) <= limit), default=0)
    assert tried[0] == 1
    for i in range(1, len(tried)):
        assert tried[i] <= 2 * max(n for n in tried[:i] if n <= fitting), "grew too fast"
    return fitting, tried


def exact(memory, limit):
    return next(n for n in itertools.count(1) if memory(n) is None or memory(n) > limit) - 1


MEMORY = {
    "line": lambda n: 300 + 7 * n,
    "mostly fixed": lambda n: 9000 + n,
    "steps": lambda n: 300 + 64 * math.ceil(n * 7 / 64),
    "kink": lambda n: 300 + 2 * n + max(0, 9 * (n - 50)),
    "curved": lambda n: 300 + int(n**1.3),
    "wavy": lambda n: 300 + 7 * n + (n % 3),
}


@pytest.mark.parametrize("limit", [301, 310, 1000, 9999, 100_000])
@pytest.mark.parametrize("runs_out", [False, True], ids=["measured", "runs out"])
@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY.keys())
def test_finds_the_largest_batch(memory, runs_out, limit):
    def peak(n):
        return None if runs_out and memory(n) > limit else memory(n)

    found, tried = search(peak, limit)
    expected = exact(memory, limit)
    assert found <= expected <= found + max(1, found // 100) - 1
    assert len(tried) <= 2 * math.log2(expected + 2) + 6


def test_a_line_needs_few_trials():
    found, tried = search(lambda n: 300 + 7 * n, 12_000)
    assert found in (1671, 1670, 1669)
    assert len(tried) <= 14


def test_never_comes_near_the_ceiling():
    ceiling = 10_000
    _, tried = search(lambda n: 50 + 90 * n, 9000, ceiling=ceiling)
    assert max(50 + 90 * n for n in tried) <= ceiling
