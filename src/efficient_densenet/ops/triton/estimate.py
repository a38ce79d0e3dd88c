"""What a training step's kernels would take on an H100, from bytes and instructions of the compiled code: a model.

For each kernel of each layer three times are counted, and it takes the longest:

- memory: for the bytes that come from memory or go there, each once;
- cache: for the bytes that programs load and store, most of them in the second-level cache;
- instructions: for those that all warps issue: outside of the loop that holds the product, and inside, times its steps.

The model knows no latency, no instruction that waits for another, no multiprocessor that idles at the end of a grid.
It compares two ways to compute the same; docs/gpu.md has what an H200 took.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil, prod
from typing import NamedTuple

from torch import nn

from efficient_densenet.ops.triton import ahead_of_time, machine_code
from efficient_densenet.ops.triton.ahead_of_time import Launched, Shape

TARGET = "sm_90"
MEMORY, CACHE = 2.9e12, 5.5e12
"""Bytes per second from memory and from the second-level cache."""
INSTRUCTIONS = 0.5 * 4 * 132 * 1.755e9
"""Of warps, per second: half of what four schedulers on each of 132 multiprocessors could start."""
_VALUE = 2  # bytes, in half precision
PARTS = {
    False: {
        "1×1 forward": ["norm_relu_conv_kernel"],
        "1×1, gradient of the weight": ["grad_weight_kernel"],
        "1×1, gradient of the prefix": ["grad_x_pointwise_kernel"],
    },
    True: {
        "3×3 forward": ["rectify_kernel", "norm_relu_conv_kernel"],
        "3×3, gradient of the weight": ["grad_weight_kernel"],
        "3×3, gradient of the prefix": ["grad_x_kernel"],
        "finishing bottleneck gradients": ["finish_kernel"],
    },
}
"""The kernels of a convolution without a window and with one, by what they do."""


class Cost(NamedTuple):
    """Milliseconds by each bound, and those that kernels take: the sum of each one's longest."""

    memory: float
    cache: float
    instructions: float
    takes: float


def layers_of(network: nn.Module, images: int, size: int) -> list[Shape]:
    """The norm–relu–convolutions of the dense blocks of a network of this library, at the sizes that they see.

    Args:
        size: of the first block's images; each transition halves it.
    """
    found = []
    for name, m in network.named_modules():
        if isinstance(m, nn.Conv2d) and "denselayer" in name:
            found.append(Shape(name, images, (size, size), m.in_channels, m.out_channels, m.kernel_size[0]))
        elif isinstance(m, nn.Conv2d) and "transition" in name:
            size //= 2
    return found


def costs(layers: Sequence[Shape], kind: str = "bf16") -> dict[str, Cost]:
    """What the layers' kernels cost together, by what they do."""
    device = ahead_of_time.device_of(TARGET)
    found: dict[str, Cost] = {}
    for layer in layers:
        window = prod([layer.kernel] * len(layer.size)) > 1
        launched = ahead_of_time.launched_by(layer, kind, device)
        for part, kernels in PARTS[window].items():
            for kernel in kernels:
                # A bottleneck's prefix is added to, the gradient of its output is written.
                wanted = [k for k in launched if k.name == kernel and k.flags.get("ACCUMULATE", not window) != window]
                both = zip(found.get(part, [0.0] * len(Cost._fields)), _cost(wanted[0]), strict=True)
                found[part] = Cost(*map(sum, both))
    return found


def _cost(launched: Launched) -> Cost:
    values, tile, name = launched.values, launched.tile, launched.name
    vec, rows = values["VEC"], values["rows"]
    channels, outputs = values["channels"] * vec, values.get("outputs", 0) * vec
    taps = prod(values.get(name, 1) for name in ("TD", "TH", "TW"))
    large, small = rows * channels * _VALUE, rows * outputs * _VALUE
    weights = tile.depth * tile.columns
    # Bytes from and to memory; steps of a program; values that a step loads; bytes of the cache beside these.
    memory, steps, loaded, beside = {
        "rectify_kernel": lambda: (2 * large, 0, 0, 2 * large),
        "finish_kernel": lambda: (3 * large, 0, 0, 3 * large),
        "norm_relu_conv_kernel": lambda: (
            large + small, taps * ceil(channels / tile.depth), tile.rows * tile.depth + weights, small
        ),
        "grad_x_kernel": lambda: (
            (2 + values["ACCUMULATE"]) * large + small, taps * ceil(outputs / tile.depth),
            tile.rows * tile.depth + weights, (2 + values["ACCUMULATE"]) * large,
        ),
        "grad_x_pointwise_kernel": lambda: (
            (2 + values["ACCUMULATE"]) * large + small,
            ceil(rows / tile.rows) * ceil(channels / tile.columns) / launched.programs, tile.rows * tile.depth,
            (2 + values["ACCUMULATE"]) * large + launched.programs * weights * _VALUE,
        ),
        "grad_weight_kernel": lambda: (
            large + small, ceil(values["rows_per_part"] / tile.depth), (tile.rows + tile.columns) * tile.depth, 0
        ),
    }[name]()  # fmt: skip
    outside, inside = instructions(launched)
    cache = launched.programs * steps * loaded * _VALUE + beside
    issued = launched.programs * tile.warps * (outside + steps * inside)
    bounds = 1e3 * memory / MEMORY, 1e3 * cache / CACHE, 1e3 * issued / INSTRUCTIONS
    return Cost(*bounds, max(bounds))


def instructions(launched: Launched) -> tuple[float, float]:
    """Of a warp: outside of the loop that holds the product, and in one step of it."""
    if launched.key not in _counted:
        compiled = launched.compile(TARGET)
        code, loop = machine_code.product_loop(compiled)
        products = len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)\.", compiled.asm["ptx"]))
        unrolled = sum(i.name.startswith(("HGMMA", "HMMA")) for i in loop) / products if loop else 1
        # The last instructions are never reached: a branch to itself, and what fills up the code.
        useful = sum(i.name not in ("NOP", "BRA") for i in code) - sum(i.name != "BRA" for i in loop)
        _counted[launched.key] = useful, len(loop) / unrolled
    return _counted[launched.key]


_counted: dict[str, tuple[float, float]] = {}
