"""What is particular to the native kernels: instruction sets, threads, non-finite values, and their absence."""

from __future__ import annotations

import platform
import shutil
import sys
from itertools import product

import pytest
import torch
from operands import CONVOLVING, LEVELS, Operands, double, empty_statistics, measured, slice_of_channels, weight_for
from torch.nn import functional as F

import efficient_densenet
from efficient_densenet import UserError, densenet_cifar
from efficient_densenet.ops import cpu, eager, reference
from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.cpu import stem as cpu_stem
from efficient_densenet.ops.cpu.instructions import Instructions, convolutions
from efficient_densenet.ops.layers import Reader
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics

kernels = pytest.mark.skipif(library.load().kernels is None, reason="the native kernels are not built")
LARGE = (5, (33, 31), 37)  # enough for several threads


def everything(x, norm, weight, pool=1):
    """The results of all operations."""
    out = torch.empty((len(x), *(n // pool for n in x.shape[1:-1]), len(weight)), dtype=x.dtype)
    found, grad_x, through = empty_statistics(out), torch.ones_like(x), norm.mean.new_zeros(2, len(norm.mean))
    cpu.norm_relu_conv(x, norm, weight, out, pool, found)
    sums = cpu.norm_relu_conv_backward(BackwardOperands(out, x, norm, weight, grad_x, True, through, pool))
    finished = torch.empty_like(x)
    cpu.finish(grad_x, x, norm.mean, through, norm.mean.new_full((), x[..., 0].numel()), finished)
    pooled = torch.empty((len(x), *((n + 1) // 2 for n in x.shape[1:-1]), x.shape[-1]), dtype=x.dtype)
    cpu.norm_relu_max_pool(x, norm, pooled)
    grad_pooled = torch.empty_like(x)
    of_pool = cpu.norm_relu_max_pool_backward(pooled, x, norm, grad_pooled, through)
    mean, grad_mean = x.new_empty(len(x), x.shape[-1]), torch.empty_like(x)
    cpu.norm_relu_mean(x, norm, mean)
    of_mean = cpu.norm_relu_mean_backward(mean, x, norm, grad_mean, through)
    found = [*found, grad_x, *sums, through, finished, *measured(cpu, x)]
    return [out, *found, pooled, grad_pooled, *of_pool, mean, grad_mean, *of_mean]


every_level = pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.option)


@kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@every_level
def test_every_level_computes_the_same(dtype, pool, kernel, level):
    operands = Operands.random(LARGE, dtype, 3)
    weight = weight_for(operands.x, 8, kernel)
    best = everything(*operands, weight, pool)
    with library.held_to(level, ours=True) as loaded:
        assert loaded.instructions == level and f" {level.option}," in loaded.description
        found = everything(*operands, weight, pool)
    assert library.load().instructions == max(LEVELS)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(found, best, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("amx", [False, True], ids=["", "PyTorch uses AMX"])
@pytest.mark.parametrize("level", Instructions, ids=lambda level: level.option)
def test_the_rule_leaves_to_pytorch_what_it_does_faster(level, amx):
    dtypes, pytorch = (torch.float64, torch.float32, torch.bfloat16), Instructions.AMX if amx else level
    ours = {dtype for dtype in dtypes if convolutions(level, dtype, pytorch).ours}
    everything, nothing = {torch.float32, torch.bfloat16}, set()
    beside_amx = {torch.float32} if amx and level < Instructions.AMX else everything
    assert ours == (nothing if level == Instructions.BASELINE else beside_amx)


@kernels
@pytest.mark.parametrize("held", ["", "avx512_bf16"])
@pytest.mark.parametrize("compiled", [Instructions.AVX512_BF16, Instructions.AMX], ids=lambda level: level.option)
@pytest.mark.parametrize("onednn", ["", "DEFAULT", "AVX512_CORE_AMX_FP16", "AVX512_CORE_BF16"])
def test_with_amx_pytorch_convolves_bfloat16_where_our_kernels_do_not_use_it(onednn, compiled, held, monkeypatch):
    monkeypatch.setenv("EFFICIENT_DENSENET_INSTRUCTIONS", held)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", onednn)
    monkeypatch.setattr(library, "instructions_of", lambda _: (Instructions.AMX, compiled))
    monkeypatch.setattr(library, "_loaded", None)
    ours = onednn == "AVX512_CORE_BF16" or (compiled == Instructions.AMX and not held)
    assert library.load().convolves == {torch.float32} | ({torch.bfloat16} if ours else set())
    whose = "ours" if ours else "PyTorch's: PyTorch's use the tile registers of AMX"
    assert f"convolutions in bfloat16 are {whose}" in cpu.describe()


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rule_decides_who_convolves(dtype, monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "convolve", lambda *a, run=cpu.convolve: (calls.append(1), run(*a))[1])
    operands = Operands.random(LARGE, dtype)
    for ours in (None, True, False):
        calls.clear()
        with library.held_to(library.load().instructions, ours) as loaded:
            everything(*operands, weight_for(operands.x, 8, 1))
            assert bool(calls) == (dtype not in loaded.convolves)


@pytest.mark.parametrize(
    ("name", "said"), [("avx2", ""), ("AVX2", ""), ("baseline", ""), ("fast", "no instruction level")]
)
def test_a_level_can_be_forced_by_the_environment(name, said, monkeypatch):
    monkeypatch.setenv("EFFICIENT_DENSENET_INSTRUCTIONS", name)
    monkeypatch.setattr(library, "_loaded", None)
    if said:
        with pytest.raises(UserError, match=f"{said}.*avx512_bf16"):
            efficient_densenet.backends()
    elif LEVELS:
        level = "baseline" if name == "baseline" else min(Instructions.AVX2, max(LEVELS)).option
        assert f" {level}," in efficient_densenet.backends()["cpu"]


@kernels
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("made", [1, 12, 16, 40, 128])
@pytest.mark.parametrize(("size", "channels"), [((21, 37), 130), ((7, 7), 67), ((5, 90), 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", CONVOLVING, ids=lambda level: level.option)
def test_convolutions_of_many_units_of_work(size, channels, made, kernel, memory_format, dtype, level):
    """More lines than one unit has, channels and outputs that are no whole vectors: against the exact reference."""
    with library.held_to(level, ours=True):
        _many_units(size, channels, made, kernel, memory_format, dtype)


def _many_units(size, channels, made, kernel, memory_format, dtype):
    x, norm = Operands.random((3, size, channels), dtype, 5)
    weight = torch.randn(made, channels, kernel, kernel).to(dtype).contiguous(memory_format=memory_format)
    grad_out = slice_of_channels(torch.randn(3, *size, made).to(dtype), 3)
    out = slice_of_channels(torch.full((3, *size, made), torch.nan, dtype=dtype), 2)
    grad_x = torch.randn(x.shape).to(dtype)
    exact = [t.double() for t in (weight, grad_out, x, grad_x)]
    found = empty_statistics(out)
    cpu.norm_relu_conv(x, norm, weight, out, into=found)
    sums = cpu.norm_relu_conv_backward(BackwardOperands(grad_out, x, norm, weight, grad_x, True, None))
    assert sums[0].stride() == weight.stride()

    weight, grad_out, x, expected_grad_x = exact
    expected_out = torch.empty(out.shape, dtype=torch.float64)
    expected, norm = empty_statistics(expected_out), double(norm)
    reference.norm_relu_conv(x, norm, weight, expected_out, into=expected)
    expected_sums = reference.norm_relu_conv_backward(
        BackwardOperands(grad_out, x, norm, weight, expected_grad_x, True, None)
    )
    actual = [out, *found, grad_x, *sums]
    for a, e in zip(actual, [expected_out, *expected, expected_grad_x, *expected_sums], strict=True):
        assert (a - e).abs().max() <= {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * e.abs().max()


STEMS = [  # images, channels, outputs, window, stride, padding, size
    *((2, 3, 64, (7, 7), (2, 2), (3, 3), (65, 50)), (2, 4, 20, (5, 5), (1, 1), (2, 2), (19, 23))),
    *((1, 3, 33, (3, 3), (2, 2), (0, 0), (31, 33)), (3, 2, 7, (3, 5), (2, 1), (1, 0), (9, 40))),
    *((5, 1, 16, (3, 3), (1, 1), (1, 1), (1, 1)), (2, 3, 5, (3, 3), (2, 2), (1, 1), (2, 5))),
]


@kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("layout", ["contiguous", "rows of pixels", "turned"])
@pytest.mark.parametrize("stem", STEMS, ids=str)
@pytest.mark.parametrize("level", CONVOLVING, ids=lambda level: level.option)
def test_stems_in_one_call(level, stem, layout, threads):
    """More lines than are pooled at a time, and threads that share an image: against PyTorch in double precision."""
    n, channels, made, window, stride, padding, size = stem
    torch.manual_seed(0)
    x, weight = torch.randn(n, channels, *size), torch.randn(made, channels, *window)
    if layout == "rows of pixels":
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    elif layout == "turned":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    norm, mean, variance = [torch.rand(2, made), torch.randn(made), torch.rand(made) + 0.5]
    norm[0] -= 0.3
    s = torch.conv2d(x.double(), weight.double(), None, stride, padding)
    of_conv = s.shape[2:]
    s = torch.batch_norm(s, *norm.double(), mean.double(), variance.double(), False, 0, 1e-5, False).relu()
    expected = torch.max_pool2d(s, 3, 2, 1).movedim(1, -1)
    out = slice_of_channels(torch.full(expected.shape, torch.nan), 2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with library.held_to(level, ours=True):
            reader = Reader(weight, *norm, Statistics(mean, variance), 1e-5, 0)
            assert cpu_stem.evaluate(x, reader, stride, padding, of_conv, out)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * expected.max().item())


@kernels
def test_a_stem_whose_weight_is_not_finite_is_left_to_pytorch():
    x, weight, ones = torch.randn(1, 3, 9, 9), torch.randn(4, 3, 7, 7), torch.ones(4)
    weight[2, 1, 3, 3] = torch.inf
    reader, out = Reader(weight, ones, ones, Statistics(ones, ones), 1e-5, 0), torch.empty(1, 3, 3, 4)
    assert not cpu_stem.evaluate(x, reader, (2, 2), (3, 3), (5, 5), out)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("wrong", [None, 0, 69], ids=["finite", "first output infinite", "last output infinite"])
@every_level
def test_threads_share_the_outputs_where_there_are_few_rows(level, dtype, kernel, channels_last, wrong):
    x, norm = Operands.random((2, (7, 5), 37), dtype)
    weight, out = weight_for(x, 70, kernel), torch.empty(2, 7, 5, 70, dtype=dtype)  # the last vector is not full
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    if wrong is not None:
        weight[wrong] = torch.inf
    expected = torch.empty(out.shape, dtype=torch.float64)
    reference.norm_relu_conv(x.double(), double(norm), weight.double(), expected)
    before = torch.get_num_threads()
    try:
        with library.held_to(level, ours=True):
            for n in (1, 2, 3, 8):
                torch.set_num_threads(n)
                cpu.norm_relu_conv(x, norm, weight, out)
                assert torch.equal(out.isfinite(), expected.isfinite())
                tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
                good = expected.isfinite()
                assert (out - expected)[good].abs().max() <= tolerance * expected[good].abs().max()
    finally:
        torch.set_num_threads(before)


@kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["x", "weight", "gradient"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("ours", [True, False], ids=["kernels of ours", "PyTorch's"])
@every_level
def test_non_finite_values_are_passed_on(level, ours, kernel, dtype, value, where):
    """To where they are in float64, and from kernels of ours to nowhere else.

    PyTorch's convolution may spread them: by products with the padding, as on ARM, and in bfloat16 with the tiles of
    AMX to neighbouring columns. Kernels of ours with a window of 3 leave it weights that are not finite, and Winograd's
    all that is not.
    """
    x, norm = Operands.random((2, (5, 5), 13), dtype)
    weight, grad_out = weight_for(x, 4, kernel), torch.randn(2, 5, 5, 4).to(dtype)
    {"x": x[1, 2, 4], "weight": weight[1, :, 0, kernel - 1], "gradient": grad_out[1, 2, 3]}[where][2] = value
    with library.held_to(level, ours) as loaded:
        found = _both_passes(cpu, x, norm, weight, grad_out)
        left = kernel == 3 and (where == "weight" or level < Instructions.AVX512_BF16)
        exact = dtype in loaded.convolves and not (left and _spreads(dtype))
    expected = _in_float64(x.double(), double(norm), weight.double(), grad_out.double())
    for name, e in expected.items():
        assert not found[name].isfinite()[~e.isfinite()].any(), name
        if exact and (kernel == 1 or name != "gradient of weight"):
            assert torch.equal(found[name].isfinite(), e.isfinite()), name


def _both_passes(ops, x, norm, weight, grad_out):
    out, grad_x = torch.empty_like(grad_out), torch.empty_like(x)
    ops.norm_relu_conv(x, norm, weight, out)
    gradients = ops.norm_relu_conv_backward(BackwardOperands(grad_out, x, norm, weight, grad_x, False, None))
    return _named(out, grad_x, *gradients, *measured(ops, x))


def _named(*results):
    names = ("output", "gradient of x", "gradient of weight", "of the norm's weight", "of its bias", "mean", "variance")
    return dict(zip(names, results, strict=True))


def _in_float64(x, norm, weight, grad_out):
    """The same, tap by tap, without the products of a weight and the padding's zeros, which would be NaN."""
    normed, weight = (x * norm.scale + norm.shift).requires_grad_(), weight.requires_grad_()
    s, out, (height, width) = F.relu(normed), torch.zeros_like(grad_out), x.shape[1:3]
    for i, j in product(range(weight.shape[2]), range(weight.shape[3])):
        y, x_ = i - weight.shape[2] // 2, j - weight.shape[3] // 2
        lines, pixels = slice(max(0, -y), height - max(0, y)), slice(max(0, -x_), width - max(0, x_))
        moved = s[:, max(0, y) : height + min(0, y), max(0, x_) : width + min(0, x_)]
        part = torch.zeros_like(out)
        part[:, lines, pixels] = moved @ weight[:, :, i, j].T
        out = out + part
    g, grad_weight = torch.autograd.grad(out, [normed, weight], grad_out)
    rows = (0, 1, 2)
    sums = norm.inverse * (g * (x - norm.mean)).sum(rows), g.sum(rows)
    return _named(out, norm.scale * g, grad_weight, *sums, *measured(reference, x))


def _spreads(dtype):
    """Whether PyTorch's convolution in this type may do so: on ARM, or by the tiles of AMX."""
    return platform.machine() in ("aarch64", "arm64") or (dtype == torch.bfloat16 and Instructions.AMX in LEVELS)


@kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_pass_through_the_max_pool(value):
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
    norm = Affine(*torch.tensor([[0], [1], [1.37], [0]]))
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
    found = cpu.norm_relu_conv_backward(BackwardOperands(grad_out, none, norm, weight, grad_x, False, None))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in found)


def test_without_kernels_plain_pytorch_runs_and_says_so_once(monkeypatch):
    monkeypatch.setattr(library, "__file__", "/nowhere/library.py")
    monkeypatch.setattr(library, "_loaded", None)
    with pytest.warns(UserWarning, match="install a C\\+\\+ compiler") as caught:
        network = densenet_cifar(10, 4, efficient=True)
        for _ in range(2):
            network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(caught) == 1
    assert "not built" in efficient_densenet.backends()["cpu"]


@pytest.mark.skipif(sys.platform == "win32" or not any(map(shutil.which, ("c++", "g++"))), reason="no C++ compiler")
def test_kernels_are_built_where_there_is_a_compiler():
    """For the installation goes on without them, and the other tests here would only be skipped."""
    assert library.load().kernels is not None, library.load().description


@kernels
def test_backends_tell_what_is_in_use():
    printed = str(efficient_densenet.backends()).splitlines()
    assert printed[0].startswith("cpu: _kernels") and any("convolutions in bfloat16 are" in line for line in printed)
    assert "_kernels" in efficient_densenet.backends()["cpu"]
    assert "on PyTorch's threads" in library.load().description


@kernels
def test_networks_run_on_the_kernels(monkeypatch):
    calls = []
    monkeypatch.setattr(
        cpu, "norm_relu_conv", lambda *a, run=cpu.norm_relu_conv, **k: (calls.append(1), run(*a, **k))[1]
    )
    layers = []
    monkeypatch.setattr(cpu, "run_layers", lambda *a, run=cpu.run_layers: (layers.append(run(*a)), layers[-1])[1])
    densenet_cifar(10, 4, efficient=True)(torch.randn(2, 3, 32, 32))
    one_by_one = 0 if library.load().convolves else 2 * 3
    assert len(calls) == one_by_one + 2  # transitions
    assert sum(layers) == 2 * 3 - one_by_one


@kernels
def test_a_library_of_other_sources_is_refused(monkeypatch):
    """Its table of functions is another one, and to call what stands there would end the process."""
    path = library.load().path
    monkeypatch.setattr(library, "_STRUCTURES", library._STRUCTURES[1:])
    with pytest.raises(OSError, match="built from other sources; install the package again"):
        library.open_library(path)
