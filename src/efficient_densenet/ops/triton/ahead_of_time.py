"""Compile the Triton kernels ahead of time, for devices that need not be there, and say what they take.

The launchers run on tensors without data, and what they would launch is compiled instead: exactly the kernels, tiles
and flags that a network of these shapes uses.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics
from efficient_densenet.ops.triton import (
    backward,
    forward,
    launch,
    machine_code,
    max_pool,
    mean,
    moments,
    norms,
    rectifier,
    tiles,
)

TARGETS = {
    **{f"sm_{sm}": GPUTarget("cuda", sm, 32) for sm in (80, 89, 90, 100, 120)},
    **{name: GPUTarget("hip", name, warp) for name, warp in (("gfx90a", 64), ("gfx942", 64), ("gfx1100", 32))},
}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_89": 99 << 10, "sm_120": 99 << 10}
"""What a program may have of it on each device of NVIDIA's; on AMD's it is `ROCM_SHARED_BYTES`."""
ROCM_SHARED_BYTES = 64 << 10
MOST_SPILLED = {"sm_90": 16, "sm_100": 8}
"""Bytes of a thread, where it is not 0; on Hopper, in the loop that holds the product. There the fastest of the tiles
that were timed spill outside of it. Blackwell's assembler spills although it has registers left."""
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}


@dataclass(frozen=True)
class Shape:
    """A norm–relu–convolution of a network: images, their size, channels, outputs, kernel, pool.

    The outputs are a slice of a wider tensor's channels, which begins at channel `begin`.
    """

    name: str
    images: int
    size: tuple[int, ...]
    channels: int
    outputs: int
    kernel: int = 1
    pool: int = 1
    begin: int = 0


# One for each line that the tables of tiles can give: narrow and wide, aligned and odd. A test holds that the networks
# of this library use no kernel that is not among these.
SHAPES = (
    Shape("bottleneck, DenseNet-121", 256, (56, 56), 256, 128),
    Shape("bottleneck, k=12", 64, (32, 32), 60, 48),
    Shape("bottleneck, k=48", 64, (56, 56), 480, 192),
    Shape("3×3, k=12 without bottleneck", 128, (32, 32), 156, 12, 3),
    Shape("bottleneck, C=64", 256, (56, 56), 64, 128),
    Shape("3×3, k=12", 64, (32, 32), 48, 12, 3),
    Shape("3×3, k=12, C=24", 128, (32, 32), 24, 12, 3),
    Shape("3×3, k=12, C=36", 128, (32, 32), 36, 12, 3),
    Shape("3×3, k=12, unaligned", 64, (32, 32), 48, 12, 3, begin=12),
    Shape("3×3, k=24", 64, (32, 32), 96, 24, 3),
    Shape("3×3, k=32", 256, (56, 56), 128, 32, 3),
    Shape("3×3, k=40", 64, (32, 32), 160, 40, 3),
    Shape("3×3, k=48", 64, (56, 56), 192, 48, 3),
    Shape("3×3×3, k=32", 2, (32, 32, 32), 128, 32, 3),
    Shape("transition, DenseNet-121", 256, (56, 56), 256, 128, 1, 2),
    Shape("transition, k=12", 128, (32, 32), 168, 168, 1, 2),
    *(Shape(f"bottleneck, k=12, C={channels}", 64, (32, 32), channels, 48) for channels in (24, 48, 72, 84, 150)),
    *(Shape(f"bottleneck, k=40, C={channels}", 64, (32, 32), channels, 160) for channels in (660, 950)),
    Shape("transition, C=216", 128, (32, 32), 216, 108, 1, 2),
    Shape("transition, C=300", 64, (32, 32), 300, 150, 1, 2),
    Shape("odd channels", 3, (35, 35), 37, 5, 3),
)
FEW_PIXELS = tuple(
    replace(shape, name=f"{shape.name}, few pixels", images=1, size=(8,) * len(shape.size)) for shape in SHAPES
)
"""The same where a grid has fewer programs than there are multiprocessors."""


PRODUCTS = ("norm_relu_conv_kernel", "grad_x_kernel", "grad_x_pointwise_kernel", "grad_weight_kernel")
KERNELS = (
    *(
        *PRODUCTS,
        "sum_parts_kernel",
        "fold_kernel",
        "norm_gradients_kernel",
        "moments_kernel",
        "merge_kernel",
        "finish_kernel",
    ),
    *("max_pool_kernel", "max_pool_backward_kernel", "mean_kernel", "rectify_kernel", "rectify_backward_kernel"),
)


