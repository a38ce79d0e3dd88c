"""The Triton kernels on a GPU, each operation by itself.

For `compute-sanitizer --tool memcheck` and `--tool racecheck` these are enough:
python -m pytest -m gpu -k "reference or max_pool or head" tests/ops/test_ops_triton_gpu.py
"""

from __future__ import annotations

import pytest
import torch
from on_gpu import close, gpu
from operands import Operands, double, empty_statistics, measured, slice_of_channels, weight_for

from efficient_densenet.ops import reference
from efficient_densenet.ops import triton as kernels
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics
from efficient_densenet.ops.triton import check

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("unchecked")

# Relative to the largest value; TF32 keeps ten bits of each factor.
TOLERANCE = {"ieee": 1e-5, "tf32": 5e-3, "bfloat16": 2e-2, "float16": 3e-3}


def cuda(operands):
    return Operands(operands.x.cuda(), Affine(*(t.cuda() for t in operands.norm)))


def poisoned(shape, dtype):
    whole = torch.full((*shape[:-1], shape[-1] + 6), torch.nan, dtype=dtype, device="cuda")
    return whole[..., 3:-3]


SIZES = [
    ((3, (5, 7), 13), 5, 3, 1),
    ((1, (5, 7), 16), 5, 1, 1),
    ((2, (9,), 7), 5, 3, 1),
    ((2, (3, 4, 5), 11), 5, 3, 1),
    ((4, (6, 4), 1), 3, 1, 2),
    ((32, (32, 32), 156), 12, 3, 1),
    ((8, (28, 28), 480), 128, 1, 1),
    ((8, (28, 28), 128), 32, 3, 1),
    ((8, (28, 29), 256), 128, 1, 2),
]


