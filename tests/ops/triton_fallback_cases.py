"""Kernels that cannot be compiled, loaded or started, and the check of those that can: run by `test_ops_triton`.

In Triton's interpreter, in a process of its own, as `triton_cases`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from functools import partial

import pytest
import torch
from operands import Operands, empty_statistics, slice_of_channels, weight_for
from triton_interpreter import correct_bfloat16, without_repetition

from efficient_densenet.ops import reference
from efficient_densenet.ops import triton as ops
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_ops_triton.py, with TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime.errors import OutOfResources, PTXASError

from efficient_densenet.ops.triton import check, launch, recording

without_repetition()

ERRORS = [
    OutOfResources(81920, 65536, "shared memory"),
    PTXASError("ptxas died"),
    RuntimeError("PassManager::run failed"),
    FileNotFoundError("no C compiler"),
]
KERNELS = {
    "norm_relu_conv": ["rectifier.rectify_kernel", "forward.norm_relu_conv_kernel", "moments.merge_kernel"],
    "norm_relu_conv_backward": [
        *("backward.grad_x_kernel", "norms.norm_gradients_kernel"),
        *("backward.grad_weight_kernel", "backward.sum_parts_kernel"),
    ],
    "norm_relu_max_pool": ["max_pool.max_pool_kernel"],
    "norm_relu_max_pool_backward": ["max_pool.max_pool_backward_kernel", "norms.norm_gradients_kernel"],
    "norm_relu_mean": ["mean.mean_kernel"],
    "norm_relu_mean_backward": ["rectifier.rectify_backward_kernel", "norms.norm_gradients_kernel"],
    "statistics": ["moments.moments_kernel", "moments.merge_kernel"],
    "finish": ["moments.finish_kernel"],
    "fold_norm": ["norms.fold_kernel"],
}


@pytest.fixture(autouse=True)
def first_use(monkeypatch):
    monkeypatch.setattr(ops, "_state", {"warned": set(), "failed": set()})
    monkeypatch.setattr(recording, "_recordings", {})
    correct_bfloat16(monkeypatch.setattr)


def results(run, operation, dtype=torch.float32):
    """What an operation writes, adds to and returns."""
    x, norm = Operands.random((2, (6, 8), 8), dtype, 3)
    grad_x, through, found = (
        slice_of_channels(torch.randn(x.shape).to(dtype), 3),
        torch.ones(2, 8),
        empty_statistics(x),
    )
    out, of_out, weight = torch.zeros(2, 6, 8, 4, dtype=dtype), torch.zeros(2, 4), weight_for(x, 4, 3)
    halved, pooled = torch.randn(2, 3, 4, 8).to(dtype), torch.randn(2, 8).to(dtype)
    into = Affine(*torch.zeros(4, 8))
    returned = {
        "norm_relu_conv": lambda: run.norm_relu_conv(x, norm, weight, out, 1, Statistics(*of_out)),
        "norm_relu_conv_backward": lambda: run.norm_relu_conv_backward(
            BackwardOperands(torch.ones_like(out), x, norm, weight, grad_x, True, through)
        ),
        "norm_relu_max_pool": lambda: run.norm_relu_max_pool(x, norm, halved),
        "norm_relu_max_pool_backward": lambda: run.norm_relu_max_pool_backward(halved, x, norm, grad_x, through),
        "norm_relu_mean": lambda: run.norm_relu_mean(x, norm, pooled),
        "norm_relu_mean_backward": lambda: run.norm_relu_mean_backward(pooled, x, norm, grad_x, through),
        "statistics": lambda: run.statistics(x, found),
        "finish": lambda: run.finish(grad_x, x, norm.mean, through, torch.tensor(3.0), grad_x),
        "fold_norm": lambda: run.fold_norm(Statistics(*norm[:2]), norm.scale, norm.shift, 1e-5, into),
    }[operation]()
    return [out, of_out, grad_x, through, halved, pooled, *found, *into, *(returned or ())]


def assert_right(found, operation):
    for a, b in zip(found, results(reference, operation), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("operation", "kernel"), [(name, kernel) for name, all_ in KERNELS.items() for kernel in all_])
def test_an_operation_falls_back_as_a_whole_with_one_warning(operation, kernel, error, monkeypatch):
    """Whichever of its kernels cannot be compiled: nothing has been added by the others."""
    module, name = kernel.split(".")
    tried = []

    def fail(*arguments, **options):
        tried.append(name)
        raise error

    broken = getattr(importlib.import_module(f"{ops.__name__}.{module}"), name)
    monkeypatch.setattr(broken, "warmup", fail)
    with pytest.warns(UserWarning, match=f"{operation} for torch.float32: {name} cannot be compiled") as caught:
        for _ in range(2):
            assert_right(results(ops, operation), operation)
    assert len(caught) == 1 and len(tried) == 1  # plain PyTorch from then on


@pytest.mark.parametrize("operation", KERNELS)
def test_other_operations_and_types_go_on(operation, monkeypatch):
    ops._state["failed"].add((operation, torch.device("cpu"), torch.bfloat16))
    monkeypatch.setattr(ops.eager, operation, None)
    assert_right(results(ops, operation), operation)


def started(monkeypatch, behave):
    """Every kernel is started by `behave`, which gets its number and what starts it."""
    compiled, numbers = launch._compiled_for, iter(range(99))

    def wrapped(*arguments):
        start = compiled(*arguments)

        def behaving(*values, **named):
            behave(next(numbers), partial(start.func, *values, **named))

        return partial(behaving, *start.args, **start.keywords)

    monkeypatch.setattr(launch, "_compiled_for", wrapped)


@pytest.mark.parametrize("operation", KERNELS)
def test_an_operation_whose_first_kernel_does_not_start_falls_back(operation, monkeypatch):
    def behave(number, start):
        raise RuntimeError("Triton Error [CUDA]: invalid argument")

    started(monkeypatch, behave)
    with pytest.warns(UserWarning, match="does not start: .*invalid argument"):
        assert_right(results(ops, operation), operation)


def test_an_operation_that_has_begun_does_not_begin_again(monkeypatch):
    """What its first kernel added to would be added to twice."""

    def behave(number, start):
        if number == 1:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        start()

    started(monkeypatch, behave)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="illegal memory access"):
        warnings.simplefilter("error", UserWarning)  # as a fallback would give; old NumPy deprecates what Triton does
        results(ops, "norm_relu_conv_backward")


def test_a_mistake_in_the_launcher_is_no_reason_to_fall_back():
    x, norm = Operands.random((2, (6, 8), 8), torch.float32)
    with pytest.raises(AttributeError):
        ops.norm_relu_mean(x, norm.scale, torch.zeros(2, 8))


@pytest.fixture
def small(monkeypatch):
    """Few and small images, or the interpreter would take minutes."""
    shapes = (check.Shape(16, 8, 1), check.Shape(8, 4, 3), check.Shape(16, 8, 1, 2))
    monkeypatch.setattr(check, "_SIDE", 6)
    monkeypatch.setattr(check, "_REPEATS", 1)
    monkeypatch.setattr(check.faults, "__defaults__", (60, shapes))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_the_check_finds_the_kernels_right(kind):
    assert check.faults(ops, torch.device("cpu"), kind) == []


@pytest.mark.usefixtures("small")
def test_the_check_as_a_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check", "cpu", "float32"])
    check.main()
    ready, verdict = capsys.readouterr().out.splitlines()
    assert ready == check.READY and json.loads(verdict) == {"faults": []}

    def too_large(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(check, "faults", too_large)
    check.main()
    assert "too little free memory" in json.loads(capsys.readouterr().out.splitlines()[-1])["undecided"]
