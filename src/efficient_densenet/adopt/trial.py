"""Try whether a module does what its structure suggests, with random weights, without touching its own.

A name or a structure promises nothing: a layer may add a residual, scale its output, or use its parts in another
order. So the module's own forward runs beside the function that its parts make, as plain PyTorch operations, on a few
random pixels: in evaluation and in training, with dropout from the same seed, and the buffers are compared too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from efficient_densenet.adopt import read
from efficient_densenet.execution import Reader, layer_by_layer
from efficient_densenet.execution.hooks import modes_kept, no_hooks

_CPU = torch.device("cpu")
_SIZE = (5, 4, 3)  # pixels: odd and even, and enough for a 3×3 window to have an inside
_TOLERANCE = 1e-3  # relative, in float32: another function is off by more than a tenth


def disagreement(block: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> str | None:
    """How the block's own `forward` differs from the one that `read.block` makes of its parts; None if it does not.

    Nothing of the block changes. Its parameters are random in the trial, so that no zero hides a difference.
    """
    layers = read.block(block)
    readers = [reader for layer in layers for reader in layer.readers]
    dims = len(readers[0].conv.kernel_size)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, readers[0].conv.in_channels, *_SIZE[:dims], generator=generator, device=_CPU)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), no_hooks(block), modes_kept(block):
        state = {f"block.{name}": _random(name, t, generator) for name, t in _state(block)}
        for training in (False, True):
            for module in block.modules():
                # One process alone cannot try how norms agree with those of other processes.
                module.training = training and not isinstance(module, nn.SyncBatchNorm)
            try:
                own = _run(_Forward(block, forward), state, x)
                rebuilt = _run(_Forward(block, _rebuilt), state, x)
            except Exception as error:  # whatever it is: the module stays as it is, and the report says why
                return f"it could not be tried: {type(error).__name__}: {error}"
            if own.keys() != rebuilt.keys():
                return "its output is no tensor of features"
            for name, expected in own.items():
                if not _agree(rebuilt[name], expected):
                    what = "its output" if name == "output" else name.removeprefix("block.")
                    return f"{what} is another than that of dense layers made of the same parts"
        if any(_draws_random_numbers(reader, generator) for reader in readers):
            return "its norm or activation is random"  # and cannot be computed again
    return None


class _Forward(nn.Module):
    """A function of a block and an input, as a module, so that the block's tensors can be replaced in it."""

    def __init__(self, block: nn.Module, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.block = block
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.block, x)


def _rebuilt(block: nn.Module, x: Tensor) -> Tensor:
    return layer_by_layer(x, read.block(block), efficient=False)


def _run(forward: nn.Module, state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """The output, and the buffers after it."""
    state = {name: t.clone() if t.dim() < 2 else t for name, t in state.items()}  # the small ones may move
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = functional_call(forward, state, (x.clone(),))
    found = {name: state[name] for name, _ in forward.named_buffers() if name in state}
    return {"output": output, **found} if isinstance(output, Tensor) else found


def _agree(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return bool((a.double() - b.double()).abs().max() <= _TOLERANCE * b.double().abs().max())


def _state(block: nn.Module) -> list[tuple[str, Tensor]]:
    return [*block.named_parameters(), *block.named_buffers()]


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype, device=_CPU)
    values = torch.rand(like.shape, generator=generator, device=_CPU)
    if like.dim() < 2:
        return values - 0.5 if name.endswith(("bias", "mean")) else values + 0.5
    fan_in = like[0].numel()
    return values.sub_(0.5).mul_((12 / fan_in) ** 0.5)


def _draws_random_numbers(reader: Reader, generator: torch.Generator) -> bool:
    """In training, as the modules of its block are now."""
    both = nn.ModuleList([reader.norm] if reader.fused else [reader.norm, reader.relu])
    state = {f"block.{name}": _random(name, t, generator) for name, t in _state(both)}
    x = torch.zeros(2, reader.conv.in_channels, *_SIZE[: len(reader.conv.kernel_size)], device=_CPU)
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        functional_call(_Forward(both, lambda modules, x: nn.Sequential(*modules)(x)), state, (x,))
        return not torch.equal(before, torch.get_rng_state())
