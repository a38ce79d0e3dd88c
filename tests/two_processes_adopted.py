"""What two processes on one CPU compute with models that were made efficient, all in one go."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import timm.layers
import torch
from comparison import buffers, gradients, weighted_sum
from forks import preload
from others import images, monai_small, pair, timm_small, torchvision_small
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from efficient_densenet import make_efficient

preload("efficient_densenet", "torch.distributed.fsdp", "torch._dynamo", "torchvision", "timm", "monai.networks.nets")
MODELS = {"torchvision": torchvision_small, "timm": timm_small, "MONAI": monai_small}
WAYS = ("ordinary", "adopted before", "adopted after")


def run(folder: Path) -> list[dict[str, dict]]:
    """The results of `_work`, for each of the two processes."""
    torch.multiprocessing.start_processes(_work, (str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def features_without_final_norm(network: nn.Module) -> nn.Module:
    """SyncBatchNorm itself refuses to run on a CPU, and here nothing else calls it."""
    delattr(network.features, "norm5")
    return network.features


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {
        "data parallel": {f"{name} {way}": _data_parallel(rank, name, way) for name in MODELS for way in WAYS},
        "sharded": {way: _sharded(rank, way) for way in WAYS},
        "synchronised": {f"{name} {way}": _synchronised(rank, name, way) for name in MODELS for way in WAYS[1:]},
    }
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def _model(name: str, way: str) -> nn.Module:
    ordinary, efficient = pair(MODELS[name](), "features")
    return efficient if way == "adopted before" else ordinary


def _data_parallel(rank: int, name: str, way: str) -> dict[str, Tensor]:
    """Two steps, for before the second DistributedDataParallel sends the buffers of the first process around."""
    network = _model(name, way)
    wrapped = DistributedDataParallel(network)
    if way == "adopted after":
        make_efficient(wrapped, "features")
    for _ in range(2):
        weighted_sum(wrapped(images(n=6)[rank::2])).backward()
    return gradients(network) | buffers(network)


def _sharded(rank: int, way: str) -> dict[str, Tensor]:
    network = _model("MONAI", way)  # PyTorch 2.11 cannot shard torchvision's blocks, which are dictionaries of modules
    mesh = init_device_mesh("cpu", (2,))
    for block in (network.features.denseblock1, network.features.denseblock2):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    if way == "adopted after":
        make_efficient(network, "features")
    for _ in range(2):
        weighted_sum(network(images(n=6)[rank::2])).backward()
    return {name: gradient.full_tensor() for name, gradient in gradients(network).items()}


def _synchronised(rank: int, name: str, way: str) -> dict[str, dict[str, Tensor]]:
    """One step with SyncBatchNorm: half of the images each."""
    convert = timm.layers.convert_sync_batchnorm if name == "timm" else nn.SyncBatchNorm.convert_sync_batchnorm
    network = convert(features_without_final_norm(_model(name, way)))
    if way == "adopted after":
        make_efficient(network, "features")
    x = images(n=4)[2 * rank : 2 * rank + 2].requires_grad_()
    output = network(x)
    output.square().sum().backward()
    return {
        "each": {"output": output.detach(), "input gradient": x.grad},
        "summed": gradients(network),
        "same": buffers(network),
    }
