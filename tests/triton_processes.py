"""What two processes on GPUs compute together, for `test_ops_triton`: on one GPU each, or both on the same."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from efficient_densenet import DenseNet

SEPARATE = torch.cuda.device_count() > 1
"""NCCL wants a GPU for each process; Gloo does without, but has no SyncBatchNorm there."""
KINDS = ["data parallel", *["synchronised"] * SEPARATE]
OPTIONS = {"growth_rate": 12, "block_config": (2, 3), "num_init_features": 24, "bn_size": 4, "num_classes": 10}


def run(folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    """For each process, kind and way to run: all gradients and buffers after two steps."""
    torch.multiprocessing.spawn(_work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _work(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank if SEPARATE else 0)
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]
    distributed.init_process_group(
        "nccl" if SEPARATE else "gloo",
        store=distributed.FileStore(f"{folder}/store", 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    found = {
        f"{kind}, {way}": _steps(rank, kind, way == "efficient") for kind in KINDS for way in ("ordinary", "efficient")
    }
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def _steps(rank: int, kind: str, efficient: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    network: nn.Module = DenseNet(input_size=64, **OPTIONS, efficient=efficient).cuda()
    if kind == "synchronised":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    wrapped = DistributedDataParallel(network)
    images, labels = torch.randn(8, 3, 64, 64)[rank::2].cuda(), torch.arange(8)[rank::2].cuda()
    for _ in range(2):
        F.cross_entropy(wrapped(images), labels).backward()
    gradients = {f"gradient of {name}": p.grad.cpu() for name, p in network.named_parameters() if p.grad is not None}
    return gradients | {name: buffer.cpu() for name, buffer in network.named_buffers()}
