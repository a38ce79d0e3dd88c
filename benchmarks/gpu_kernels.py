"""Compile the Triton kernels ahead of time, for devices that need not be there, and say what they take.

The launchers run on tensors without data, and what they would launch is compiled instead: exactly the kernels, tiles
and flags that a network of these shapes uses.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from efficient_densenet.ops.reference import Affine, Statistics
from efficient_densenet.ops.triton import backward, forward, launch, max_pool, mean, moments, norms, tiles

CAPABILITIES = (80, 89, 90)
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""What a program may have of it on each device; 89 stands for all that have no line in the table of tiles."""
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}


@dataclass(frozen=True)
class Shape:
    """A norm–relu–convolution of a network: images, their size, channels, outputs, kernel, pool."""

    name: str
    images: int
    size: tuple[int, ...]
    channels: int
    outputs: int
    kernel: int = 1
    pool: int = 1


# One for each line that the tables of tiles can give: narrow and wide, aligned and odd.
SHAPES = (
    Shape("bottleneck, DenseNet-121", 256, (56, 56), 256, 128),
    Shape("bottleneck, k=12", 64, (32, 32), 60, 48),
    Shape("bottleneck, k=48", 64, (56, 56), 480, 192),
    Shape("3×3, k=12 without bottleneck", 128, (32, 32), 156, 12, 3),
    Shape("3×3, k=12", 64, (32, 32), 48, 12, 3),
    Shape("3×3, k=24", 64, (32, 32), 96, 24, 3),
    Shape("3×3, k=32", 256, (56, 56), 128, 32, 3),
    Shape("3×3, k=40", 64, (32, 32), 160, 40, 3),
    Shape("3×3, k=48", 64, (56, 56), 192, 48, 3),
    Shape("3×3×3, k=32", 2, (32, 32, 32), 128, 32, 3),
    Shape("transition, DenseNet-121", 256, (56, 56), 256, 128, 1, 2),
    Shape("transition, k=12", 128, (32, 32), 168, 168, 1, 2),
    Shape("odd channels", 3, (35, 35), 37, 5, 3),
)


