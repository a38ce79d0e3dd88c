"""Training within a memory: what fits is chosen before it begins, and where a batch does not fit, that is explained."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from efficient_densenet.adopt import fastest_that_fits, make_efficient
from efficient_densenet.adopt.planner import DoesNotFitError
from efficient_densenet.errors import UserError
from efficient_densenet.training.mistakes import is_out_of_memory
from efficient_densenet.training.module import images_and_targets

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_TYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


class WithinMemory(Callback):
    """Runs the network in the fastest way with which a training step fits into `memory` bytes, as `plan` counts it.

    Where even the smallest way does not hold the batch of a process, it becomes pieces whose gradients are added up, as
    few as possible: an optimiser step has as many images as before, and batch statistics are those of a piece.

    Raises:
        UserError: nothing fits, the network has no dense blocks or recomputes, or the data do not say their
            ``batch_size``.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule
        if stage != "fit":
            return
        if not isinstance(getattr(data, "batch_size", None), int):
            raise UserError("--memory needs data that say their batch_size: give model.network.keep instead")
        if pl_module.network_factory.arguments.get("efficient") == "recompute":
            raise UserError("--memory chooses what the shared buffer keeps: set model.network.efficient to true")
        precision = str(trainer.precision)
        network = pl_module.network
        if precision in _TYPES:  # Lightning will convert it, but not yet
            network = copy.deepcopy(network).to(_TYPES[precision])
        step = partial(
            fastest_that_fits,
            network,
            memory=self.memory,
            optimizer="sgd" if isinstance(pl_module.new_optimizer()[0], torch.optim.SGD) else "adam",
            autocast=_AUTOCAST.get(precision),
        )
        images, image = data.batch_size // trainer.world_size, _image(data)
        try:
            pieces, (keep, reason) = 1, step(batch=(images, *image))
        except DoesNotFitError as error:
            if not error.largest_batch:
                raise
            pieces = next(n for n in range(2, images + 1) if images % n == 0 and images // n <= error.largest_batch)
            keep, reason = step(batch=(images // pieces, *image))
        make_efficient(pl_module.network, keep)
        data.batch_size //= pieces
        trainer.accumulate_grad_batches *= pieces
        if trainer.is_global_zero:
            added = f"; each batch of {images} in {pieces} pieces, whose gradients are added up" if pieces > 1 else ""
            print(f"memory decides: {reason}{added}", flush=True)


def _image(data: Any) -> torch.Size:
    """The shape of an image of the training set."""
    loader = data.train_dataloader()
    with torch.random.fork_rng(devices=[]):
        images, _ = images_and_targets(loader.collate_fn([loader.dataset[0]]))
    return images.shape[1:]


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
