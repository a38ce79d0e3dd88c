"""How fast the Triton kernels are on the GPU that there is: what each operation moves and multiplies in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor

from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics
from efficient_densenet.ops.triton import backward, forward, moments, tiles
from efficient_densenet.ops.triton.ahead_of_time import SHAPES, TYPES, Shape

_TINY = (Shape("bottleneck", 2, (4, 4), 72, 16), Shape("3×3", 2, (4, 4), 72, 8, 3))
"""To try this program; their channels fill more than a tile of 64."""


def speeds(quick: bool = False) -> dict[str, Any]:
    """On a GPU: each operation's bytes and FLOP per second, as shares of a plain copy's and a plain product's.

    Bytes are those that must be moved once: re-reading through the cache, or what is written in between, counts for
    nothing.
    """
    rows: list[dict[str, Any]] = []
    failed = []
    ceilings = {dtype: _ceilings(dtype, 1024 if quick else 8192) for dtype in (torch.bfloat16, torch.float32)}
    for dtype, (copy, product) in ceilings.items():
        for shape in _TINY if quick else SHAPES:
            name = "operands"
            try:
                for name, attempt, moved, flop in _timed(shape, dtype):
                    seconds = _seconds(attempt)
                    rows.append(
                        {
                            "operation": name,
                            "shape": shape.name,
                            "dtype": TYPES[dtype],
                            "ms": seconds * 1e3,
                            "bytes_per_second": moved / seconds,
                            "flop_per_second": flop / seconds,
                            "share_of_copy": moved / seconds / copy,
                            "share_of_product": flop / seconds / product,
                        }
                    )
            except (RuntimeError, triton.TritonError) as error:  # what was measured before is worth having
                failed.append(f"{name}, {shape.name}, {TYPES[dtype]}: {' '.join(str(error).split())[:200]}")
    # The biggest gap first: how far from the nearer of the two bounds.
    rows.sort(key=lambda row: max(row["share_of_copy"], row["share_of_product"]))
    names = ("copy_bytes_per_second", "product_flop_per_second")
    named = {TYPES[dtype]: dict(zip(names, pair, strict=True)) for dtype, pair in ceilings.items()}
    return {"ceilings": named, "rows": rows, "failed_kernels": failed}


def _ceilings(dtype: torch.dtype, size: int) -> tuple[float, float]:
    """Bytes per second of a plain copy and FLOP per second of a plain product."""
    square = torch.randn(size, size, device="cuda").to(dtype)
    with _tf32():
        copy = 2 * square.numel() * square.element_size() / _seconds(square.clone)
        return copy, 2 * size**3 / _seconds(lambda: square @ square)


def _timed(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any], float, float]]:
    """Operation, what to run, bytes, FLOP."""

    def activation(size: tuple[int, ...], channels: int) -> Tensor:
        return torch.randn((shape.images, *size, 2 * channels), device="cuda").to(dtype)[..., :channels]

    x, grad_x = activation(shape.size, shape.channels), activation(shape.size, shape.channels)
    out = activation(tuple(n // shape.pool for n in shape.size), shape.outputs)
    norm = Affine(*torch.randn(4, shape.channels, device="cuda"))
    through = torch.zeros(2, shape.channels, device="cuda")
    weight = torch.randn((shape.outputs, shape.channels, *[shape.kernel] * len(shape.size)), device="cuda").to(dtype)
    small, large = (t.numel() * t.element_size() for t in (out, x))
    flop = 2 * out.numel() * weight[0].numel()
    operands = BackwardOperands(out, x, norm, weight, grad_x, True, through, shape.pool, need_weight=False)
    product = backward.Product(operands)
    grad_weight, tile = torch.empty_like(weight), tiles.grad_weight(product.of)
    found, of_x = Statistics(*torch.empty(2, shape.outputs, device="cuda")), Statistics(norm.mean, norm.inverse)
    count = torch.ones((), device="cuda")
    yield "forward", lambda: forward.norm_relu_conv(x, norm, weight, out, shape.pool, found), large + small, flop
    of_prefix = None, *torch.empty(2, shape.channels, device="cuda")
    yield "backward, prefix", lambda: backward.norm_relu_conv_backward(operands, of_prefix), 3 * large + small, flop
    yield "backward, weight", lambda: product.grad_weight(grad_weight, tile), large + small, flop
    yield "finish", lambda: moments.finish(grad_x, x, norm.mean, through, count, grad_x), 3 * large, 0.0
    yield "statistics", lambda: moments.statistics(x, of_x), large, 0.0


def _seconds(attempt: Callable[[], Any]) -> float:
    return triton.testing.do_bench(attempt, warmup=10, rep=50, return_mode="median") / 1e3


@contextmanager
def _tf32() -> Iterator[None]:
    """The kernels multiply float32 as PyTorch's convolutions do, in TF32: so shall the product beside them."""
    matmul = torch.backends.cuda.matmul  # has no attributes that could be deleted, which `mock.patch` would try
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
