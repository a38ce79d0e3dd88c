"""How many images a second are trained on."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from efficient_densenet.training.module import images_and_targets


class Throughput(Callback):
    """Logs ``train/images_per_second`` of each epoch, over all processes and without validation.

    Lightning's ``ThroughputMonitor`` waits for the GPU at every batch; this one does so once an epoch.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.images = 0
        self.seconds = -_now(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images += len(images_and_targets(batch)[0])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.seconds += _now(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.seconds -= _now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rate = self.images / max(self.seconds + _now(trainer), 1e-9)
        pl_module.log("train/images_per_second", rate * trainer.world_size, sync_dist=True)


def _now(trainer: Trainer) -> float:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
    return time.perf_counter()
