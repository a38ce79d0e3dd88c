"""What lasts: many steps, many models, threads, and processes that are forked or spawned."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from comparison import assert_close, assert_identical, buffers, training_step
from torch import nn

from efficient_densenet import DenseNet, make_efficient, restore
from efficient_densenet.execution import KEEP
from efficient_densenet.measure.memory import peak_bytes

WAYS = [*KEEP, "recompute"]


def network(way: str = "bottleneck", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = DenseNet(3, 8, 4, (2, 3), 0.5, bn_size=2, num_classes=5)
    return make_efficient(made, way="recompute") if way == "recompute" else make_efficient(made, way)


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def step(way: str) -> dict[str, torch.Tensor]:
    return training_step(network(way), images())


def forward(way: str) -> dict[str, torch.Tensor]:
    """PyTorch refuses backward in a process that is forked from one that has run it."""
    model = network(way)
    with torch.no_grad():
        return {"training": model(images()), "evaluation": model.eval()(images()), **buffers(model)}


def with_one_thread(run: Callable[[str], dict[str, torch.Tensor]], way: str) -> dict[str, torch.Tensor]:
    """As workers of a data loader have it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = run(way)
    torch.set_num_threads(threads)
    return found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size where Linux tells it")
@pytest.mark.parametrize("way", WAYS)
def test_memory_is_flat_over_many_steps(way):
    model, x = network(way), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def optimize():
        optimizer.zero_grad(set_to_none=False)
        model(x).square().sum().backward()
        optimizer.step()

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(20):
        optimize()
    peak, before = peak_bytes(optimize), resident()
    for _ in range(100):
        optimize()
    assert resident() - before < 2e6
    assert peak_bytes(optimize) == peak


def test_many_models_come_and_go():
    kinds, alive = set(), []
    for seed in range(12):
        model = network(WAYS[seed % 4], seed)
        training_step(model, images())
        kinds |= {type(module) for module in model.modules()}
        twin = copy.deepcopy(model)
        restore(model)
        alive += [weakref.ref(model), weakref.ref(twin)]
        del model, twin
    gc.collect()
    assert [reference for reference in alive if reference() is not None] == []
    assert len(kinds) < 20  # a class for each original and task, not for each model


def test_models_side_by_side_do_not_disturb_each_other():
    models = [network(way) for way in WAYS]
    alone = [training_step(copy.deepcopy(model), images()) for model in models]
    outputs = [model(images()) for model in models]  # all forward passes, and then all backward ones
    for output in outputs:
        (output.square() * torch.linspace(-1, 1, output.numel()).view_as(output) + output).sum().backward()
    for model, expected in zip(models, alone, strict=True):
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        assert_close(gradients, {name: expected[name] for name in gradients})


@pytest.mark.parametrize("way", WAYS)
def test_threads_compute_what_one_computes(way):
    expected = [training_step(network(way, seed), images(seed)) for seed in range(4)]
    models = [network(way, seed) for seed in range(4)]

    def steps(seed):
        for _ in range(3):
            twin = copy.deepcopy(models[seed])
            found = training_step(twin, images(seed))
        return found

    with ThreadPoolExecutor(4) as threads:
        for found, alone in zip(threads.map(steps, range(4)), expected, strict=True):
            assert_identical(found, alone)


@pytest.mark.parametrize(("start", "run"), [("fork", forward), ("spawn", step)])
def test_other_processes_compute_what_this_one_does(start, run):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start}")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    for way in WAYS:  # a process that is forked finds kernels that have run, with threads that it does not have
        step(way)
    torch.set_num_threads(threads)
    alone = partial(with_one_thread, run)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(start)) as processes:
        for way, found in zip(WAYS, processes.map(alone, WAYS, timeout=120), strict=True):
            assert_identical(found, alone(way))
