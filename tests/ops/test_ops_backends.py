"""Every backend computes what the reference defines, whatever the shape, type and layout."""

from __future__ import annotations

import pytest
import torch
from operands import (
    DTYPES,
    LEVELS,
    SHAPES,
    Operands,
    double,
    empty_statistics,
    measured,
    slice_of_channels,
    weight_for,
)

from efficient_densenet.ops import cpu, eager, layout, reference
from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.cpu.instructions import Instructions
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics

# Relative to the largest value: sums in another order; half precision is rounded once per value and accumulation.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_spare = pytest.mark.parametrize("spare", [0, 3], ids=["whole", "slice"])
SIZES_OF_PIECE = {"one piece": False, "one image a piece": True}
every_size_of_piece = pytest.mark.parametrize("pieces", SIZES_OF_PIECE.values(), ids=[*SIZES_OF_PIECE])

BACKENDS = {"eager": None, **{f"cpu-{level.option}": level for level in LEVELS}}
# Above AVX-512, a level has kernels of its own for bfloat16 alone; for other types it has those of AVX-512.
BACKENDS_AND_DTYPES = {
    f"{name}-{str(dtype).removeprefix('torch.')}": (level, dtype)
    for name, level in BACKENDS.items()
    for dtype in DTYPES
    if level is None or level <= Instructions.AVX512 or dtype == torch.bfloat16
}
every_backend_and_dtype = pytest.mark.parametrize(
    ("ops", "dtype"), BACKENDS_AND_DTYPES.values(), ids=[*BACKENDS_AND_DTYPES], indirect=["ops"]
)
# Without a convolution, native kernels take all images at once.
PASSES = {
    f"{name}-{size}": (level, dtype, pieces)
    for name, (level, dtype) in BACKENDS_AND_DTYPES.items()
    for size, pieces in SIZES_OF_PIECE.items()
    if level is None or not pieces
}
every_backend_of_passes = pytest.mark.parametrize(
    ("ops", "dtype", "pieces"), PASSES.values(), ids=[*PASSES], indirect=["ops"]
)


@pytest.fixture(params=BACKENDS.values(), ids=[*BACKENDS])
def ops(request):
    """Plain PyTorch, and the native kernels at every level that this processor has."""
    if request.param is None:
        yield eager
        return
    with library.held_to(request.param, ours=True):
        yield cpu


@pytest.fixture
def scratch(pieces, monkeypatch):
    if pieces:
        monkeypatch.setitem(layout.SCRATCH, "cpu", 1)


def assert_close(actual, expected, dtype):
    """Within the tolerance of `dtype`, of a result in float64."""
    for a, e in zip(actual, expected, strict=True):
        difference = (a.double() - e).abs().max().item()
        assert difference <= TOLERANCE[dtype] * max(e.abs().max().item(), 1)


