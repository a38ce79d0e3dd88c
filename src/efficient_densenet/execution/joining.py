"""Modules that run one after the other, but some of them as one, so that nothing need be kept of what lies between."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from efficient_densenet.execution import Reader, run_reader, shared
from efficient_densenet.execution.hooks import has_hooks
from efficient_densenet.execution.parts import Head, Stem, stem_obstacle

StemReader = Callable[[Sequence[nn.Module]], tuple[Stem, int] | None]
"""The stem that these modules begin with, if they do, and how many of them it takes."""


def run_in_order(
    x: Tensor,
    modules: Sequence[nn.Module],
    read_stem: StemReader,
    can_join: Callable[[nn.Module, nn.Module], bool],
    keep: str,
    head: Head | None = None,
) -> Tensor:
    """Run `modules` one after the other on the shared buffer: a stem as one, a transition with the block before it.

    Args:
        x: what the first one takes.
        modules: called as they are, where nothing joins them.
        read_stem: see `StemReader`.
        can_join: whether the first module is a block that also takes the second one, its transition, as an argument.
        keep: as for the blocks.
        head: runs behind the last module, which takes it as an argument.
    """
    rest = list(modules)
    while rest:
        found = read_stem(rest)
        if found is not None:
            stem, taken = found
            x = _run_stem(x, stem, keep)
            del rest[:taken]
            continue
        module = rest.pop(0)
        if not rest and head is not None:
            x = module(x, head)
        elif rest and can_join(module, rest[0]) and not has_hooks([module, rest[0]]):
            x = module(x, rest.pop(0))
        elif isinstance(module, _BatchNorm) and x.device.type == "cpu":
            # The sums of PyTorch's batch norm are in double precision in this layout, and not in channels-last.
            x = module(x.contiguous())
        else:
            x = module(x)
    return x


def _run_stem(x: Tensor, stem: Stem, keep: str) -> Tensor:
    obstacle = stem_obstacle(stem)
    if obstacle is None:
        return shared.stem(x, stem, keep)
    warnings.warn(f"the stem keeps more than it needs: {obstacle}", stacklevel=3)
    return run_reader([stem.conv(x)], Reader(stem.norm, stem.relu, stem.pool, stem.fused), True)
