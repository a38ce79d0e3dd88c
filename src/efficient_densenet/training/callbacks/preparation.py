"""The network is there before other callbacks look at it."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class NetworkFirst(Callback):
    """Makes the network, for averages of weights copy the module when they are set up, before the module itself is."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.setup(stage)
