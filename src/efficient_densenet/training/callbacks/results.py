"""Where the results of a run are, and its figures."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from efficient_densenet.training import plots
from efficient_densenet.training.callbacks.epochs import EpochTable


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
            images = pl_module.facts.tested if stage == "test" else "validation images"
            plots.confusion_matrix(
                pl_module.confusion_matrix,
                pl_module.class_names,
                f"Confusion matrix, {images}",
                Path(folder) / f"confusion_matrix_{'test' if stage == 'test' else 'validation'}.png",
            )