def records(
    shapes: tuple[Shape, ...] = SHAPES,
    kinds: tuple[str, ...] = ("bf16", "fp16", "fp32", "tf32"),
    capabilities: tuple[int, ...] = CAPABILITIES,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Every distinct kernel that these shapes use: tile, registers, bytes of shared memory and of spills."""
    found = []
    for capability in capabilities:
        seen: set[str] = set()
        for kind in kinds:
            for shape in shapes:
                launched = _launched(shape, kind, capability)
                for kernel, arguments, tile in launched:
                    source, flags = _source(kernel, arguments, tile)
                    key = f"{source.hash()} {tile}"
                    if key in seen:
                        continue
                    seen.add(key)
                    progress(f"sm_{capability} {kind} {shape.name}: {kernel.__name__}")
                    found.append(
                        {
                            "kernel": kernel.__name__,
                            "shape": shape.name,
                            "type": kind,
                            "sm": capability,
                            "tile": asdict(tile),
                            "flags": flags,
                            **_compiled(source, tile, capability),
                        }
                    )
    return found


def kernels_of(shape: Shape, kind: str) -> set[str]:
    """What tells the kernels that a shape uses from others: everything that the compiler looks at."""
    return {f"{_source(*launch)[0].hash()} {launch[2]}" for launch in _launched(shape, kind, 90)}


def compile_here(shape: Shape, kind: str) -> int:
    """Compile what a shape uses for the GPU that there is, so that later processes find it in Triton's cache.

    Returns:
        The number of kernels.
    """
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    launched = _launched(shape, kind, 10 * capability[0] + capability[1])
    for kernel, arguments, tile in launched:
        plain = [a.dtype if isinstance(a, Tensor) else a for a in arguments]
        kernel.warmup(*plain, grid=(1,), **tile.sizes, num_warps=tile.warps, num_stages=tile.stages)
    return len(launched)


def compile_everything_here() -> None:
    """As many at a time as there are processors; a kernel that does not compile is for those that want it to tell."""
    work = [(shape, kind) for kind in ("bf16", "tf32") for shape in SHAPES]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for attempt in [pool.submit(compile_here, *item) for item in work]:
            attempt.exception()


def table(found: list[dict[str, Any]]) -> str:
    """The same in markdown."""
    header = ["kernel", "shape", "type", "sm", "tile", "warps", "stages", "registers", "shared kB", "spills"]
    lines = [header, ["---"] * 3 + ["---:"] * 7]
    for r in found:
        t = r["tile"]
        tile = "×".join(str(t[side]) for side in ("rows", "columns", "depth") if t[side])
        numbers = [t["warps"], t["stages"], r["registers"], f"{r['shared_bytes'] / 1024:.0f}", r["spilled_bytes"]]
        lines.append([r["kernel"], r["shape"], r["type"], str(r["sm"]), tile, *map(str, numbers)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


KERNELS = (
    *("norm_relu_conv_kernel", "grad_x_kernel", "grad_weight_kernel", "sum_parts_kernel"),
    *("fold_kernel", "norm_gradients_kernel", "moments_kernel", "merge_kernel", "finish_kernel"),
    *("max_pool_kernel", "max_pool_backward_kernel", "mean_kernel", "mean_backward_kernel"),
)


def speeds(quick: bool = False) -> dict[str, Any]:
    """On a GPU: each operation's bytes and FLOP per second, as shares of a plain copy's and a plain product's.

    Bytes are those that must be moved once: re-reading through the cache counts for nothing.
    """
    rows, failed = [], []
    ceilings = {dtype: _ceilings(dtype, 1024 if quick else 8192) for dtype in (torch.bfloat16, torch.float32)}
    for dtype, (copy, product) in ceilings.items():
        for shape in SHAPES[:1] if quick else SHAPES:
            name = "operands"
            try:
                for name, attempt, moved, flop in _timed(shape, dtype):
                    seconds = _seconds(attempt)
                    rows.append(
                        {
                            "operation": name,
                            "shape": shape.name,
                            "dtype": _TYPES[dtype],
                            "ms": seconds * 1e3,
                            "bytes_per_second": moved / seconds,
                            "flop_per_second": flop / seconds,
                            "share_of_copy": moved / seconds / copy,
                            "share_of_product": flop / seconds / product,
                        }
                    )
            except (RuntimeError, triton.TritonError) as error:  # what was measured before is worth having
                failed.append(f"{name}, {shape.name}, {_TYPES[dtype]}: {' '.join(str(error).split())[:200]}")
    # The biggest gap first: how far from the nearer of the two bounds.
    rows.sort(key=lambda row: max(row["share_of_copy"], row["share_of_product"]))
    names = ("copy_bytes_per_second", "product_flop_per_second")
    named = {_TYPES[dtype]: dict(zip(names, pair, strict=True)) for dtype, pair in ceilings.items()}
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
    norm, through = (
        Affine(*torch.randn(4, shape.channels, device="cuda")),
        torch.zeros(2, shape.channels, device="cuda"),
    )
    weight = torch.randn((shape.outputs, shape.channels, *[shape.kernel] * len(shape.size)), device="cuda").to(dtype)
    small, large = (t.numel() * t.element_size() for t in (out, x))
    flop = 2 * out.numel() * weight[0].numel()
    product = backward.Product(out, x, norm, weight, shape.pool)
    found, count = Statistics(*torch.empty(2, shape.outputs, device="cuda")), torch.ones((), device="cuda")
    tile, weight_tile = tiles.grad_x(product.of), tiles.grad_weight(product.of)
    yield "forward", lambda: forward.norm_relu_conv(x, norm, weight, out, shape.pool, found), large + small, flop
    yield "backward, prefix", lambda: product.grad_x(grad_x, True, through, tile), 3 * large + small, flop
    yield "backward, weight", lambda: product.grad_weight(weight_tile), large + small, flop
    of_x = Statistics(norm.mean, norm.inverse)
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


def _launched(shape: Shape, kind: str, capability: int) -> list[tuple[Any, tuple, tiles.Tile]]:
    """Kernel, arguments and tile of everything that a shape would launch. TF32 and fp32 are float32."""
    device = tiles.DEVICES.get(divmod(capability, 10), tiles.OTHER)
    launched: list[tuple[Any, tuple, tiles.Tile]] = []
    with (
        mock.patch.object(
            launch, "run", lambda kernel, _, tile, *arguments: launched.append((kernel, arguments, tile))
        ),
        mock.patch.object(tiles, "precision", lambda x: "tf32" if kind == "tf32" else "ieee"),
        mock.patch.object(tiles, "device_of", lambda x: device),
    ):
        _operations(shape, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32))
    return launched


def _operations(shape: Shape, dtype: torch.dtype) -> None:
    """Forward and backward of everything, as a block would call it: on slices of a wider buffer."""

    def activation(size: tuple[int, ...], channels: int) -> Tensor:
        return torch.empty((shape.images, *size, 2 * channels), dtype=dtype, device="meta")[..., :channels]

    x, grad_x = activation(shape.size, shape.channels), activation(shape.size, shape.channels)
    out = activation(tuple(n // shape.pool for n in shape.size), shape.outputs)
    vector, through = torch.empty(shape.channels, device="meta"), torch.empty(2, shape.channels, device="meta")
    norm, count = Affine(*[vector] * 4), torch.empty((), device="meta")
    found = torch.empty(shape.outputs, device="meta")
    kernel = [shape.kernel] * len(shape.size)
    weight = torch.empty((shape.outputs, shape.channels, *kernel), dtype=dtype, device="meta")
    plain = shape.pool == 1
    forward.norm_relu_conv(x, norm, weight, out, shape.pool, Statistics(found, found) if plain else None)
    backward.norm_relu_conv_backward(out, x, norm, weight, grad_x, plain, through, shape.pool, True)
    norms.fold_norm(Statistics(vector, vector), vector, vector, 1e-5, norm)
    moments.statistics(x, Statistics(vector, vector))
    moments.finish(grad_x, x, vector, through, count, grad_x)
    pooled = activation(tuple((n + 1) // 2 for n in shape.size), shape.channels)
    max_pool.norm_relu_max_pool(x, norm, pooled)
    max_pool.norm_relu_max_pool_backward(pooled, x, norm, grad_x, through)
    mean.norm_relu_mean(x, norm, pooled[:, 0, 0])
    mean.norm_relu_mean_backward(pooled[:, 0, 0], x, norm, grad_x, through)


def _source(kernel: Any, arguments: tuple, tile: tiles.Tile) -> tuple[ASTSource, dict[str, Any]]:
    names = [p.name for p in kernel.params]
    values = dict(zip(names, arguments, strict=False)) | tile.sizes
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            constants[parameter.name] = value
            signature[parameter.name] = "constexpr"
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            if parameter.name not in launch.VECTORS:
                aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return ASTSource(kernel, signature, constants, aligned), constants


def _compiled(source: ASTSource, tile: tiles.Tile, capability: int) -> dict[str, Any]:
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target, options={"num_warps": tile.warps, "num_stages": tile.stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(re.search(rf"\b{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return {
        "registers": used["REG"],
        "shared_bytes": kernel.metadata.shared,
        "spilled_bytes": used["STACK"] + used["LOCAL"],  # the kernels have no arrays of their own
        "tensor_cores": bool(re.search(r"\b(wgmma|mma)\.", kernel.asm["ptx"])),
    }
