"""What happens around the epochs: random numbers, the table of results, and the figures at the end."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from efficient_densenet.errors import UserError
from efficient_densenet.files import replacing
from efficient_densenet.training import plots
from efficient_densenet.training.mistakes import is_out_of_memory


class EpochSeed(Callback):
    """Gives every epoch random numbers of its own, so that a resumed run goes on as the killed one would have.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer.current_epoch + 1)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._begin(checkpoint["epoch"] + 1)

    def _begin(self, epoch: int) -> None:
        random.seed(self.seed + epoch)
        np.random.seed(self.seed + epoch)
        torch.manual_seed(self.seed + epoch)


class EpochTable(Callback):
    """Writes ``metrics.csv`` into the run's folder, one row for each epoch.

    The rows are part of the checkpoint: a resumed run keeps those of the epochs before it, and no others.

    Args:
        print_rows: also print each row as a line, for terminals without a progress bar.
    """

    def __init__(self, print_rows: bool = False) -> None:
        self.print_rows = print_rows
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name != "train/loss_step"}
        measured = {name: float(f"{value:.6g}") for name, value in sorted(metrics.items())}  # they are single precision
        self.rows.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **measured})
        folder = trainer.log_dir  # asked on every process, for they agree on it together
        if not trainer.is_global_zero:
            return
        if folder is not None:
            self._write(Path(folder) / "metrics.csv")
        if self.print_rows:
            values = "  ".join(f"{name} {value:.4g}" for name, value in measured.items())
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {values}", flush=True)

    def _write(self, path: Path) -> None:
        columns = dict.fromkeys(name for row in self.rows for name in row)
        with replacing(path) as beside, beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)


class Announcement(Callback):
    """Says at the beginning and at the end where the results of a run are."""

    def __init__(self) -> None:
        self.folder: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._say(trainer, stage, "this run writes to")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._say(trainer, stage, "this run is in")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # The processes do not agree on anything any more: the folder is what it was.
        if self.folder is not None:
            way_on = "; --ckpt_path last goes on" if list(Path(self.folder).glob("checkpoints/last.ckpt")) else ""
            print(f"this run was stopped; it is in {self.folder}{way_on}", flush=True)

    def _say(self, trainer: Trainer, stage: str, what: str) -> None:
        folder = trainer.log_dir  # asked on every process, for they agree on it together
        if stage == "fit" and trainer.is_global_zero and folder is not None:
            self.folder = folder
            print(f"{what} {folder}", flush=True)


class OutOfMemory(Callback):
    """Where a batch does not fit into memory, finds out how many images do, and says it.

    Raises:
        UserError: in place of the error of the device.
    """

    def __init__(self) -> None:
        self.batch: tuple[Tensor, Tensor] | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        self.batch = batch

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not is_out_of_memory(exception):
            return
        way_out = "use a smaller --data.init_args.batch_size"
        if self.batch is not None:
            batch_size, fitting = len(self.batch[0]), _images_that_fit(pl_module, *self.batch)
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
            F.cross_entropy(module(images[:number]), targets[:number]).backward()
            return number
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    return 0


class Figures(Callback):
    """Draws the table's curves when training ends, and the confusion matrix of every run's last evaluation.

    Args:
        table: what is drawn.
    """

    def __init__(self, table: EpochTable) -> None:
        self.table = table

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.log_dir
        if not trainer.is_global_zero or folder is None or trainer.interrupted:
            return
        if stage == "fit" and self.table.rows:
            plots.curves(self.table.rows, Path(folder) / "curves.png")
        if pl_module.confusion_matrix is not None:
            images = trainer.datamodule.splits.tested if stage == "test" else "validation images"
            plots.confusion_matrix(
                pl_module.confusion_matrix,
                pl_module.class_names,
                f"Confusion matrix, {images}",
                Path(folder) / f"confusion_matrix_{'test' if stage == 'test' else 'validation'}.png",
            )
