"""Does a backend compute on a device what `reference` does? Every operation, large enough to fill a GPU, repeatedly.

Run as a program it is the child process of `trust`: a kernel that fails may leave its process without a usable GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficient_densenet.ops import reference
from efficient_densenet.ops.protocol import (
    Affine,
    Backend,
    BackwardOperands,
    Statistics,
    statistics_dtype,
)

KINDS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""How activations are held and multiplied: float32 exactly or, as PyTorch's convolutions by default, in TF32."""

READY = "ready"
"""What the program prints before the first kernel runs: what fails until then is no fault of the kernels."""

# Relative to the largest value; TF32 keeps ten bits of each factor.
_TOLERANCE = {"float32": 1e-5, "tf32": 5e-3, "bfloat16": 2e-2, "float16": 3e-3}
_REPEATS = 8
_SIDE = 28
_Operation = Callable[[Backend, "_Give"], list[Tensor]]


class Shape(NamedTuple):
    """A norm–relu–convolution: channels, outputs, kernel, pool. Some layers of DenseNet-121 and of one of k = 12."""

    channels: int
    outputs: int
    kernel: int
    pool: int = 1


SHAPES = (Shape(512, 128, 1), Shape(128, 32, 3), Shape(512, 256, 1, 2), Shape(48, 12, 3), Shape(160, 40, 3))


def kind_of(dtype: torch.dtype) -> str:
    """How activations of a type are multiplied by now."""
    if dtype == torch.float32:
        conv = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        return "tf32" if conv == "tf32" and torch.version.hip is None else "float32"
    return str(dtype).removeprefix("torch.")


def faults(
    backend: Backend, device: torch.device, kind: str, rows: int = 0, shapes: Sequence[Shape] = SHAPES
) -> list[str]:
    """What `backend` computes otherwise than `reference` in float64, or not the same each time; empty if all is right.

    Args:
        rows: at least so many pixels; 0: four programs of 128 rows for each multiprocessor of the device.
        shapes: of the convolutions.
    """
    if not rows:
        rows = 4 * 128 * torch.cuda.get_device_properties(device).multi_processor_count
    found = []
    for shape in shapes:
        case = _Case(kind, device, (ceil(rows / _SIDE**2), _SIDE, _SIDE, shape.channels))
        found += [
            f"{name}, {shape.channels} → {shape.outputs} channels, kernel {shape.kernel}, pool {shape.pool}: {fault}"
            for name, operation in case.convolution(shape)
            if (fault := case.fault(operation, backend))
        ]
    case = _Case(kind, device, (ceil(rows / _SIDE**2), _SIDE, _SIDE, 64))
    for name, operation in case.others():
        if fault := case.fault(operation, backend):
            found.append(f"{name}: {fault}")
    return found


