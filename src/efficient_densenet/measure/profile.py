"""Where the time of a training step on the shared buffer goes, with the native CPU backend."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from efficient_densenet.measure import tables
from efficient_densenet.measure.contender import TrainingStep
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.networks import Network
from efficient_densenet.measure.results import Record
from efficient_densenet.ops import cpu

_PART_OF = {
    **dict.fromkeys(("norm_relu_conv", "norm_relu_conv_backward"), "convolutions_ms"),
    **dict.fromkeys(("fold_norm", "statistics", "finish", "norm_relu_max_pool"), "passes_ms"),
    **dict.fromkeys(("norm_relu_max_pool_backward", "norm_relu_mean", "norm_relu_mean_backward"), "passes_ms"),
}


def step(contender: str, network: Network, batch_size: int) -> Record:
    """Page faults of a step, and milliseconds in the system; on the buffer also of each part, in the fastest of five.

    Parts are the norm–relu–convolutions and the passes by themselves. What is left are the first convolution, the
    classifier, PyTorch's and Python's own time.
    """
    training = TrainingStep(contender, network, batch_size, Place("cpu"))
    faults = _page_faults(training)
    with _spent() as spent:
        found = []
        for _ in range(5):
            spent.clear()
            found.append({"whole_ms": sum(training()), **spent})
    fastest = min(found, key=lambda step: step["whole_ms"])
    return {**(fastest if len(fastest) > 1 else {}), **faults}


def table(records: tables.Records) -> str:
    """What `step` found, in markdown."""
    header = ["network", "contender", "F+B ms", "norm–relu–convolutions", "other passes", "elsewhere", "page faults",
              "ms in the system"]  # fmt: skip
    rows = []
    for r in records:
        parts = ["", "", "", ""]
        if "whole_ms" in r:
            whole, convolutions, passes = r["whole_ms"], r["convolutions_ms"], r["passes_ms"]
            parts = [f"{ms:,.0f}" for ms in (whole, convolutions, passes, whole - convolutions - passes)]
        system = [f"{r['page_faults']:,.0f}", f"{r['system_ms']:,.0f}"]
        rows.append([f"{r['network']}, batch {r['batch_size']}", r["contender"], *parts, *system])
    return tables.markdown(header, rows)


@contextmanager
def _spent() -> Iterator[Counter[str]]:
    """Milliseconds in each part from here on."""
    spent: Counter[str] = Counter()

    def timed(name: str) -> Callable:
        original = getattr(cpu, name)

        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = original(*arguments, **options)
            spent[_PART_OF[name]] += 1e3 * (time.perf_counter() - start)  # type: ignore[assignment]
            return result

        return run

    with ExitStack() as stack:
        for name in _PART_OF:
            stack.enter_context(mock.patch.object(cpu, name, timed(name)))
        yield spent


def _page_faults(training: TrainingStep, steps: int = 3) -> Record:
    for _ in range(2):
        training()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        training()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "page_faults": (after.ru_minflt - before.ru_minflt) / steps,
        "system_ms": 1e3 * (after.ru_stime - before.ru_stime) / steps,
    }
