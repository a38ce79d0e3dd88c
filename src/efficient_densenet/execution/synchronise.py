"""Batch statistics of several processes taken together, as SyncBatchNorm has them.

Each produced channel crosses the network once in forward (mean, variance, count) and once in backward (the two
corrections): linear in depth, where norms that synchronise one by one send every channel once per reader.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from efficient_densenet.ops.reference import Statistics, merge


def all_statistics(local: Statistics, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number of values per channel over all processes of `group` (its name; "": this one alone)."""
    mean, variance = local
    counts = mean.new_full((), float(count))
    if not group:
        return mean, variance, counts
    own = torch.cat([mean, variance, counts.view(1)])
    process_group = _resolve(group)
    everyone = own.new_empty(process_group.size() * len(own))
    dist.all_gather_into_tensor(everyone, own, process_group)
    means, variances, parts = everyone.view(-1, len(own)).split([len(mean), len(mean), 1], 1)
    return *merge(means, variances, parts.squeeze(1)), parts.sum()


def all_sums(local: Tensor, group: str) -> Tensor:
    """The sum over all processes of `group`."""
    if not group:
        return local
    total = local.clone()
    dist.all_reduce(total, group=_resolve(group))
    return total


def _resolve(name: Any) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)
