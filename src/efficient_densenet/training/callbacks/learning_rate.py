"""A learning rate that is found before training begins."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder

from efficient_densenet.errors import UserError

_FEWEST_STEPS = 20  # Lightning leaves out the first ten and the last one


class FindLearningRate(LearningRateFinder):
    """Lightning's range test before the first epoch: the rate at which the loss falls the fastest takes the place of
    the optimiser's. The rates of layers and the schedule follow it. A resumed run goes on with the rate that was found.

    Args:
        min_lr: the smallest rate that is tried.
        max_lr: the largest.
        num_training_steps: how many are tried, one a step.
    """

    def __init__(self, min_lr: float = 1e-6, max_lr: float = 1.0, num_training_steps: int = 100) -> None:
        super().__init__(min_lr, max_lr, num_training_steps, update_attr=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.found_learning_rate is not None:
            return
        self._num_training_steps = min(self._num_training_steps, int(trainer.estimated_stepping_batches))
        if self._num_training_steps < _FEWEST_STEPS:
            raise UserError(
                f"a learning rate is found in {_FEWEST_STEPS} steps or more, and the run has fewer: train for more "
                "epochs, or give one with model.optimizer.lr"
            )
        self.lr_find(trainer, pl_module)
        found = None if self.optimal_lr is None else self.optimal_lr.suggestion()
        if found is None:
            raise UserError(
                f"no learning rate between {self._min_lr:g} and {self._max_lr:g} made the loss fall: give one with "
                "model.optimizer.lr, or other limits"
            )
        pl_module.found_learning_rate = found
        trainer.strategy.setup_optimizers(trainer)
        if trainer.is_global_zero:
            print(f"the learning rate is {found:.3g}, at which the loss falls the fastest", flush=True)
