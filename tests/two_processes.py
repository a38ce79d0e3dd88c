"""What two processes on one CPU compute together, for the tests of distributed training, all in one go."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
from comparison import buffers, gradients, weighted_sum
from forks import preload
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from twins import BOTTLENECK, IMAGENET, PLAIN, images, pair

from efficient_densenet.execution import KEEP

preload("efficient_densenet", "torch.distributed.fsdp", "torch._dynamo")
EMPTY = "without images in one process"
SYNCHRONISED = {"plain": PLAIN, "bottleneck": BOTTLENECK, "imagenet stem": IMAGENET}
SHARDS = (slice(0, 2), slice(2, 5))  # of five images; of unequal size, as the last batch of an epoch may be
NOTHING_IN_ONE = (slice(0, 0), slice(0, 5))


def run(folder: Path) -> list[dict[str, dict]]:
    """The results of `_work`, for each of the two processes."""
    torch.multiprocessing.start_processes(_work, (str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def loss(output: Tensor, shard: slice) -> Tensor:
    """Different for every image of the whole batch, so that the losses of the shards add up to that of the batch."""
    weights = torch.linspace(-1, 1, 5, dtype=output.dtype)[shard].view(-1, 1)
    return (output.square() * weights + output).sum()


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {
        "data parallel": {name: _data_parallel(rank, name) for name in ("ordinary", *KEEP)},
        "sharded": {keep: _sharded(rank, keep) for keep in KEEP},
        "synchronised": {f"{name} {keep}": _synchronised(rank, name, keep) for name in SYNCHRONISED for keep in KEEP}
        | {f"{name} {EMPTY}": _synchronised(rank, name, "features", shards=NOTHING_IN_ONE) for name in SYNCHRONISED},
        "frozen": _synchronised(rank, "bottleneck", "bottleneck", training=False),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def _data_parallel(rank: int, name: str) -> dict[str, Tensor]:
    """Two steps, for before the second DistributedDataParallel sends the buffers of the first process around."""
    ordinary, efficient = pair(IMAGENET, "bottleneck" if name == "ordinary" else name)
    network = ordinary if name == "ordinary" else efficient
    wrapped = DistributedDataParallel(network)
    for _ in range(2):
        weighted_sum(wrapped(images(6)[rank::2])).backward()
    return gradients(network) | buffers(network)


def _sharded(rank: int, keep: str) -> dict[str, Tensor]:
    """Two steps as above, under FSDP: each block by itself, and the rest."""
    _, network = pair(IMAGENET, keep)
    mesh = init_device_mesh("cpu", (2,))
    for block in (network.features.denseblock1, network.features.denseblock2):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for _ in range(2):
        weighted_sum(network(images(6)[rank::2])).backward()
    return {name: gradient.full_tensor() for name, gradient in gradients(network).items()}


def _synchronised(rank: int, name: str, keep: str, training: bool = True, shards: tuple[slice, slice] = SHARDS) -> dict:
    """One step with SyncBatchNorm, and how many collective operations forward and backward took.

    SyncBatchNorm itself refuses to run on a CPU: nothing here calls it.
    """
    _, efficient = pair(SYNCHRONISED[name], keep, training)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(efficient)
    x = images(5)[shards[rank]].requires_grad_()
    gather, reduce = distributed.all_gather_into_tensor, distributed.all_reduce
    with (
        mock.patch.object(distributed, "all_gather_into_tensor", side_effect=gather) as gathered,
        mock.patch.object(distributed, "all_reduce", side_effect=reduce) as reduced,
    ):
        output = network(x)
        collectives = [gathered.call_count, reduced.call_count]
        loss(output, shards[rank]).backward()
        collectives += [gathered.call_count, reduced.call_count]
    return {
        "collectives": collectives,
        "each": {"output": output.detach(), "input gradient": x.grad},
        "summed": gradients(network),
        "same": buffers(network),
    }
