"""What is particular to the native kernels: instruction sets, threads, what is no number, and their absence."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from operands import Operands, double, measured, place, slice_of_channels, weight_for
from torch.nn import functional as F

import efficient_densenet
from efficient_densenet import densenet_cifar
from efficient_densenet.ops import cpu, eager, reference
from efficient_densenet.ops.cpu import library

kernels = pytest.mark.skipif(library.load().kernels is None, reason="the native kernels are not built")
LARGE = (5, (33, 31), 37)  # enough for several threads


def everything(x, norm, weight, pool=1):
    """The results of all operations."""
    out = torch.empty((len(x), *(n // pool for n in x.shape[1:-1]), len(weight)), dtype=x.dtype)
    found, grad_x, through = place(out), torch.ones_like(x), norm.mean.new_zeros(2, len(norm.mean))
    cpu.norm_relu_conv(x, norm, weight, out, pool, found)
    sums = cpu.norm_relu_conv_backward(out, x, norm, weight, grad_x, True, through, pool)
    finished = torch.empty_like(x)
    cpu.finish(grad_x, x, norm.mean, through, norm.mean.new_full((), x[..., 0].numel()), finished)
    pooled = torch.empty((len(x), *((n + 1) // 2 for n in x.shape[1:-1]), x.shape[-1]), dtype=x.dtype)
    cpu.norm_relu_max_pool(x, norm, pooled)
    grad_pooled = torch.empty_like(x)
    of_pool = cpu.norm_relu_max_pool_backward(pooled, x, norm, grad_pooled, through)
    return [out, *found, grad_x, *sums, through, finished, *measured(cpu, x), pooled, grad_pooled, *of_pool]


@kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("instructions", [0, 1, 2])
def test_every_instruction_set_computes_the_same(dtype, pool, kernel, instructions, monkeypatch):
    operands = Operands.random(LARGE, dtype, 3)
    weight = weight_for(operands.x, 8, kernel)
    best = everything(*operands, weight, pool)
    path = next(library.Path(library.__file__).parent.glob("_kernels*.so"))
    other = library.open_library(path, instructions)
    monkeypatch.setattr(cpu, "load", lambda: other)
    if f"{library.INSTRUCTIONS[instructions]}, on" not in other.description:
        pytest.skip("this processor has less")
    try:
        found = everything(*operands, weight, pool)
    finally:
        library.open_library(path)  # the instructions are a setting of the library itself
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(found, best, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@kernels
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("made", [1, 12, 40, 128])
@pytest.mark.parametrize(("size", "channels"), [((41, 37), 130), ((7, 7), 67), ((5, 90), 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolutions_of_many_units_of_work(size, channels, made, kernel, memory_format, dtype):
    """More lines than one unit has, channels and outputs that are no whole vectors: against the exact reference."""
    x, norm = Operands.random((3, size, channels), dtype, 5)
    weight = torch.randn(made, channels, kernel, kernel).to(dtype).contiguous(memory_format=memory_format)
    grad_out = slice_of_channels(torch.randn(3, *size, made).to(dtype), 3)
    out = slice_of_channels(torch.full((3, *size, made), torch.nan, dtype=dtype), 2)
    grad_x = torch.randn(x.shape).to(dtype)
    exact = [t.double() for t in (weight, grad_out, x, grad_x)]
    found = place(out)
    cpu.norm_relu_conv(x, norm, weight, out, into=found)
    sums = cpu.norm_relu_conv_backward(grad_out, x, norm, weight, grad_x, True, None)
    assert sums[0].stride() == weight.stride()

    weight, grad_out, x, expected_grad_x = exact
    expected_out = torch.empty(out.shape, dtype=torch.float64)
    expected, norm = place(expected_out), double(norm)
    reference.norm_relu_conv(x, norm, weight, expected_out, into=expected)
    expected_sums = reference.norm_relu_conv_backward(grad_out, x, norm, weight, expected_grad_x, True, None)
    actual = [out, *found, grad_x, *sums]
    for a, e in zip(actual, [expected_out, *expected, expected_grad_x, *expected_sums], strict=True):
        assert (a - e).abs().max() <= {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * e.abs().max()


@kernels
def test_threads_change_rounding_alone_and_repeat(threads=(1, 2, 3)):
    operands = Operands.random(LARGE, torch.float32, 3)
    weight = weight_for(operands.x, 8, 3)
    before = torch.get_num_threads()
    try:
        results = []
        for n in threads:
            torch.set_num_threads(n)
            results.append(everything(*operands, weight))
            assert all(torch.equal(a, b) for a, b in zip(everything(*operands, weight), results[-1], strict=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["x", "weight", "gradient"])
def test_what_is_no_number_is_passed_on(dtype, value, where):
    """As plain PyTorch passes it on, in exactly the same places."""
    x, norm = Operands.random((2, (5, 5), 13), dtype)
    weight, grad_out = weight_for(x, 4, 3), torch.randn(2, 5, 5, 4).to(dtype)
    {"x": x[1, 2, 4], "weight": weight[1, :, 0, 2], "gradient": grad_out[1, 2, 3]}[where][2] = value
    results = []
    for ops in (cpu, eager):
        out, grad_x, found = torch.empty_like(grad_out), torch.empty_like(x), place(grad_out)
        ops.norm_relu_conv(x, norm, weight, out, into=found)
        sums = ops.norm_relu_conv_backward(grad_out, x, norm, weight, grad_x, False, None)
        results.append([out, *found, grad_x, *sums, *measured(ops, x)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        assert torch.equal(a.isnan(), b.isnan())


@kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_passes_through_the_max_pool(value):
    x, norm = Operands.random((2, (6, 5), 13), torch.float32)
    x[1, 2, 4, 2] = value
    grad_out, results = torch.randn(2, 3, 3, 13), []
    for ops in (cpu, eager):
        out, grad_x = torch.empty_like(grad_out), torch.empty_like(x)
        ops.norm_relu_max_pool(x, norm, out)
        results.append([out, grad_x, *ops.norm_relu_max_pool_backward(grad_out, x, norm, grad_x, None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


@kernels
@pytest.mark.parametrize("value", [0.1, -0.1, 3.0, 65280.0, 1e-40, -0.0])
def test_bfloat16_is_rounded_as_pytorch_rounds_it(value):
    x = (torch.full((1, 1, 40, 1), value) * torch.linspace(0.5, 2, 40).view(-1, 1)).to(torch.bfloat16)
    norm = reference.Affine(*torch.tensor([[0], [1], [1.37], [0]]))
    found = cpu._prologue(x, norm, 1, torch.empty_like(x))
    assert torch.equal(found, F.relu(x.float() * 1.37).to(torch.bfloat16))


@kernels
def test_one_row_and_no_row():
    x, norm = Operands.random((1, (1, 1), 13))
    everything(x, norm, weight_for(x, 4, 3))
    variance = measured(cpu, x).variance
    assert torch.equal(variance, torch.zeros_like(variance))
    none = x[:0]
    weight, grad_x, grad_out = weight_for(x, 4, 3), torch.empty_like(none), x.new_empty(0, 1, 1, 4)
    found = cpu.norm_relu_conv_backward(grad_out, none, norm, weight, grad_x, False, None)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in found)


def test_without_kernels_plain_pytorch_runs_and_says_so_once():
    code = """
