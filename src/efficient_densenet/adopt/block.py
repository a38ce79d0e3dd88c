"""A dense block from layers of one's own, on the shared buffer."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from efficient_densenet.adopt.decide import Adoption, decide, look_now
from efficient_densenet.adopt.run import run_as
from efficient_densenet.adopt.tools import needs_ordinary
from efficient_densenet.errors import UserError
from efficient_densenet.execution import Keep, check_keep


class _Block(nn.ModuleList):
    """Its definition."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = torch.cat([x, layer(x)], 1)
        return x


_adoptions: WeakKeyDictionary[nn.Module, Adoption] = WeakKeyDictionary()  # by the first layer


def dense_block(x: Tensor, layers: Iterable[nn.Module], keep: Keep = "bottleneck") -> Tensor:
    """Run dense layers on one shared buffer, in a network of one's own.

    It computes ``for layer in layers: x = torch.cat([x, layer(x)], 1)``. Compiled or traced, it runs as that.

    Shapes: ``(N, C_0, *spatial)`` → ``(N, C_0 + Σk, *spatial)``, the input's channels first, laid out as `x` is.

    Args:
        x: the block's input.
        layers: modules that compute norm, relu and convolution, once or twice, and perhaps dropout, such as
            ``nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, k, 3, padding=1, bias=False))``.
        keep: as in `make_efficient`.

    Raises:
        UserError: `keep` is no such word, or a layer computes something else, or does not fit the channels before it.
    """
    check_keep(keep)
    block = _Block(layers)
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or needs_ordinary(x) is not None:
        return block(x)
    if not len(block):
        raise UserError("these modules are no dense block: there are none")
    adoption = _adoptions.setdefault(block[0], Adoption("shared", keep, "dense_block", "x"))
    adoption.keep = keep
    chain, reason = look_now([block], adoption)
    if chain is None:
        raise UserError(f"these modules are no dense block: {reason}")
    if x.shape[1] != chain.width:
        raise UserError(f"the first layer reads {chain.width} channels, and the input has {x.shape[1]}")
    decision = decide(x, [block], adoption, own_hooks=True)
    return run_as(decision, x, [block], adoption, lambda: block(x))
