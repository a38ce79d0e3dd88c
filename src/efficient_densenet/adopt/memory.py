"""What parts of a network keep for the backward pass: estimates from what they compute.

In values per pixel of a part's input, for one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from torch import nn

from efficient_densenet.adopt.chain import Chain
from efficient_densenet.adopt.decide import RECOMPUTE, SHARED
from efficient_densenet.execution.plan import is_cheap_again

_CHECKPOINTED = ("memory_efficient", "grad_checkpointing", "efficient")


class Values(NamedTuple):
    """Values per pixel of the input that are kept for the backward pass."""

    before: float
    after: float


def of_part(chain: Chain, module: nn.Module, way: str, keep: str) -> Values:
    """Of dense layers, a transition, or both."""
    made = chain.width + sum(chain.made)
    reads = [chain.width + sum(chain.made[:i]) for i in range(len(chain.made))]
    # Of each layer its concatenated input, the bottleneck output, and both again as activations. Libraries that
    # checkpoint keep the inputs of the concatenation, and the rest of it for one layer at a time.
    checkpoints = any(getattr(one, flag, False) for one in module.modules() for flag in _CHECKPOINTED)
    before = after = 0.0
    if chain.made:
        bottlenecks = sum(chain.bottlenecks)
        kept = sum(_kept(chain, module, reads)) if keep == "bottleneck" else 0
        before = (made if checkpoints else 2 * sum(reads)) + 2 * bottlenecks
        after = {"bottleneck": made + kept, "features": made, "inputs": chain.width}[keep]
        after = {SHARED: after, RECOMPUTE: made + bottlenecks}.get(way, before)
    if chain.tail:
        # Of the concatenation that it reads and its activation; an average pool keeps its input. Recomputing, a block
        # keeps what its layers made, and hands out a concatenation that it does not know to be kept behind it.
        before += 2 * made + chain.tail
        recomputed = chain.tail + (0 if chain.made else made)
        after += {SHARED: 0, RECOMPUTE: recomputed}.get(way, 2 * made + chain.tail)
    return Values(before, after)


def of_stem(convolutions: Sequence[Any], keeps_more: bool) -> Values:
    """Of a stem with these convolutions; the image is somebody else's."""
    first = convolutions[0]
    made = [convolution.out_channels / prod(first.stride) for convolution in convolutions]
    # A max pool keeps indices of eight bytes, for a quarter of the pixels in two dimensions.
    indices = 2 * made[-1] / 2 ** len(first.stride)
    after = sum(made) + indices if keeps_more else sum(made[:-1])
    return Values(2 * sum(made) + indices, after)


def _kept(chain: Chain, module: nn.Module, reads: Sequence[int]) -> list[int]:
    """The bottleneck outputs that are kept with `keep="bottleneck"`."""
    taps = max(prod(weight.shape[2:]) for weight in module.parameters() if weight.dim() > 2)
    layers = zip(chain.bottlenecks, reads, chain.made, strict=False)
    return [wide for wide, reads_, made in layers if not is_cheap_again(wide * reads_, taps * wide * made)]