import warnings
from efficient_densenet.ops.cpu import library
library.__file__ = "/nowhere/library.py"
import torch
from efficient_densenet import backends, densenet_cifar
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    network = densenet_cifar(10, 4, efficient=True)
    for _ in range(2):
        network(torch.randn(2, 3, 32, 32)).sum().backward()
print([str(w.message) for w in caught if "native CPU kernels" in str(w.message)])
print(backends()["cpu"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    warned, told = result.stdout.splitlines()
    assert warned.count("install a C++ compiler") == 1
    assert "not built" in told


@pytest.mark.skipif(sys.platform == "win32" or not any(map(shutil.which, ("c++", "g++"))), reason="no C++ compiler")
def test_kernels_are_built_where_there_is_a_compiler():
    """For the installation goes on without them, and the other tests here would only be skipped."""
    assert library.load().kernels is not None, library.load().description


@kernels
def test_backends_tell_what_is_in_use():
    assert "_kernels" in efficient_densenet.backends()["cpu"]
    assert "on PyTorch's threads" in library.load().description


@kernels
def test_networks_run_on_the_kernels(monkeypatch):
    calls = []
    monkeypatch.setattr(
        cpu, "norm_relu_conv", lambda *a, run=cpu.norm_relu_conv, **k: (calls.append(1), run(*a, **k))[1]
    )
    densenet_cifar(10, 4, efficient=True)(torch.randn(2, 3, 32, 32))
    assert len(calls) == 2 * 3 + 2  # layers and transitions
