"""Every backend computes what the reference defines, whatever the shape, type and layout."""

from __future__ import annotations

import pytest
import torch
from operands import DTYPES, SHAPES, Operands, slice_of_channels, weight_for

from efficient_densenet.ops import convolution, cpu, eager, reference

# Relative to the largest value: sums in another order; half precision is rounded once per value and accumulation.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_spare = pytest.mark.parametrize("spare", [0, 3], ids=["whole", "slice"])
every_size_of_piece = pytest.mark.parametrize("pieces", [False, True], ids=["one piece", "one image a piece"])


@pytest.fixture(params=[eager, cpu], ids=["eager", "cpu"])
def ops(request):
    if request.param is cpu and cpu.library.load().kernels is None:
        pytest.skip("the native kernels are not built")
    return request.param


@pytest.fixture
def scratch(pieces, monkeypatch):
    if pieces:
        monkeypatch.setitem(convolution.SCRATCH, "cpu", 1)


def assert_close(actual, expected, dtype):
    """Within the tolerance of `dtype`, of a result in float64."""
    for a, e in zip(actual, expected, strict=True):
        difference = (a.double() - e).abs().max().item()
        assert difference <= TOLERANCE[dtype] * max(e.abs().max().item(), 1)


def pooled(shape, pool):
    if pool > min(shape[1]):
        pytest.skip("no whole window")
    return shape[0], *(n // pool for n in shape[1])


def blank(shape, dtype, spare):
    """Room that must be overwritten."""
    return slice_of_channels(torch.full(shape, torch.nan, dtype=dtype), spare)


@pytest.mark.usefixtures("scratch")
@every_shape
@every_dtype
@every_spare
@every_size_of_piece
@pytest.mark.parametrize(("kernel", "pool"), [(1, 1), (3, 1), (1, 2), (1, 3)])
def test_norm_relu_conv(ops, shape, dtype, spare, kernel, pool):
    operands = Operands.random(shape, dtype, spare)
    x, scale, shift, mean = operands
    weight = weight_for(x, 5, kernel)
    size = (*pooled(shape, pool), 5)
    grad_out = slice_of_channels(torch.randn(size).to(dtype), spare)

    out, out64 = blank(size, dtype, spare), torch.empty(size, dtype=torch.float64)
    found = ops.norm_relu_conv(x, scale, shift, weight, out, pool, want_statistics=True)
    x64, scale64, shift64, mean64 = operands.double()
    expected = reference.norm_relu_conv(x64, scale64, shift64, weight.double(), out64, pool, want_statistics=True)
    assert_close([out, *found], [out64, *expected], dtype)
    assert all(s.dtype == scale.dtype for s in found)
    assert ops.norm_relu_conv(x, scale, shift, weight, out, pool) is None

    grad_x, grad_x64 = blank(x.shape, dtype, spare), torch.empty_like(x64)
    sums = ops.norm_relu_conv_backward(grad_out, x, scale, shift, mean, weight, grad_x, False, pool)
    expected = reference.norm_relu_conv_backward(
        grad_out.double(), x64, scale64, shift64, mean64, weight.double(), grad_x64, False, pool
    )
    assert_close([grad_x, *sums], [grad_x64, *expected], dtype)
    assert [t.dtype for t in sums] == [dtype, scale.dtype, scale.dtype]


@pytest.mark.usefixtures("scratch")
@every_dtype
@every_spare
@every_size_of_piece
def test_gradients_accumulate_and_weights_are_left_out(ops, dtype, spare):
    x, scale, shift, mean = Operands.random((3, (5, 7), 13), dtype, spare)
    weight, grad_out = weight_for(x, 5, 3), torch.randn(3, 5, 7, 5).to(dtype)
    alone, before = torch.empty_like(x), torch.randn(x.shape).to(dtype)
    whole = ops.norm_relu_conv_backward(grad_out, x, scale, shift, mean, weight, alone, False)
    grad_x = slice_of_channels(before, spare)
    nothing, *sums = ops.norm_relu_conv_backward(
        grad_out, x, scale, shift, mean, weight, grad_x, True, need_weight=False
    )
    assert nothing is None
    assert_close([grad_x, *sums], [before.double() + alone.double(), *(t.double() for t in whole[1:])], dtype)


@pytest.mark.usefixtures("scratch")
@every_dtype
@every_spare
@every_size_of_piece
@pytest.mark.parametrize("size", [(5, 7), (8, 6), (1, 9), (1, 1), (9,), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("channels", [1, 13])
def test_norm_relu_max_pool(ops, size, channels, dtype, spare):
    """Against the reference in the same type, for rounding makes ties, and a tie's gradient goes to the first pixel."""
    x, scale, shift, mean = Operands.random((3, size, channels), dtype, spare)
    halved = (3, *((n + 1) // 2 for n in size), channels)
    out, expected = (blank(halved, dtype, spare) for _ in range(2))
    ops.norm_relu_max_pool(x, scale, shift, out)
    reference.norm_relu_max_pool(x, scale, shift, expected)
    assert_close([out], [expected.double()], dtype)

    grad_out = slice_of_channels(torch.randn(halved).to(dtype), spare)
    grad_x, expected_grad_x = (blank(x.shape, dtype, spare) for _ in range(2))
    sums = ops.norm_relu_max_pool_backward(grad_out, x, scale, shift, mean, grad_x)
    expected = reference.norm_relu_max_pool_backward(grad_out, x, scale, shift, mean, expected_grad_x)
    assert_close([grad_x, *sums], [t.double() for t in (expected_grad_x, *expected)], dtype)


@pytest.mark.usefixtures("scratch")
@every_shape
@every_dtype
@every_spare
@every_size_of_piece
def test_statistics_and_finish(ops, shape, dtype, spare):
    operands = Operands.random(shape, dtype, spare)
    x, constant, slope, mean = operands
    x64, constant64, slope64, mean64 = operands.double()
    assert_close(ops.statistics(x), reference.statistics(x64), dtype)

    grad = slice_of_channels(torch.randn(x.shape).to(dtype), spare)
    expected, elsewhere = torch.empty_like(x64), blank(x.shape, dtype, spare)
    reference.finish(grad.double(), x64, mean64, constant64, slope64, expected)
    ops.finish(grad, x, mean, constant, slope, elsewhere)
    assert_close([elsewhere], [expected], dtype)
    ops.finish(grad, x, mean, constant, slope, grad)  # in place
    assert torch.equal(grad, elsewhere)


@pytest.mark.usefixtures("scratch")
@every_size_of_piece
@every_spare
def test_statistics_do_not_cancel(ops, spare):
    """In single precision, with a mean ten thousand times the deviation: E[x²] − E[x]² would have no digit left."""
    torch.manual_seed(0)
    x = slice_of_channels(torch.randn(5, 17, 19, 7) + 1e4, spare)
    expected = reference.statistics(x.double())
    weight = torch.eye(7).view(7, 7, 1, 1)
    out = torch.empty(x.shape)
    through_conv = ops.norm_relu_conv(x, torch.ones(7), torch.zeros(7), weight, out, want_statistics=True)
    for mean, variance in (ops.statistics(x), through_conv):
        torch.testing.assert_close(mean.double(), expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(variance.double(), expected[1], rtol=1e-3, atol=0)


@pytest.mark.usefixtures("scratch")
@every_size_of_piece
def test_sums_do_not_cancel(ops):
    """``Σ g·(x − μ)`` where ``Σ g·x − μ·Σ g`` would lose everything: the mean is large, and so is the sum of g."""
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


@pytest.mark.usefixtures("scratch")
@every_dtype
@every_size_of_piece
def test_results_repeat_bit_for_bit(ops, dtype):
    x, scale, shift, mean = Operands.random((4, (9, 11), 13), dtype, 3)
    weight, grad_out = weight_for(x, 5, 3), torch.randn(4, 9, 11, 5).to(dtype)

    def run():
        out, grad_x = torch.empty_like(grad_out), torch.empty_like(x)
        found = ops.norm_relu_conv(x, scale, shift, weight, out, want_statistics=True)
        sums = ops.norm_relu_conv_backward(grad_out, x, scale, shift, mean, weight, grad_x, False)
        return [out, grad_x, *found, *sums]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("channels", [1, 3, 8, 12, 16, 48])
@pytest.mark.parametrize("pixels", [1, 5, 16, 35, 48])
def test_column_sums_of_wide_rows_are_those_of_the_channels(channels, pixels):
    """Also where the pixels do not divide into wide rows."""
    x = torch.randn(1, pixels, channels, dtype=torch.float64)
    rows = eager._wide_rows(x)
    assert rows.shape[1] % channels == 0
    torch.testing.assert_close(rows.sum(0).view(-1, channels).sum(0), x.sum((0, 1)))


def test_no_images(ops):
    """An empty batch in evaluation is empty all the way, as it is in PyTorch."""
    x, scale, shift, _ = Operands.random((0, (5, 7), 13))
    out = x.new_empty((0, 5, 7, 4))
    assert ops.norm_relu_conv(x, scale, shift, weight_for(x, 4, 3), out) is None
