"""Batch statistics over several processes, as SyncBatchNorm has them.

Each produced channel crosses the network once in forward (mean, variance, count) and once in backward (the two
corrections): linear in depth, where norms that synchronise one by one send every channel once per reader.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from efficient_densenet.ops.protocol import Statistics


def share_statistics(local: Statistics, count: int, total: Tensor, group: str) -> None:
    """Replace statistics of `count` values by those over all processes of `group` (its name), `total` by their number.

    Both are overwritten.
    """
    mean, variance = local
    own = torch.cat([mean, variance, mean.new_full((1,), float(count))])
    process_group = _resolve(group)
    everyone = own.new_empty(process_group.size() * len(own))
    dist.all_gather_into_tensor(everyone, own, process_group)
    means, variances, counts = everyone.view(-1, len(own)).split([len(mean), len(mean), 1], 1)
    merged = Statistics.merged(means, variances, counts.squeeze(1))
    mean.copy_(merged.mean)
    variance.copy_(merged.variance)
    total.copy_(counts.sum())


def all_sums(local: Tensor, group: str) -> Tensor:
    """The sum over all processes of `group`; "" is this one alone."""
    if not group:
        return local
    total = local.clone()
    dist.all_reduce(total, group=_resolve(group))
    return total


def _resolve(name: Any) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)