class _Case:
    """Operands of one size, and what the operations make of them: with any backend, in the kind or in float64."""

    def __init__(self, kind: str, device: torch.device, size: tuple[int, ...]) -> None:
        self.tolerance, self.dtype, self.device = _TOLERANCE[kind], KINDS[kind], device
        self.generator = torch.Generator().manual_seed(0)  # the same values for every device
        channels = size[-1]
        # In quarters and powers of two, so that the rectifier and the pools decide the same in every precision.
        x = torch.randint(-12, 13, size, generator=self.generator).to(device) / 4
        sign, power, shift, mean = torch.randint(0, 4, (4, channels), generator=self.generator).to(device).float()
        scale = 2 ** (power - 2) * torch.where(sign > 0, 1.0, -1.0)
        self.norm = Affine(mean / 4, 1 + mean / 4, scale, shift / 4 - 0.125 * scale)
        self.x = self.slice_of(x)

    def random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator).to(self.device)

    def slice_of(self, x: Tensor) -> Tensor:
        """The same values in this type, as a slice of the channels of a wider tensor that is full of NaN."""
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 32), torch.nan, dtype=self.dtype)
        wide[..., 16:-16] = x
        return wide[..., 16:-16]

    def convolution(self, shape: Shape) -> Iterator[tuple[str, _Operation]]:
        n, height, width, channels = self.x.shape
        size = n, height // shape.pool, width // shape.pool, shape.outputs
        weight = self.random(shape.outputs, channels, shape.kernel, shape.kernel) / (channels * shape.kernel**2) ** 0.5
        weight, grad_out = weight.to(self.dtype), self.random(*size).to(self.dtype)
        before = self.random(*self.x.shape).to(self.dtype)

        def forward(backend: Backend, give: _Give) -> list[Tensor]:
            out, statistics = give.empty(size), give.vectors(2, shape.outputs)
            backend.norm_relu_conv(give(self.x), give.norm, give(weight), out, shape.pool, Statistics(*statistics))
            return [out, *statistics]

        def backward(backend: Backend, give: _Give) -> list[Tensor]:
            accumulate = shape.pool == 1
            grad_x = give.copy(before) if accumulate else give.empty(self.x.shape)
            through = give.vectors(2, channels).zero_()
            operands = BackwardOperands(
                give(grad_out), give(self.x), give.norm, give(weight), grad_x, accumulate, through, shape.pool
            )
            of_weight, *of_norm = backend.norm_relu_conv_backward(operands)
            assert of_weight is not None
            return [grad_x, through, of_weight, *of_norm]

        yield "norm_relu_conv", forward
        yield "norm_relu_conv_backward", backward

    def others(self) -> Iterator[tuple[str, _Operation]]:
        n, height, width, channels = self.x.shape
        halved = n, (height + 1) // 2, (width + 1) // 2, channels
        grad_halved, grad_mean = self.random(*halved).to(self.dtype), self.random(n, channels).to(self.dtype)
        grad = self.random(*self.x.shape).to(self.dtype)
        through_before = self.random(2, channels)

        def max_pool(backend: Backend, give: _Give) -> list[Tensor]:
            out = give.empty(halved)
            backend.norm_relu_max_pool(give(self.x), give.norm, out)
            return [out]

        def max_pool_backward(backend: Backend, give: _Give) -> list[Tensor]:
            grad_x, through = give.empty(self.x.shape), give.vectors(2, channels).zero_()
            return [
                *backend.norm_relu_max_pool_backward(give(grad_halved), give(self.x), give.norm, grad_x, through),
                *(grad_x, through),
            ]

        def mean(backend: Backend, give: _Give) -> list[Tensor]:
            out = give.copy(grad_mean)
            backend.norm_relu_mean(give(self.x), give.norm, out)
            return [out]

        def mean_backward(backend: Backend, give: _Give) -> list[Tensor]:
            grad_x, through = give.empty(self.x.shape), give.vectors(2, channels).zero_()
            return [
                *backend.norm_relu_mean_backward(give(grad_mean), give(self.x), give.norm, grad_x, through),
                *(grad_x, through),
            ]

        def statistics(backend: Backend, give: _Give) -> list[Tensor]:
            found = Statistics(*give.vectors(2, channels))
            backend.statistics(give(self.x), found)
            return list(found)

        def finish(backend: Backend, give: _Give) -> list[Tensor]:
            out, count = give.empty(self.x.shape), give.vectors(1, 1)[0, 0].fill_(self.x.numel() // channels)
            backend.finish(give(grad), give(self.x), give.norm.mean, give.wide(through_before), count, out)
            return [out]

        def fold_norm(backend: Backend, give: _Give) -> list[Tensor]:
            into = Affine(give.norm.mean, *give.vectors(3, channels))
            backend.fold_norm(
                Statistics(give.norm.mean, give.norm.inverse), give.norm.scale, give.norm.shift, 1e-5, into
            )
            return [into.inverse, into.scale, into.shift]

        for operation in (max_pool, max_pool_backward, mean, mean_backward):
            yield f"norm_relu_{operation.__name__}", operation
        for operation in (statistics, finish, fold_norm):
            yield operation.__name__, operation

    def fault(self, operation: _Operation, backend: Backend) -> str:
        """What is wrong with an operation, or nothing."""
        expected = operation(reference, _Give(self, torch.float64))
        give = _Give(self, self.dtype)
        first = operation(backend, give)
        if not give.guarded():
            return "writes outside of its output"
        for found, right in zip(first, expected, strict=True):
            largest = max(right.abs().max().item(), 1)
            error = (found.double() - right).abs().max().item()
            if not error <= self.tolerance * largest:  # NaN is wrong, too
                return f"off by {error:.2g} where values reach {largest:.2g}"
        for _ in range(_REPEATS):
            again = operation(backend, _Give(self, self.dtype))
            if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
                return "another result each time"
        return ""


class _Give:
    """Operands of a case in the type of an attempt; what an operation must overwrite is NaN before."""

    def __init__(self, case: _Case, dtype: torch.dtype) -> None:
        self.case, self.dtype, self.small = case, dtype, statistics_dtype(dtype)
        self.norm = Affine(*(self.wide(t) for t in case.norm))
        self.guards: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def wide(self, x: Tensor) -> Tensor:
        return x.to(self.small)

    def copy(self, x: Tensor) -> Tensor:
        return x.to(self.dtype, copy=True)

    def empty(self, size: Sequence[int]) -> Tensor:
        channels = size[-1]
        whole = torch.full((*size[:-1], channels + 32), torch.nan, dtype=self.dtype, device=self.case.device)
        self.guards += [whole[..., :16], whole[..., -16:]]
        return whole[..., 16:-16]

    def guarded(self) -> bool:
        """Whether what lies around the outputs is as it was."""
        return all(bool(guard.isnan().all()) for guard in self.guards)

    def vectors(self, number: int, channels: int) -> Tensor:
        return torch.full((number, channels), torch.nan, dtype=self.small, device=self.case.device)


def main() -> None:
    """Print `READY`, then the faults, as JSON; a lack of memory is no fault and says so."""
    parser = argparse.ArgumentParser(description="check the Triton kernels on a GPU")
    parser.add_argument("device", type=torch.device)
    parser.add_argument("kind", choices=KINDS)
    arguments = parser.parse_args()
    from efficient_densenet.ops import triton

    precision = "tf32" if arguments.kind == "tf32" else "ieee"
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True  # where plain PyTorch runs instead of kernels that cannot start
    torch.ones(1, device=arguments.device).item()
    print(READY, flush=True)
    try:
        found: dict[str, Any] = {"faults": faults(triton, arguments.device, arguments.kind)}
    except torch.OutOfMemoryError:
        found = {"undecided": "the GPU has too little free memory for the check"}
    print(json.dumps(found), flush=True)