def pooled(shape, pool):
    if pool > min(shape[1]):
        pytest.skip("no whole window")
    return shape[0], *(n // pool for n in shape[1])


def poisoned(shape, dtype, spare):
    """NaN where an operation must write."""
    return slice_of_channels(torch.full(shape, torch.nan, dtype=dtype), spare)


@pytest.mark.usefixtures("scratch")
@every_shape
@every_backend_and_dtype
@every_spare
@every_size_of_piece
@pytest.mark.parametrize(("kernel", "pool"), [(1, 1), (3, 1), (1, 2), (1, 3)])
def test_norm_relu_conv(ops, shape, dtype, spare, kernel, pool):
    operands = Operands.random(shape, dtype, spare)
    (x, norm), (x64, norm64) = operands, operands.double()
    weight = weight_for(x, 5, kernel)
    size = (*pooled(shape, pool), 5)
    grad_out = slice_of_channels(torch.randn(size).to(dtype), spare)

    out, out64 = poisoned(size, dtype, spare), torch.empty(size, dtype=torch.float64)
    found, expected = empty_statistics(out), empty_statistics(out64)
    ops.norm_relu_conv(x, norm, weight, out, pool, found)
    reference.norm_relu_conv(x64, norm64, weight.double(), out64, pool, expected)
    assert_close([out, *found], [out64, *expected], dtype)
    before = out.clone()
    ops.norm_relu_conv(x, norm, weight, out, pool)
    assert torch.equal(out, before)

    grad_x, grad_x64 = poisoned(x.shape, dtype, spare), torch.empty_like(x64)
    through = torch.randn(2, shape[2] + 2, dtype=norm.mean.dtype)[:, 1:-1]
    through64 = through.double()
    sums = ops.norm_relu_conv_backward(BackwardOperands(grad_out, x, norm, weight, grad_x, False, through, pool))
    expected = reference.norm_relu_conv_backward(
        BackwardOperands(grad_out.double(), x64, norm64, weight.double(), grad_x64, False, through64, pool)
    )
    assert_close([grad_x, *sums, through], [grad_x64, *expected, through64], dtype)
    assert [t.dtype for t in sums] == [dtype, norm.scale.dtype, norm.scale.dtype]


@pytest.mark.usefixtures("scratch")
@every_backend_and_dtype
@every_spare
@every_size_of_piece
def test_gradients_accumulate_and_weights_are_left_out(ops, dtype, spare):
    x, norm = Operands.random((3, (5, 7), 13), dtype, spare)
    weight, grad_out = weight_for(x, 5, 3), torch.randn(3, 5, 7, 5).to(dtype)
    alone, before = torch.empty_like(x), torch.randn(x.shape).to(dtype)
    whole = ops.norm_relu_conv_backward(BackwardOperands(grad_out, x, norm, weight, alone, False, None))
    grad_x = slice_of_channels(before, spare)
    nothing, *sums = ops.norm_relu_conv_backward(
        BackwardOperands(grad_out, x, norm, weight, grad_x, True, None, need_weight=False)
    )
    assert nothing is None
    assert_close([grad_x, *sums], [before.double() + alone.double(), *(t.double() for t in whole[1:])], dtype)


@pytest.mark.usefixtures("scratch")
@every_backend_of_passes
@every_spare
@pytest.mark.parametrize("size", [(5, 7), (8, 6), (1, 9), (1, 1), (9,), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("channels", [1, 13])
def test_norm_relu_max_pool(ops, size, channels, dtype, spare):
    """Against the reference in the same type, for rounding makes ties, and a tie's gradient goes to the first pixel."""
    x, norm = Operands.random((3, size, channels), dtype, spare)
    halved = (3, *((n + 1) // 2 for n in size), channels)
    out, expected = (poisoned(halved, dtype, spare) for _ in range(2))
    ops.norm_relu_max_pool(x, norm, out)
    reference.norm_relu_max_pool(x, norm, expected)
    assert_close([out], [expected.double()], dtype)

    grad_out = slice_of_channels(torch.randn(halved).to(dtype), spare)
    grad_x, expected_grad_x = (poisoned(x.shape, dtype, spare) for _ in range(2))
    through, expected_through = norm.mean.new_zeros(2, 2, channels)
    sums = ops.norm_relu_max_pool_backward(grad_out, x, norm, grad_x, through)
    expected = reference.norm_relu_max_pool_backward(grad_out, x, norm, expected_grad_x, expected_through)
    expected = [t.double() for t in (expected_grad_x, *expected, expected_through)]
    assert_close([grad_x, *sums, through], expected, dtype)


@pytest.mark.usefixtures("scratch")
@every_shape
@every_backend_of_passes
@every_spare
def test_norm_relu_mean(ops, shape, dtype, spare):
    operands = Operands.random(shape, dtype, spare)
    (x, norm), (x64, norm64) = operands, operands.double()
    size = (shape[0], shape[2])
    out, out64 = torch.full(size, torch.nan, dtype=dtype), torch.empty(size, dtype=torch.float64)
    ops.norm_relu_mean(x, norm, out)
    reference.norm_relu_mean(x64, norm64, out64)
    assert_close([out], [out64], dtype)

    grad_out, grad_x, grad_x64 = torch.randn(size).to(dtype), poisoned(x.shape, dtype, spare), torch.empty_like(x64)
    through, through64 = torch.ones(2, shape[2], dtype=norm.mean.dtype), torch.ones(2, shape[2], dtype=torch.float64)
    sums = ops.norm_relu_mean_backward(grad_out, x, norm, grad_x, through)
    expected = reference.norm_relu_mean_backward(grad_out.double(), x64, norm64, grad_x64, through64)
    assert_close([grad_x, *sums, through], [grad_x64, *expected, through64], dtype)


@every_backend_and_dtype
@pytest.mark.parametrize("parameters", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fold_norm(ops, dtype, parameters):
    _, norm = Operands.random((1, (1, 1), 37), dtype)
    statistics = Statistics(norm.mean.to(parameters), norm.inverse.to(parameters))
    norm_weight, bias = norm.scale.to(parameters), norm.shift.to(parameters)
    into, expected = (Affine(*torch.full((4, 37), torch.nan, dtype=t)) for t in (norm.mean.dtype, torch.float64))
    ops.fold_norm(statistics, norm_weight, bias, 1e-5, into)
    reference.fold_norm(statistics, norm_weight, bias, 1e-5, expected)
    small = torch.float64 if norm.mean.dtype == torch.float64 else torch.float32
    assert_close(into[1:], expected[1:], small)


@pytest.mark.usefixtures("scratch")
@every_shape
@every_backend_of_passes
@every_spare
def test_statistics_and_finish(ops, shape, dtype, spare):
    operands = Operands.random(shape, dtype, spare)
    (x, norm), (x64, norm64) = operands, operands.double()
    assert_close(measured(ops, x), measured(reference, x64), dtype)

    grad = slice_of_channels(torch.randn(x.shape).to(dtype), spare)
    expected, elsewhere = torch.empty_like(x64), poisoned(x.shape, dtype, spare)
    through, count = torch.randn(2, shape[2] + 2, dtype=norm.mean.dtype)[:, 1:-1], norm.mean.new_full((), 3)
    reference.finish(grad.double(), x64, norm64.mean, through.double(), count.double(), expected)
    ops.finish(grad, x, norm.mean, through, count, elsewhere)
    assert_close([elsewhere], [expected], dtype)
    ops.finish(grad, x, norm.mean, through, count, grad)  # in place
    assert torch.equal(grad, elsewhere)


@pytest.mark.usefixtures("scratch")
@every_size_of_piece
@every_spare
def test_statistics_do_not_cancel(ops, spare):
    """In single precision, with a mean ten thousand times the deviation: E[x²] − E[x]² would have no digit left."""
    torch.manual_seed(0)
    x = slice_of_channels(torch.randn(5, 17, 19, 7) + 1e4, spare)
    expected = measured(reference, x.double())
    weight = torch.eye(7).view(7, 7, 1, 1)
    out, through_conv = torch.empty(x.shape), empty_statistics(x)
    ops.norm_relu_conv(x, plain(7), weight, out, into=through_conv)
    for mean, variance in (measured(ops, x), through_conv):
        torch.testing.assert_close(mean.double(), expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(variance.double(), expected[1], rtol=1e-3, atol=0)


def plain(channels, mean=None):
    """A norm that changes nothing; or one that shifts this mean to 8."""
    if mean is None:
        return Affine(*torch.tensor([0.0, 1, 1, 0]).repeat(channels, 1).T.contiguous())
    return Affine(mean, torch.ones(channels), torch.ones(channels), 8 - mean)


@pytest.mark.usefixtures("scratch")
@every_size_of_piece
def test_sums_do_not_cancel(ops):
    """``Σ g·(x − μ)`` where ``Σ g·x − μ·Σ g`` would lose everything: the mean is large, and so is the sum of g."""
    torch.manual_seed(0)
    x = slice_of_channels(torch.randn(5, 17, 19, 7) + 1e4, 3)
    norm, weight = plain(7, measured(reference, x.double()).mean.float()), torch.ones(1, 7, 1, 1)
    grad_out = torch.randn(5, 17, 19, 1) + 1
    _, centred, _ = ops.norm_relu_conv_backward(
        BackwardOperands(grad_out, x, norm, weight, torch.empty_like(x), False, None)
    )
    exact = [t.double() for t in (grad_out, x)]
    _, expected, _ = reference.norm_relu_conv_backward(
        BackwardOperands(*exact, double(norm), weight.double(), torch.empty_like(exact[1]), False, None)
    )
    torch.testing.assert_close(centred.double(), expected, rtol=1e-3, atol=0.1)


@pytest.mark.usefixtures("scratch")
@every_backend_and_dtype
@every_size_of_piece
def test_results_repeat_bit_for_bit(ops, dtype):
    x, norm = Operands.random((4, (9, 11), 13), dtype, 3)
    weight, grad_out = weight_for(x, 5, 3), torch.randn(4, 9, 11, 5).to(dtype)

    def run():
        out, grad_x, found = torch.empty_like(grad_out), torch.empty_like(x), empty_statistics(grad_out)
        ops.norm_relu_conv(x, norm, weight, out, into=found)
        sums = ops.norm_relu_conv_backward(BackwardOperands(grad_out, x, norm, weight, grad_x, False, None))
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


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_fold_norm_of_vectors_in_other_layouts(ops, layout):
    """Parametrizations and functional calls make such weights."""
    into, expected = (Affine(*torch.zeros(4, 6).double()) for _ in range(2))
    norm_weight, bias = (
        torch.rand(6, 2).double().unbind(1) if layout == "strided" else torch.rand(2, 1).double().expand(2, 6)
    )
    statistics = Statistics(*torch.rand(6, 2).double().T)
    ops.fold_norm(statistics, norm_weight, bias, 1e-5, into)
    reference.fold_norm(statistics, norm_weight, bias, 1e-5, expected)
    assert_close(into, expected, torch.float64)


def test_no_images(ops):
    """An empty batch in evaluation is empty all the way, as it is in PyTorch."""
    x, norm = Operands.random((0, (5, 7), 13))
    ops.norm_relu_conv(x, norm, weight_for(x, 4, 3), x.new_empty((0, 5, 7, 4)))
    ops.norm_relu_mean(x, norm, x.new_empty((0, 13)))
    pooled = x.new_empty((0, 3, 4, 13))
    for images in (x, x.movedim(-1, 1).contiguous().movedim(1, -1)):  # empty ones are contiguous in any order
        ops.norm_relu_max_pool(images, norm, pooled)
        for found in (
            ops.norm_relu_mean_backward(x.new_empty((0, 13)), images, norm, torch.empty_like(x), None),
            ops.norm_relu_max_pool_backward(pooled, images, norm, torch.empty_like(x), None),
        ):
            assert all(torch.equal(t, torch.zeros(13).double()) for t in found)
