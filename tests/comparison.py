"""Run one training step and compare everything it produced: the one way in which tests compare networks.

Tolerances, relative to the largest absolute value of each tensor, and why. A gradient that almost vanishes because
large terms cancel (the gain of a norm in front of another norm: the next one undoes any scale) is rounding error, in
the ordinary network too; it is held against a thousandth of the largest gradient of the network instead.

| what is compared                 | tolerance | reason                                               |
|----------------------------------|-----------|------------------------------------------------------|
| ways that promise the same bits  | 0         | same operations in the same order                    |
| two implementations in float64   | 1e-10     | same mathematics, sums in another order              |
| two implementations in float32   | 1e-4      | deep sums; single precision keeps about seven digits |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def training_step(network: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Forward and backward once; return output, input gradient, every parameter gradient and every buffer by name."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    network.zero_grad(set_to_none=True)
    output = network(x)
    (loss or weighted_sum)(output).backward()
    return {"output": output.detach(), "input gradient": x.grad, **gradients(network), **buffers(network)}


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {f"gradient of {k}": p.grad for k, p in network.named_parameters() if p.grad is not None}


def buffers(network: nn.Module) -> dict[str, Tensor]:
    return {f"buffer {k}": b.clone() for k, b in network.named_buffers()}


def weighted_sum(output: Tensor) -> Tensor:
    """A scalar that depends on every output differently and not linearly, so that no error cancels out."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output).to(output.dtype)
    return (output.square() * weights + output).sum()


def assert_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    errors = {}
    largest = {name: e.abs().max().item() for name, e in expected.items()}
    largest_gradient = max((value for name, value in largest.items() if "gradient" in name), default=0)
    for name, e in expected.items():
        difference = (actual[name].double() - e.double()).abs().max().item()
        scale = max(largest[name], 1e-3 * largest_gradient) if "gradient" in name else largest[name]
        limit = TOLERANCE.get(e.dtype, 0) * scale
        if not difference <= limit:
            errors[name] = (difference, limit)
    assert errors == {}