@gpu
@pytest.mark.parametrize(("shape", "outputs", "kernel", "pool"), SIZES, ids=str)
@pytest.mark.parametrize("kind", TOLERANCE)
def test_gpu_reference(shape, outputs, kernel, pool, kind, multiply):
    """Against float64; outputs poisoned before, slices with NaN around them."""
    multiply("tf32" if kind == "tf32" else "ieee")
    dtype = torch.float32 if kind in ("ieee", "tf32") else getattr(torch, kind)
    cpu = Operands.random(shape, dtype)
    x, norm = cuda(cpu)
    for _ in range(3):  # nothing so near the rectifier's kink that rounding decides
        x = torch.where((x.double() * norm.scale + norm.shift).abs() < 1e-3, x + 1, x)
    x = slice_of_channels(x, 3)
    x64, norm64 = x.double(), double(norm)
    weight = (weight_for(cpu.x, outputs, kernel) / (shape[2] * kernel ** len(shape[1])) ** 0.5).cuda()
    size = (shape[0], *(n // pool for n in shape[1]), outputs)
    grad_out, out = torch.randn(size, device="cuda").to(dtype), poisoned(size, dtype)
    out64 = torch.empty(size, dtype=torch.float64, device="cuda")
    found, expected = empty_statistics(out), empty_statistics(out64)
    kernels.norm_relu_conv(x, norm, weight, out, pool, found)
    reference.norm_relu_conv(x64, norm64, weight.double(), out64, pool, expected)
    close([out, *found], [out64, *expected], TOLERANCE[kind])
    grad_x, grad_x64 = poisoned(x.shape, dtype), torch.empty_like(x64)
    through = torch.zeros(2, shape[2], device="cuda")
    through64 = through.double()
    found = kernels.norm_relu_conv_backward(BackwardOperands(grad_out, x, norm, weight, grad_x, False, through, pool))
    expected = reference.norm_relu_conv_backward(
        BackwardOperands(grad_out.double(), x64, norm64, weight.double(), grad_x64, False, through64, pool)
    )
    close([*found, grad_x, through], [*expected, grad_x64, through64], TOLERANCE[kind])
    close(measured(kernels, x), measured(reference, x64), 1e-5)
    count = torch.tensor(3.0, device="cuda")
    kernels.finish(grad_x, x, norm.mean, through, count, grad_x)
    reference.finish(grad_x64, x64, norm64.mean, through64, count.double(), grad_x64)
    close([grad_x], [grad_x64], TOLERANCE[kind])


@gpu
@pytest.mark.parametrize("shape", [(3, (5, 7), 13), (2, (9,), 7), (2, (3, 4, 5), 11), (64, (7, 7), 1024)], ids=str)
@pytest.mark.parametrize("kind", ["ieee", "bfloat16", "float16"])
def test_gpu_head_and_norm(shape, kind):
    dtype = torch.float32 if kind == "ieee" else getattr(torch, kind)
    x, norm = cuda(Operands.random(shape, dtype))
    for _ in range(3):
        x = torch.where((x.double() * norm.scale + norm.shift).abs() < 1e-3, x + 1, x)
    x64, norm64, size = x.double(), double(norm), (shape[0], shape[2])
    grad_out, out, out64 = torch.randn(size).cuda().to(dtype), x.new_full(size, torch.nan), x64.new_empty(size)
    kernels.norm_relu_mean(x, norm, out)
    reference.norm_relu_mean(x64, norm64, out64)
    grad_x, grad_x64, through = poisoned(x.shape, dtype), torch.empty_like(x64), torch.zeros(2, shape[2], device="cuda")
    through64 = through.double()
    found = kernels.norm_relu_mean_backward(grad_out, x, norm, grad_x, through)
    expected = reference.norm_relu_mean_backward(grad_out.double(), x64, norm64, grad_x64, through64)
    close([out, *found, grad_x, through], [out64, *expected, grad_x64, through64], TOLERANCE[kind])
    into, expected = (Affine(*t.new_full((4, shape[2]), torch.nan)) for t in (norm.mean, norm64.mean))
    kernels.fold_norm(Statistics(norm.mean, norm.inverse), norm.scale, norm.shift, 1e-5, into)
    reference.fold_norm(Statistics(norm64.mean, norm64.inverse), norm64.scale, norm64.shift, 1e-5, expected)
    close(into[1:], expected[1:], 1e-6)


@gpu
@pytest.mark.parametrize("size", [(5, 7), (8, 6), (1, 9), (1, 1), (9,), (3, 4, 5), (56, 57)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gpu_max_pool(size, dtype):
    x, norm = cuda(Operands.random((3, size, 13), dtype))
    halved = (3, *((n + 1) // 2 for n in size), 13)
    grad_out = torch.randn(halved, device="cuda").to(dtype)
    out, expected = poisoned(halved, dtype), torch.empty(halved, dtype=dtype, device="cuda")
    kernels.norm_relu_max_pool(x, norm, out)
    reference.norm_relu_max_pool(x, norm, expected)
    # Ties follow the rounding of the prologue, which may or may not use a fused multiply-add.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    close([out], [expected], tolerance)
    grad_x, grad_x2 = poisoned(x.shape, dtype), torch.empty_like(x)
    sums = kernels.norm_relu_max_pool_backward(grad_out, x, norm, grad_x, None)
    others = reference.norm_relu_max_pool_backward(grad_out, x, norm, grad_x2, None)
    if dtype == torch.float32:
        close([grad_x, *sums], [grad_x2, *others], tolerance)
    else:
        close(sums[1:], others[1:], tolerance)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outputs", "kernel", "pool"), [(128, 1, 1), (32, 3, 1), (64, 1, 2)])
def test_gpu_results_repeat_bit_for_bit(outputs, kernel, pool, dtype):
    x, norm = cuda(Operands.random((16, (28, 28), 128), dtype))
    weight = weight_for(x.cpu(), outputs, kernel).cuda()
    grad_out = torch.randn(16, 28 // pool, 28 // pool, outputs, device="cuda").to(dtype)

    def run():
        out, grad_x, found = torch.empty_like(grad_out), torch.empty_like(x), empty_statistics(grad_out)
        through = torch.zeros(2, 128, device="cuda")
        kernels.norm_relu_conv(x, norm, weight, out, pool, found)
        sums = kernels.norm_relu_conv_backward(
            BackwardOperands(grad_out, x, norm, weight, grad_x, False, through, pool)
        )
        return [out, grad_x, *found, *sums, through]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@gpu
@pytest.mark.parametrize("kind", check.KINDS)
def test_gpu_check_finds_no_fault(kind, multiply):
    """Every operation on a device that is full, eight times: no product is overtaken, no sum depends on the order."""
    multiply("tf32" if kind == "tf32" else "ieee")
    assert check.faults(kernels, torch.device("cuda"), kind) == []


@gpu
def test_gpu_more_values_than_32_bits_count():
    """The last image of a large batch comes out as it does alone."""
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of the GPU's memory")
    torch.manual_seed(0)
    x = torch.zeros(1025, 512, 512, 16, dtype=torch.float16, device="cuda")
    x[-1].normal_()
    assert x.numel() > 2**32
    norm, nothing = Affine(*torch.randn(4, 16, device="cuda")), torch.zeros(2, 16, device="cuda")
    weight, results = torch.randn(16, 16, 3, 3, device="cuda").half(), []
    for batch in (x, x[-1:].clone()):
        out, grad_x = torch.empty_like(batch), torch.empty_like(batch)
        kernels.norm_relu_conv(batch, norm, weight, out)
        kernels.norm_relu_conv_backward(
            BackwardOperands(batch, batch, norm, weight, grad_x, False, None, need_weight=False)
        )
        kernels.finish(grad_x, batch, norm.mean, nothing, torch.ones((), device="cuda"), grad_x)
        results.append((out[-1].clone(), grad_x[-1].clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
