"""Every epoch: its random numbers, and its row in the table of results."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from efficient_densenet.files import replacing


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
