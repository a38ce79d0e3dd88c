"""The Triton kernels against the reference, in Triton's interpreter: run by `test_ops_triton` in a process of its own.

The interpreter has to be on before a kernel is defined, and it knows CPU tensors alone. It computes what the kernels
say, one program after another; it proves indices, masks and formulas, and nothing about speed or compilation.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from operands import (
    EVERY_OPERATION,
    SHAPES,
    Operands,
    double,
    empty_statistics,
    measured,
    slice_of_channels,
    weight_for,
)
from triton_interpreter import correct_bfloat16, without_repetition

from efficient_densenet import DenseNet
from efficient_densenet.ops import eager, reference
from efficient_densenet.ops import triton as ops
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_ops_triton.py, with TRITON_INTERPRET=1", allow_module_level=True)

from efficient_densenet.ops.triton import forward, launch, tiles, tuning

without_repetition()

# Relative to the largest value, as for the other backends.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def nothing_else_runs(monkeypatch):
    """What plain PyTorch would compute instead proves nothing."""
    for name in EVERY_OPERATION:
        monkeypatch.setattr(eager, name, None)
    monkeypatch.setattr(ops, "_state", {"warned": set(), "failed": set()})
    correct_bfloat16(monkeypatch.setattr)


def assert_close(actual, expected, dtype):
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e.double()).abs().max() <= TOLERANCE[dtype] * max(e.abs().max().item(), 1)


def poisoned(shape, dtype, spare=3):
    return slice_of_channels(torch.full(shape, torch.nan, dtype=dtype), spare)


def untouched(x):
    """The channels around the slice are still NaN."""
    whole = x._base
    assert whole is not None and whole[..., :3].isnan().all() and whole[..., -3:].isnan().all()


def check_conv(shape, dtype, outputs, kernel, pool=1, accumulate=False, weight=None):
    operands = Operands.random(shape, dtype, 3)
    (x, norm), (x64, norm64) = operands, operands.double()
    weight = weight_for(x, outputs, kernel) if weight is None else weight
    weight64 = weight.double().contiguous()
    size = (shape[0], *(n // pool for n in shape[1]), outputs)
    grad_out, out = slice_of_channels(torch.randn(size).to(dtype), 3), poisoned(size, dtype)
    out64 = torch.empty(size, dtype=torch.float64)
    found, expected = empty_statistics(out), empty_statistics(out64)
    ops.norm_relu_conv(x, norm, weight, out, pool, found)
    reference.norm_relu_conv(x64, norm64, weight64, out64, pool, expected)
    assert_close([out, *found], [out64, *expected], dtype)
    untouched(out)
    before = out.clone()
    ops.norm_relu_conv(x, norm, weight, out, pool)
    assert torch.equal(out, before)

    before = torch.randn(x.shape).to(dtype)
    grad_x = slice_of_channels(before, 3) if accumulate else poisoned(x.shape, dtype)
    grad_x64, through = before.double(), slice_of_channels(torch.randn(2, shape[2]), 3)
    through64 = through.double()
    found = ops.norm_relu_conv_backward(BackwardOperands(grad_out, x, norm, weight, grad_x, accumulate, through, pool))
    expected = reference.norm_relu_conv_backward(
        BackwardOperands(grad_out.double(), x64, norm64, weight64, grad_x64, accumulate, through64, pool)
    )
    assert_close([grad_x, *found, through], [grad_x64, *expected, through64], dtype)
    untouched(grad_x)
    untouched(through)
    assert found[0].stride() == weight.stride() and found[0].dtype == dtype


ODD = [(torch.float32, shape) for shape in SHAPES] + [(half, SHAPES[i]) for half in list(TOLERANCE)[1:] for i in (0, 6)]


@pytest.mark.parametrize(("dtype", "shape"), ODD, ids=str)
@pytest.mark.parametrize(("kernel", "pool"), [(1, 1), (3, 1), (1, 2)])
def test_norm_relu_conv(shape, kernel, pool, dtype):
    if pool > min(shape[1]):
        pytest.skip("no whole window")
    check_conv(shape, dtype, 5, kernel, pool)


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "pool"),
    [(72, 48, 1, 1), (24, 12, 3, 1), (48, 24, 3, 1), (130, 200, 1, 1), (66, 33, 1, 2), (33, 40, 3, 1)],
)
def test_several_tiles_in_every_direction(channels, outputs, kernel, pool):
    """More rows, channels and outputs than a tile has, and more steps than one."""
    check_conv((2, (7, 9), channels), torch.float32, outputs, kernel, pool, accumulate=True)


def test_pool_that_leaves_pixels_over():
    check_conv((2, (7, 8), 5), torch.float32, 3, 1, 3)
    check_conv((2, (7, 8), 5), torch.float32, 3, 1, 3, accumulate=True)


def test_kernels_of_other_odd_sizes():
    check_conv((2, (6, 7), 5), torch.float32, 3, 5)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_windows_of_a_single_pixel_in_a_direction(memory):
    """Its stride there says nothing about where the taps lie: here, that of a window that was turned round."""
    weight = torch.randn(3, 5, 1, 3).contiguous(memory_format=memory)
    check_conv((2, (6, 7), 5), torch.float32, 3, (1, 3), weight=weight)
    turned = weight.transpose(2, 3)
    assert turned.stride(-1) != turned.stride(-2)
    check_conv((2, (6, 7), 5), torch.float32, 3, (3, 1), weight=turned)


@every_dtype
@pytest.mark.parametrize("kernel", [1, 3])
def test_tiles_of_hopper(kernel, dtype, monkeypatch):
    """And its kernel of a 1×1 window, whose few programs go over many rows."""
    monkeypatch.setattr(tiles, "device_of", lambda device: tiles.DEVICES[9, 0]._replace(programs=3))
    monkeypatch.setattr(forward, "_MUST_WAIT", False)  # the interpreter has no instructions to insert
    check_conv((2, (9, 11), 70), dtype, 17, kernel, accumulate=kernel == 1)


@every_dtype
@pytest.mark.parametrize("size", [(5, 7), (8, 6), (1, 9), (1, 1), (9,), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("channels", [1, 13])
def test_norm_relu_max_pool(size, channels, dtype):
    x, norm = Operands.random((3, size, channels), dtype, 3)
    halved = (3, *((n + 1) // 2 for n in size), channels)
    out, expected = poisoned(halved, dtype), torch.empty(halved, dtype=dtype)
    ops.norm_relu_max_pool(x, norm, out)
    reference.norm_relu_max_pool(x, norm, expected)
    assert_close([out], [expected], dtype)
    untouched(out)
    grad_out = slice_of_channels(torch.randn(halved).to(dtype), 3)
    grad_x, expected_grad_x = poisoned(x.shape, dtype), torch.empty(x.shape, dtype=dtype)
    through, expected_through = torch.ones(2, 2, channels)
    sums = ops.norm_relu_max_pool_backward(grad_out, x, norm, grad_x, through)
    expected = reference.norm_relu_max_pool_backward(grad_out, x, norm, expected_grad_x, expected_through)
    assert_close([grad_x, *sums, through], [expected_grad_x, *expected, expected_through], dtype)
    untouched(grad_x)


@pytest.mark.parametrize(("dtype", "shape"), [*ODD, (torch.float32, (2, (9, 11), 70))], ids=str)
def test_norm_relu_mean(shape, dtype):
    operands = Operands.random(shape, dtype, 3)
    (x, norm), (x64, norm64) = operands, operands.double()
    size = (shape[0], shape[2])
    out, out64 = torch.full(size, torch.nan, dtype=dtype), torch.empty(size, dtype=torch.float64)
    ops.norm_relu_mean(x, norm, out)
    reference.norm_relu_mean(x64, norm64, out64)
    assert_close([out], [out64], dtype)
    grad_out, grad_x, grad_x64 = torch.randn(size).to(dtype), poisoned(x.shape, dtype), torch.empty_like(x64)
    through, through64 = torch.ones(2, shape[2]), torch.ones(2, shape[2], dtype=torch.float64)
    sums = ops.norm_relu_mean_backward(grad_out, x, norm, grad_x, through)
    expected = reference.norm_relu_mean_backward(grad_out.double(), x64, norm64, grad_x64, through64)
    assert_close([grad_x, *sums, through], [grad_x64, *expected, through64], dtype)
    untouched(grad_x)


@pytest.mark.parametrize("parameters", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", [5, 1030])
def test_fold_norm(channels, parameters):
    _, norm = Operands.random((1, (1, 1), channels), torch.float32)
    statistics = Statistics(norm.mean.to(parameters), norm.inverse.to(parameters))
    norm_weight, bias = norm.scale.to(parameters), norm.shift.to(parameters)
    into, expected = (Affine(*torch.full((4, channels), torch.nan, dtype=t)) for t in (torch.float32, torch.float64))
    ops.fold_norm(statistics, norm_weight, bias, 1e-5, into)
    reference.fold_norm(statistics, norm_weight, bias, 1e-5, expected)
    assert_close(into[1:], expected[1:], torch.float32)


def test_fold_norm_of_vectors_in_other_layouts():
    into, expected = (Affine(*torch.zeros(4, 6)) for _ in range(2))
    (norm_weight, _), bias = torch.rand(6, 2).unbind(1), torch.rand(1).expand(6)
    statistics = Statistics(*torch.rand(6, 2).T)
    ops.fold_norm(statistics, norm_weight, bias, 1e-5, into)
    reference.fold_norm(statistics, norm_weight, bias, 1e-5, expected)
    assert_close(into, expected, torch.float32)


@every_dtype
@pytest.mark.parametrize("shape", [*SHAPES, (2, (9, 11), 70)], ids=str)
def test_statistics_and_finish(shape, dtype):
    operands = Operands.random(shape, dtype, 3)
    (x, norm), (x64, norm64) = operands, operands.double()
    assert_close(measured(ops, x), measured(reference, x64), dtype)
    grad, out = slice_of_channels(torch.randn(x.shape).to(dtype), 3), poisoned(x.shape, dtype)
    expected = torch.empty_like(x64)
    through, count = slice_of_channels(torch.randn(2, shape[2]), 3), torch.tensor(3.0)
    reference.finish(grad.double(), x64, norm64.mean, through.double(), count.double(), expected)
    ops.finish(grad, x, norm.mean, through, count, out)
    assert_close([out], [expected], dtype)
    ops.finish(grad, x, norm.mean, through, count, grad)  # in place
    assert torch.equal(grad, out)


def test_statistics_do_not_cancel():
    """In single precision, with a mean ten thousand times the deviation."""
    torch.manual_seed(0)
    x = slice_of_channels(torch.randn(5, 17, 19, 7) + 1e4, 3)
    expected, out, through_conv = measured(reference, x.double()), torch.empty(x.shape), empty_statistics(x)
    ones, zeros = torch.ones(7), torch.zeros(7)
    norm = Affine(zeros, ones, ones, zeros)
    ops.norm_relu_conv(x, norm, torch.eye(7).view(7, 7, 1, 1), out, into=through_conv)
    for mean, variance in (measured(ops, x), through_conv):
        torch.testing.assert_close(mean.double(), expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(variance.double(), expected[1], rtol=1e-3, atol=0)


def test_sums_do_not_cancel():
    torch.manual_seed(0)
    x = slice_of_channels(torch.randn(5, 17, 19, 7) + 1e4, 3)
    mean = measured(reference, x.double()).mean.float()
    norm, weight = Affine(mean, torch.ones(7), torch.ones(7), 8 - mean), torch.ones(1, 7, 1, 1)
    grad_out = torch.randn(5, 17, 19, 1) + 1
    _, centred, _ = ops.norm_relu_conv_backward(
        BackwardOperands(grad_out, x, norm, weight, torch.empty_like(x), False, None)
    )
    exact = [t.double() for t in (grad_out, x)]
    _, expected, _ = reference.norm_relu_conv_backward(
        BackwardOperands(*exact, double(norm), weight.double(), torch.empty_like(exact[1]), False, None)
    )
    torch.testing.assert_close(centred.double(), expected, rtol=1e-3, atol=0.1)


def test_layouts_that_are_no_matrix():
    """A gradient in NCHW memory, and weights in channels-last memory."""
    x, norm = Operands.random((2, (5, 7), 13), torch.float32)
    weight, grad_out = weight_for(x, 6, 3), torch.randn(2, 5, 7, 6)
    results = []
    for g, w in (
        (grad_out, weight),
        (grad_out.movedim(-1, 1).contiguous().movedim(1, -1), weight.contiguous(memory_format=torch.channels_last)),
    ):
        grad_x = torch.empty_like(x)
        results.append([grad_x, *ops.norm_relu_conv_backward(BackwardOperands(g, x, norm, w, grad_x, False, None))])
    assert results[1][1].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weight_gradient_left_out():
    x, norm = Operands.random((2, (5, 7), 13), torch.float32)
    arguments = torch.randn(2, 5, 7, 6), x, norm, weight_for(x, 6, 3)
    alone, both = torch.empty_like(x), torch.empty_like(x)
    nothing, *sums = ops.norm_relu_conv_backward(BackwardOperands(*arguments, alone, False, None, need_weight=False))
    _, *others = ops.norm_relu_conv_backward(BackwardOperands(*arguments, both, False, None))
    assert nothing is None and torch.equal(alone, both)
    assert all(torch.equal(a, b) for a, b in zip(sums, others, strict=True))


@pytest.mark.parametrize(("programs", "steps"), [(1, 8), (4, 8), (64, 2)])
def test_weight_gradients_of_few_and_many_parts(programs, steps, monkeypatch):
    grad_weight = tiles.grad_weight
    monkeypatch.setattr(tiles, "device_of", lambda device: tiles.OTHER._replace(programs=programs))
    monkeypatch.setattr(tiles, "grad_weight", lambda of: replace(grad_weight(of), minimum_steps=steps))
    check_conv((4, (9, 11), 13), torch.float32, 5, 3)


def test_infinity_of_half_precision_stays_inside():
    """A shift that half precision cannot hold, though the sum can: nothing outside the image may be made of it."""
    torch.manual_seed(0)
    x = (300 + torch.randint(4, (3, 5, 7, 4)) / 4).half()
    scale = torch.full((4,), -400.0)
    norm = Affine(torch.full((4,), 300.0), torch.ones(4), scale, -301 * scale)
    weight, grad_out = weight_for(x, 3, 3), torch.randn(3, 5, 7, 3).half()
    out, grad_x, found = torch.empty(3, 5, 7, 3).half(), torch.empty_like(x), empty_statistics(x, 3)
    ops.norm_relu_conv(x, norm, weight, out, into=found)
    found = [
        out,
        *found,
        grad_x,
        *ops.norm_relu_conv_backward(BackwardOperands(grad_out, x, norm, weight, grad_x, False, None)),
    ]
    assert all(t.isfinite().all() for t in found)


def test_tuning_leaves_results_alone(monkeypatch):
    """Every attempt runs, also of what adds to the gradient; the best is remembered, also while a graph is captured."""
    tried, capturing = [], False

    def milliseconds(attempt, tile, device):
        with launch.operation(device):
            attempt(tile)
        tried.append(tile)
        return -tile.rows

    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(tuning, "_found", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(
        tuning, "_around", lambda tile: [tile, replace(tile, rows=32), replace(tile, rows=16, depth=16)]
    )
    check_conv((2, (5, 7), 13), torch.float32, 5, 3, accumulate=True)
    assert len(tried) == 11  # the second forward pass knows
    assert [tile.minimum_steps for tile in tried[-5:]] == [8, 8, 8, 4, 2]  # of a weight's gradient
    capturing = True
    check_conv((2, (5, 7), 13), torch.float32, 5, 3, accumulate=True)
    check_conv((2, (5, 7), 13), torch.float32, 6, 1)
    assert len(tried) == 11 and [tile.rows for tile in tuning._found.values()] == [128, 128, 64]


def test_not_a_number_is_passed_on():
    x, norm = Operands.random((2, (5, 7), 13), torch.float32)
    x[0, 2, 3, 4] = torch.nan
    out, expected = torch.empty(2, 5, 7, 3), torch.empty(2, 5, 7, 3)
    weight = weight_for(x, 3, 3)
    ops.norm_relu_conv(x, norm, weight, out)
    reference.norm_relu_conv(x, norm, weight, expected)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any()


@pytest.mark.parametrize("keep", ["bottleneck", "inputs"])
def test_a_training_step_of_a_network(keep, monkeypatch):
    """Every call that the engine makes, with the views that it makes them on, against the ordinary network."""
    monkeypatch.setattr(ops, "supports", lambda x: True)
    torch.manual_seed(0)
    options = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 6, "bn_size": 2, "num_classes": 5}
    ordinary = DenseNet(input_size=64, **options)
    efficient = DenseNet(input_size=64, **options, efficient=True, keep=keep)
    efficient.load_state_dict(ordinary.state_dict())
    images, results = torch.randn(2, 3, 17, 19), []
    for network in (ordinary, efficient):
        x = images.clone().requires_grad_()
        out = network(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in network.parameters()), *network.buffers()])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(a.abs().max().item(), 1)
