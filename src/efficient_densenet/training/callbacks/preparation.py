"""The network is there before other callbacks look at it."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class NetworkFirst(Callback):
    """Sets the module up, and so makes its network, before other callbacks: averages of weights copy it in their own
    ``setup``, which Lightning calls before the module's.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.setup(stage)
