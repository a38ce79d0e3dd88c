"""How fast the Triton kernels are on the GPU that there is: what each operation moves and multiplies in a second."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor

from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics, Unfinished
from efficient_densenet.ops.triton import backward, cudnn, forward, moments, tiles
from efficient_densenet.ops.triton.ahead_of_time import SHAPES, TYPES, Shape

_TINY = (Shape("bottleneck", 2, (4, 4), 72, 16), Shape("3×3", 2, (4, 4), 72, 8, 3))
"""To try this program; their channels fill more than a tile of 64."""


def speeds(quick: bool = False) -> dict[str, Any]:
    """On a GPU: each operation's bytes and FLOP per second, as shares of a plain copy's and a plain product's.

    Each with the device's line of the table, and with every candidate that changes what runs. Bytes are those that must
    be moved once: re-reading through the cache, or what a candidate moves besides, counts for nothing.
    """
    rows: list[dict[str, Any]] = []
    failed = []
    ceilings = {dtype: _ceilings(dtype, 1024 if quick else 8192) for dtype in (torch.bfloat16, torch.float32)}
    for dtype, (copy, product) in ceilings.items():
        for shape in _TINY if quick else SHAPES:
            usual: dict[str, tuple[Hashable, float]] = {}  # how each operation runs by the line, and its seconds
            for candidate in ("", *tiles.CANDIDATES):
                tiles.choose(*filter(None, [candidate]))
                name = "operands"
                try:
                    for name, way, attempt, moved, flop in _timed(shape, dtype):
                        if candidate and (name not in usual or way == usual[name][0]):
                            continue
                        seconds = _seconds(attempt)
                        usual.setdefault(name, (way, seconds))
                        rows.append(
                            {
                                "operation": name,
                                "candidate": candidate,
                                "shape": shape.name,
                                "dtype": TYPES[dtype],
                                "ms": seconds * 1e3,
                                "share_of_usual": seconds / usual[name][1],
                                "bytes_per_second": moved / seconds,
                                "flop_per_second": flop / seconds,
                                "share_of_copy": moved / seconds / copy,
                                "share_of_product": flop / seconds / product,
                            }
                        )
                except (RuntimeError, triton.TritonError) as error:  # what was measured before is worth having
                    text = " ".join(str(error).split())[:200]
                    failed.append(f"{name}, {shape.name}, {TYPES[dtype]}{', ' * bool(candidate)}{candidate}: {text}")
                finally:
                    tiles.choose()
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


def _timed(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[str, Hashable, Callable[[], Any], float, float]]:
    """Operation, what tells the ways to run it apart, what to run, bytes, FLOP."""

    def activation(size: tuple[int, ...], channels: int) -> Tensor:
        return torch.randn((shape.images, *size, 2 * channels), device="cuda").to(dtype)[..., :channels]

    x, grad_x = activation(shape.size, shape.channels), activation(shape.size, shape.channels)
    out = activation(tuple(n // shape.pool for n in shape.size), shape.outputs)
    norm, through = (
        Affine(*torch.randn(4, shape.channels, device="cuda")),
        torch.zeros(2, shape.channels, device="cuda"),
    )
    weight = torch.randn((shape.outputs, shape.channels, *[shape.kernel] * len(shape.size)), device="cuda").to(dtype)
    small, large = (t.numel() * t.element_size() for t in (out, x))
    flop = 2 * out.numel() * weight[0].numel()
    operands = BackwardOperands(out, x, norm, weight, grad_x, True, through, shape.pool)
    product = backward.Product(operands)
    found, count = Statistics(*torch.empty(2, shape.outputs, device="cuda")), torch.ones((), device="cuda")
    of, device = product.of, product.of.device
    tile, weight_tile = tiles.grad_x(of), tiles.grad_weight(of)
    runs = cudnn if of.taps > 1 and device.windows == "cudnn" else forward
    way = runs, of.rectified, tiles.forward(of)
    yield "forward", way, lambda: runs.norm_relu_conv(x, norm, weight, out, shape.pool, found), large + small, flop
    yield "backward, prefix", tile, lambda: product.grad_x(grad_x, True, through, tile), 3 * large + small, flop
    yield "backward, weight", weight_tile, lambda: product.grad_weight(weight_tile), large + small, flop
    if of.taps > 1:
        module = cudnn if device.windows_backward == "cudnn" else backward
        both, attempt = (module, tile, weight_tile), lambda: module.norm_relu_conv_backward(operands)
        yield "backward", both, attempt, 3 * large + small, 2 * flop
    elif of.pool == 1:
        unfinished = Unfinished(
            activation(shape.size, shape.outputs), found.mean, torch.zeros_like(torch.stack(found)), count
        )
        attempt = lambda: backward.finish_norm_relu_conv_backward(operands, unfinished)  # noqa: E731
        yield "finishing, backward", tiles.finishing_grad_x(of), attempt, 3 * large + 3 * small, 2 * flop
    of_x = Statistics(norm.mean, norm.inverse)
    yield "finish", None, lambda: moments.finish(grad_x, x, norm.mean, through, count, grad_x), 3 * large, 0.0
    yield "statistics", None, lambda: moments.statistics(x, of_x), large, 0.0


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