Record = dict[str, Any]
"""What is known about a compiled kernel: target, kernel, and all else by its name."""
Tables = dict[str, dict[str, list[list[Any]]]]

KINDS = ("bf16", "fp16", "fp32", "tf32")
"""How products are computed. TF32 and fp32 are both float32; on ROCm there is no TF32."""


@dataclass(frozen=True)
class Launched:
    """A kernel that a shape would launch, with its arguments, tile and number of programs."""

    shape: Shape
    kernel: Any
    arguments: tuple
    tile: tiles.Tile
    programs: int

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @functools.cached_property
    def values(self) -> dict[str, Any]:
        """The arguments by their names."""
        return dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.tile.sizes

    @functools.cached_property
    def source(self) -> ASTSource:
        """What the compiler gets."""
        values = self.values
        signature: dict[str, str] = {}
        aligned = {}
        for i, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
            elif isinstance(value, Tensor):
                signature[parameter.name] = f"*{TYPES[value.dtype]}"
                if parameter.name not in launch.VECTORS and launch.aligned(value):
                    aligned[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        return ASTSource(self.kernel, signature, self.flags, aligned)

    @functools.cached_property
    def flags(self) -> dict[str, Any]:
        """Everything that is known at compilation."""
        return {p.name: self.values[p.name] for p in self.kernel.params if p.is_constexpr}

    @functools.cached_property
    def key(self) -> str:
        """What tells the compiled kernel from others: everything that the compiler looks at."""
        return f"{self.source.hash()} {self.tile}"

    def compile(self, target: str) -> Any:
        return triton.compile(self.source, TARGETS[target], launch.options(self.tile))


def distinct(
    target: str, shapes: Sequence[Shape] = SHAPES, kinds: Sequence[str] = KINDS
) -> Iterator[tuple[str, Launched]]:
    """Every distinct kernel that these shapes use on a device, each with its kind."""
    seen: set[str] = set()
    for kind, shape in itertools.product(kinds, shapes):
        if kind == "tf32" and TARGETS[target].backend == "hip":
            continue
        for launched in launched_by(shape, kind, device_of(target)):
            if launched.key not in seen:
                seen.add(launched.key)
                yield kind, launched


def asked_for(target: str, kind: str, launched: Launched) -> Record:
    """What the compiler is asked for."""
    return {
        "target": target,
        "kernel": launched.name,
        "type": kind,
        "shape": launched.shape.name,
        **launched.flags,
        "warps": launched.tile.warps,
        "stages": launched.tile.stages,
    }


def record(target: str, kind: str, launched: Launched) -> Record:
    """What the compiler is asked for, and what comes of it: shared memory, and what `machine_code.describe` finds."""
    compiled = launched.compile(target)
    found = {"shared_bytes": compiled.metadata.shared, **machine_code.describe(compiled)}
    return asked_for(target, kind, launched) | found


def tables(records: Iterable[Record]) -> Tables:
    """The records of each kernel on each target: the names of the columns, then a line for each."""
    found: Tables = {}
    for one in records:
        (target, kernel, *values), (_, _, *names) = one.values(), one
        found.setdefault(target, {}).setdefault(kernel, [names]).append(values)
    return found


def records_of(tables: Tables) -> list[Record]:
    """The records that are in such tables."""
    return [
        {"target": target, "kernel": kernel, **dict(zip(names, values, strict=True))}
        for target, kernels in tables.items()
        for kernel, (names, *lines) in kernels.items()
        for values in lines
    ]


def faults(record: Record) -> list[str]:
    """What about a compiled kernel must not be."""
    target, shared, spilled = record["target"], record["shared_bytes"], record["spilled_bytes"]
    found = [f"it is overtaken: {record['overtaken']}"] if record["overtaken"] else []
    if shared > SHARED_BYTES.get(target, ROCM_SHARED_BYTES):
        found.append(f"it needs {shared} bytes of shared memory")
    if spilled > MOST_SPILLED.get(target, 0) and (target != "sm_90" or record["spills_in_loop"]):
        found.append(f"it spills {spilled} bytes")
    if record["kernel"] in PRODUCTS and record["type"] != "fp32" and not record["tensor_cores"]:
        found.append("it does without tensor cores")
    return [f"{record['kernel']}, {record['shape']}, {record['type']}, {target}: {text}" for text in found]


def kernels_of(shape: Shape, kind: str) -> set[str]:
    """The keys of what a shape uses, on a device of compute capability 9.0."""
    return {launched.key for launched in launched_by(shape, kind, device_of("sm_90"))}


def shapes_of(network: nn.Module, images: int, size: int) -> list[Shape]:
    """Every norm–relu–convolution of a network of this library: all convolutions but the first, of this size."""
    return [
        Shape(
            name,
            images,
            (size, size),
            m.in_channels,
            m.out_channels,
            m.kernel_size[0],
            2 if "transition" in name else 1,
        )
        for name, m in network.named_modules()
        if isinstance(m, nn.Conv2d) and not name.endswith("conv0")
    ]


def compile_here(shape: Shape, kind: str) -> int:
    """Compile what a shape uses for the GPU that there is, so that later processes find it in Triton's cache.

    Returns:
        The number of kernels.
    """
    launched = launched_by(shape, kind, tiles.device_of(torch.device("cuda")))
    for one in launched:
        plain = [a.dtype if isinstance(a, Tensor) else a for a in one.arguments]
        one.kernel.warmup(*plain, grid=(1,), **one.tile.sizes, **launch.options(one.tile))
    return len(launched)


def compile_everything_here() -> None:
    """As many at a time as there are processors; a kernel that does not compile is for those that want it to tell."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for attempt in [
            pool.submit(compile_here, shape, kind) for kind in ("bf16", "tf32") for shape in (*SHAPES, *FEW_PIXELS)
        ]:
            attempt.exception()


def device_of(target: str) -> tiles.Device:
    """The line of a device in the table."""
    if TARGETS[target].backend == "hip":
        return tiles.RDNA if TARGETS[target].warp_size == 32 else tiles.ROCM
    return tiles.DEVICES.get(divmod(TARGETS[target].arch, 10), tiles.OTHER)


def launched_by(shape: Shape, kind: str, device: tiles.Device) -> list[Launched]:
    """The kernels that a shape would launch, in their order."""
    launched: list[Launched] = []

    def note(kernel: Any, programs: int, tile: tiles.Tile, *arguments: Any) -> None:
        launched.append(Launched(shape, kernel, arguments, tile, programs))

    with (
        mock.patch.object(launch, "run", note),
        mock.patch.object(tiles, "precision", lambda x: "tf32" if kind == "tf32" else "ieee"),
        mock.patch.object(tiles, "device_of", lambda x: device),
    ):
        _operations(shape, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32))
    return launched


def _operations(shape: Shape, dtype: torch.dtype) -> None:
    """Forward and backward of everything, as a block would call it: on slices of a wider buffer."""

    def activation(size: tuple[int, ...], channels: int, begin: int = 0) -> Tensor:
        whole = torch.empty((shape.images, *size, 2 * channels), dtype=dtype, device="meta")
        return whole[..., begin : begin + channels]

    x, grad_x = activation(shape.size, shape.channels), activation(shape.size, shape.channels)
    out = activation(tuple(n // shape.pool for n in shape.size), shape.outputs, shape.begin)
    vector, through = torch.empty(shape.channels, device="meta"), torch.empty(2, shape.channels, device="meta")
    norm, of_norm, count = Affine(*[vector] * 4), (vector, vector), torch.empty((), device="meta")
    found = torch.empty(shape.outputs, device="meta")
    kernel = [shape.kernel] * len(shape.size)
    weight = torch.empty((shape.outputs, shape.channels, *kernel), dtype=dtype, device="meta")
    plain = shape.pool == 1
    forward.norm_relu_conv(x, norm, weight, out, shape.pool, Statistics(found, found) if plain else None)
    # A prefix's gradient is added to; those of a bottleneck's output and of a transition's input are written.
    for accumulate in {plain, False}:
        rectifier.rectify_backward(x, x, norm, grad_x, accumulate, through, of_norm)
        backward.norm_relu_conv_backward(
            BackwardOperands(out, x, norm, weight, grad_x, accumulate, through, shape.pool, True),
            (torch.empty_like(weight), *of_norm),
        )
    norms.fold_norm(Statistics(vector, vector), vector, vector, 1e-5, norm)
    moments.statistics(x, Statistics(vector, vector))
    moments.finish(grad_x, x, vector, through, count, grad_x)
    pooled = activation(tuple((n + 1) // 2 for n in shape.size), shape.channels)
    max_pool.norm_relu_max_pool(x, norm, pooled)
    max_pool.norm_relu_max_pool_backward(pooled, x, norm, grad_x, through, of_norm)
    mean.norm_relu_mean(x, norm, pooled[:, 0, 0])
    mean.norm_relu_mean_backward(pooled[:, 0, 0], x, norm, grad_x, through, of_norm)
