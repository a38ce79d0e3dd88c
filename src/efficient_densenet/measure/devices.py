"""Where a measurement runs: one process, or one of several that share a batch by DistributedDataParallel."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from efficient_densenet.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")


def check(device: str, num_devices: int, batch_size: int) -> None:
    """Raise `UserError` where there are not that many devices, or fewer images than devices."""
    available = torch.cuda.device_count()
    if device == "cuda" and available < num_devices:
        way_out = "use --num-devices with that number, or --device cpu" if available else "use --device cpu"
        raise UserError(f"PyTorch sees {available} CUDA devices here, not {num_devices}: {way_out}")
    if batch_size < num_devices:
        raise UserError(
            f"a batch of {batch_size} cannot be split over {num_devices} devices: use a larger --batch-size"
        )


@dataclass(frozen=True)
class Place:
    """One device of `size`, in a process of its own where there are several.

    Attributes:
        device_type: ``"cpu"`` or ``"cuda"``.
        rank: which of the devices.
        size: how many devices share the batch.
        store: the file through which the processes find each other; needed where `size` is above 1.
        threads: CPU threads of the process; None: as they are.
    """

    device_type: str
    rank: int = 0
    size: int = 1
    store: str | None = None
    threads: int | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.rank) if self.device_type == "cuda" else torch.device("cpu")

    def enter(self) -> None:
        """Make this the current device of the process, and join the group."""
        if self.device_type == "cuda":
            torch.cuda.set_device(self.device)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.size > 1:
            on_gpu = self.device_type == "cuda"
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                init_method=f"file://{self.store}",
                rank=self.rank,
                world_size=self.size,
                device_id=self.device if on_gpu else None,
            )

    def share(self, batch: Tensor) -> Tensor:
        """The part of a batch ``(N, ...)`` that belongs here, on this device."""
        return batch.tensor_split(self.size)[self.rank].to(self.device)

    def gather(self, x: Tensor) -> list[Tensor]:
        """What every place of the group gives here, on this device; the tensors may differ in shape."""
        if self.size == 1:
            return [x]
        found: list[Tensor | None] = [None] * self.size
        dist.all_gather_object(found, x.cpu())
        return [tensor.to(self.device) for tensor in found if tensor is not None]

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as it is trained here: gradients are averaged over all devices."""
        if self.size == 1:
            return network
        return DistributedDataParallel(network, device_ids=[self.rank] if self.device_type == "cuda" else None)

    def synchronize(self) -> None:
        """Wait until this device has done all its work."""
        if self.device_type == "cuda":
            torch.cuda.synchronize(self.device)

    def meet(self) -> None:
        """Wait until all devices have done all their work and come here."""
        self.synchronize()
        if self.size > 1:
            dist.barrier()
