"""Where a batch does not fit into memory."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from efficient_densenet.errors import UserError
from efficient_densenet.training.mistakes import is_out_of_memory
from efficient_densenet.training.module import images_and_targets


class OutOfMemory(Callback):
    """Where a batch does not fit into memory, finds out how many images do, and says it.

    Raises:
        UserError: in place of the error of the device.
    """

    def __init__(self) -> None:
        self.batch: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch = batch

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not is_out_of_memory(exception):
            return
        way_out = "use a smaller --data.init_args.batch_size"
        if self.batch is not None:
            images, targets = images_and_targets(self.batch)
            batch_size, fitting = len(images), _images_that_fit(pl_module, images, targets)
            pieces = trainer.accumulate_grad_batches * -(-batch_size // max(1, fitting))
            way_out = (
                f"{fitting} of {batch_size} images fit: use --data.init_args.batch_size {fitting * trainer.world_size} "
                f"and --trainer.accumulate_grad_batches {pieces}, or less memory for each image with "
                "--model.network.init_args.keep features"
            )
        raise UserError(f"out of memory on {trainer.strategy.root_device}: {way_out}") from exception


def _images_that_fit(module: LightningModule, images: Tensor, targets: Tensor) -> int:
    """By halving: the first number of images with which a step runs through."""
    number = len(images)
    while number > 1:
        number //= 2
        module.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            module.task.loss(module(images[:number]), targets[:number]).backward()
            return number
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    return 0
