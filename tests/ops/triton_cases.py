"""The Triton kernels against the reference, in Triton's interpreter: run by `test_ops_triton` in a process of its own.

The interpreter has to be on before a kernel is defined, and it knows CPU tensors alone. It computes what the kernels
say, one program after another; it proves indices, masks and formulas, and nothing about speed or compilation.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from operands import SHAPES, Operands, slice_of_channels, weight_for

from efficient_densenet import DenseNet
from efficient_densenet.ops import eager, reference
from efficient_densenet.ops import triton as ops

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_ops_triton.py, with TRITON_INTERPRET=1", allow_module_level=True)

from efficient_densenet.ops.triton import tiles

# Relative to the largest value, as for the other backends.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def nothing_else_runs(monkeypatch):
    """What plain PyTorch would compute instead proves nothing.

    Two things that every device does and the interpreter does not: it takes the bits of bfloat16 for numbers in a
    product, and cuts them off instead of rounding to the nearest.
    """
    for name in ("norm_relu_conv", "norm_relu_conv_backward", "norm_relu_max_pool", "statistics", "finish"):
        monkeypatch.setattr(eager, name, None)
    monkeypatch.setattr(ops, "_state", {})
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, *rest):
        single = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, *single, *rest)

    def cast_impl(self, source, to):
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            bits = torch.tensor(source.data).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, source, to)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)


def assert_close(actual, expected, dtype):
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e.double()).abs().max() <= TOLERANCE[dtype] * max(e.abs().max().item(), 1)


def poisoned(shape, dtype, spare=3):
    return slice_of_channels(torch.full(shape, torch.nan, dtype=dtype), spare)


def untouched(x):
    """The channels around the slice are still NaN."""
    whole = x._base
    assert whole is not None and whole[..., :3].isnan().all() and whole[..., -3:].isnan().all()


def check_conv(shape, dtype, outputs, kernel, pool=1, accumulate=False):
    operands = Operands.random(shape, dtype, 3)
    x, scale, shift, mean = operands
    weight = weight_for(x, outputs, kernel)
    size = (shape[0], *(n // pool for n in shape[1]), outputs)
    grad_out, out = slice_of_channels(torch.randn(size).to(dtype), 3), poisoned(size, dtype)
    x64, scale64, shift64, mean64 = operands.double()
    out64 = torch.empty(size, dtype=torch.float64)
    found = ops.norm_relu_conv(x, scale, shift, weight, out, pool, want_statistics=True)
    expected = reference.norm_relu_conv(x64, scale64, shift64, weight.double(), out64, pool, want_statistics=True)
    assert_close([out, *found], [out64, *expected], dtype)
    untouched(out)
    assert ops.norm_relu_conv(x, scale, shift, weight, out, pool) is None

    before = torch.randn(x.shape).to(dtype)
    grad_x = slice_of_channels(before, 3) if accumulate else poisoned(x.shape, dtype)
    grad_x64 = before.double()
    arguments = (scale, shift, mean, weight, grad_x, accumulate, pool)
    found = ops.norm_relu_conv_backward(grad_out, x, *arguments)
    expected = reference.norm_relu_conv_backward(
        grad_out.double(), x64, scale64, shift64, mean64, weight.double(), grad_x64, accumulate, pool
    )
    assert_close([grad_x, *found], [grad_x64, *expected], dtype)
    untouched(grad_x)
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
    check_conv((3, (9, 11), channels), torch.float32, outputs, kernel, pool, accumulate=True)


def test_pool_that_leaves_pixels_over():
    check_conv((2, (7, 8), 5), torch.float32, 3, 1, 3)
    check_conv((2, (7, 8), 5), torch.float32, 3, 1, 3, accumulate=True)


def test_kernels_of_other_odd_sizes():
    check_conv((2, (6, 7), 5), torch.float32, 3, 5)


@every_dtype
@pytest.mark.parametrize("size", [(5, 7), (8, 6), (1, 9), (1, 1), (9,), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("channels", [1, 13])
def test_norm_relu_max_pool(size, channels, dtype):
    x, scale, shift, mean = Operands.random((3, size, channels), dtype, 3)
    halved = (3, *((n + 1) // 2 for n in size), channels)
    out, expected = poisoned(halved, dtype), torch.empty(halved, dtype=dtype)
    ops.norm_relu_max_pool(x, scale, shift, out)
    reference.norm_relu_max_pool(x, scale, shift, expected)
    assert_close([out], [expected], dtype)
    untouched(out)
    grad_out = slice_of_channels(torch.randn(halved).to(dtype), 3)
    grad_x, expected_grad_x = poisoned(x.shape, dtype), torch.empty(x.shape, dtype=dtype)
    sums = ops.norm_relu_max_pool_backward(grad_out, x, scale, shift, mean, grad_x)
    expected = reference.norm_relu_max_pool_backward(grad_out, x, scale, shift, mean, expected_grad_x)
    assert_close([grad_x, *sums], [expected_grad_x, *expected], dtype)
    untouched(grad_x)


@every_dtype
@pytest.mark.parametrize("shape", [*SHAPES, (7, (20, 31), 70)], ids=str)
def test_statistics_and_finish(shape, dtype):
    operands = Operands.random(shape, dtype, 3)
    x, constant, slope, mean = operands
    x64, constant64, slope64, mean64 = operands.double()
    assert_close(ops.statistics(x), reference.statistics(x64), dtype)
    grad, out = slice_of_channels(torch.randn(x.shape).to(dtype), 3), poisoned(x.shape, dtype)
    expected = torch.empty_like(x64)
    reference.finish(grad.double(), x64, mean64, constant64, slope64, expected)
    ops.finish(grad, x, mean, constant, slope, out)
    assert_close([out], [expected], dtype)
    ops.finish(grad, x, mean, constant, slope, grad)  # in place
    assert torch.equal(grad, out)


def test_statistics_do_not_cancel():
    """In single precision, with a mean ten thousand times the deviation."""
    torch.manual_seed(0)
    x = slice_of_channels(torch.randn(5, 17, 19, 7) + 1e4, 3)
    expected, out = reference.statistics(x.double()), torch.empty(x.shape)
    weight = torch.eye(7).view(7, 7, 1, 1)
    through = ops.norm_relu_conv(x, torch.ones(7), torch.zeros(7), weight, out, want_statistics=True)
    for mean, variance in (ops.statistics(x), through):
        torch.testing.assert_close(mean.double(), expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(variance.double(), expected[1], rtol=1e-3, atol=0)


def test_sums_do_not_cancel():
    torch.manual_seed(0)
    x = slice_of_channels(torch.randn(5, 17, 19, 7) + 1e4, 3)
    mean = reference.statistics(x.double())[0].float()
    arguments = x, torch.ones(7), -mean + 8, mean, torch.ones(1, 7, 1, 1)
    grad_out = torch.randn(5, 17, 19, 1) + 1
    *_, centred = ops.norm_relu_conv_backward(grad_out, *arguments, torch.empty_like(x), False)
    *_, expected = reference.norm_relu_conv_backward(
        grad_out.double(), *(t.double() for t in arguments), torch.empty_like(x).double(), False
    )
    torch.testing.assert_close(centred.double(), expected, rtol=1e-3, atol=0.1)


def test_layouts_that_are_no_matrix():
    """A gradient in NCHW memory, and weights in channels-last memory."""
    x, scale, shift, mean = Operands.random((2, (5, 7), 13), torch.float32)
    weight, grad_out = weight_for(x, 6, 3), torch.randn(2, 5, 7, 6)
    results = []
    for g, w in (
        (grad_out, weight),
        (grad_out.movedim(-1, 1).contiguous().movedim(1, -1), weight.contiguous(memory_format=torch.channels_last)),
    ):
        grad_x = torch.empty_like(x)
        results.append([grad_x, *ops.norm_relu_conv_backward(g, x, scale, shift, mean, w, grad_x, False)])
    assert results[1][1].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weight_gradient_left_out():
    x, scale, shift, mean = Operands.random((2, (5, 7), 13), torch.float32)
    arguments = torch.randn(2, 5, 7, 6), x, scale, shift, mean, weight_for(x, 6, 3)
    alone, both = torch.empty_like(x), torch.empty_like(x)
    nothing, *sums = ops.norm_relu_conv_backward(*arguments, alone, False, need_weight=False)
    _, *others = ops.norm_relu_conv_backward(*arguments, both, False)
    assert nothing is None and torch.equal(alone, both)
    assert all(torch.equal(a, b) for a, b in zip(sums, others, strict=True))


@pytest.mark.parametrize("programs", [1, 7])
def test_weight_gradients_of_few_and_many_parts(programs, monkeypatch):
    monkeypatch.setattr(tiles, "_PROGRAMS", programs)
    check_conv((9, (9, 11), 13), torch.float32, 5, 3)


def test_infinity_of_half_precision_stays_inside():
    """A shift that half precision cannot hold, though the sum can: nothing outside the image may be made of it."""
    torch.manual_seed(0)
    x = (300 + torch.randint(4, (3, 5, 7, 4)) / 4).half()
    scale, mean = torch.full((4,), -400.0), torch.full((4,), 300.0)
    arguments = x, scale, -400 * -301 * torch.ones(4)
    weight, grad_out = weight_for(x, 3, 3), torch.randn(3, 5, 7, 3).half()
    out, grad_x = torch.empty(3, 5, 7, 3).half(), torch.empty_like(x)
    found = ops.norm_relu_conv(*arguments, weight, out, want_statistics=True)
    found = [out, *found, grad_x, *ops.norm_relu_conv_backward(grad_out, *arguments, mean, weight, grad_x, False)]
    assert all(t.isfinite().all() for t in found)


def test_tuning_leaves_results_alone(monkeypatch):
    """Every attempt runs, also of what adds to the gradient; the best is remembered, also while a graph is captured."""
    tried, capturing = [], False

    def milliseconds(attempt, tile):
        attempt(tile)
        tried.append(tile)
        return -tile.rows

    monkeypatch.setattr(tiles, "AUTOTUNE", True)
    monkeypatch.setattr(tiles, "_found", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(tiles, "_milliseconds", milliseconds)
    monkeypatch.setattr(tiles, "_around", lambda tile: [tile, replace(tile, rows=32), replace(tile, rows=16, depth=16)])
    check_conv((2, (5, 7), 13), torch.float32, 5, 3, accumulate=True)
    assert len(tried) == 9  # the second forward pass knows
    capturing = True
    check_conv((2, (5, 7), 13), torch.float32, 5, 3, accumulate=True)
    check_conv((2, (5, 7), 13), torch.float32, 6, 1)
    assert len(tried) == 9 and [tile.rows for tile in tiles._found.values()] == [128, 128, 64]


def test_not_a_number_is_passed_on():
    x, scale, shift, _ = Operands.random((2, (5, 7), 13), torch.float32)
    x[0, 2, 3, 4] = torch.nan
    out, expected = torch.empty(2, 5, 7, 3), torch.empty(2, 5, 7, 3)
    weight = weight_for(x, 3, 3)
    ops.norm_relu_conv(x, scale, shift, weight, out)
    reference.norm_relu_conv(x, scale, shift, weight, expected)
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
    images, results = torch.randn(2, 3, 33, 35), []
    for network in (ordinary, efficient):
        x = images.clone().requires_grad_()
        out = network(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in network.parameters()), *network.buffers()])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(a.abs().max().item(), 1)
