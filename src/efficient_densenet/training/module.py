"""What is trained and how one step of it goes: network, loss, optimiser and schedule, and what is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from efficient_densenet.errors import UserError
from efficient_densenet.training.checkpointing import differences
from efficient_densenet.training.resuming import follow_configuration
from efficient_densenet.weights.loading import load_weights


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)


class Classifier(LightningModule):
    """Trains a network to tell classes of images apart, with the cross entropy of its logits.

    Logged for each of train, val and test: ``loss``, ``top1`` and, with more than five classes, ``top5`` (fractions,
    not percentages); and the learning rate ``lr``. ``loss`` is always the plain cross entropy; with `label_smoothing`,
    what training minimises is logged as ``train/loss_smoothed``.

    Args:
        network: makes the network, images ``(N, in_channels, H, W)`` → logits ``(N, num_classes)``. It is called with
            the ``in_channels`` and ``num_classes`` of the data, which are known once the data are prepared.
        optimizer: makes the optimiser from the parameters; weight decay is its affair.
        scheduler: makes the learning-rate schedule from the optimiser, for example
            ``torch.optim.lr_scheduler.MultiStepLR``.
        schedule_interval: whether the schedule counts epochs or optimiser steps.
        label_smoothing: share of the target that is spread evenly over all classes, in [0, 1].
        channels_last: keep images and weights as NHWC in memory, which suits tensor cores.
        weights: what the network starts from: a file with the weights of a DenseNet, or a name such as
            torchvision:densenet121, timm:densenet121.ra_in1k, hf:owner/name or a URL; where the classes differ, the
            classifier is a new one.
        stop_when_not_finite: end the run where the loss becomes infinite or not a number.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        optimizer: OptimizerCallable = _sgd,
        scheduler: LRSchedulerCallable | None = None,
        schedule_interval: Literal["epoch", "step"] = "epoch",
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        weights: str | None = None,
        stop_when_not_finite: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise UserError(f"label_smoothing must be a number from 0 to 1, not {label_smoothing!r}")
        self.make_network: Callable[..., nn.Module] = network
        self.network: nn.Module | None = None
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.schedule_interval = schedule_interval
        self.label_smoothing = label_smoothing
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.weights = weights
        self.keeps_classes = False
        """Whether the weights must have the classes of the data; they need not where training goes on."""
        self.stop_when_not_finite = stop_when_not_finite
        self.loss_is_finite: Tensor | None = None
        """Whether all losses were since it was looked at: on the device, since looking at each would stop a GPU."""
        self.confusion_matrix: Tensor | None = None
        """Of the last evaluation: counts (class, predicted class)."""

    def setup(self, stage: str) -> None:
        """Read from the data how many classes there are, and make the measures."""
        data = self.trainer.datamodule
        self.class_names: list[str] = list(data.class_names)
        if len(self.class_names) < 2:
            raise UserError(
                f"the data have a single class ({', '.join(self.class_names)}); give images of at least two"
            )
        self.preprocessing: dict[str, Any] = data.preprocessing.to_dict()
        self.measures = nn.ModuleDict(
            {stage: _measures(len(self.class_names)) for stage in ("train_", "val_", "test_")}
        )
        self.confusion = MulticlassConfusionMatrix(len(self.class_names))

    def configure_model(self) -> None:
        if self.network is None:
            network = self._new_network()
            if self.weights is not None:
                load_weights(network, self.weights, new_head=not self.keeps_classes)
            self.network = network.to(memory_format=self.memory_format)

    def _new_network(self) -> nn.Module:
        data = self.trainer.datamodule
        try:
            network = self.make_network(in_channels=data.in_channels, num_classes=data.num_classes)
        except TypeError as error:
            if not any(name in str(error) for name in ("in_channels", "num_classes")):
                raise
            raise UserError(f"model.network must take in_channels and num_classes ({error})") from error
        if not isinstance(network, nn.Module):
            raise UserError(f"model.network must make a torch.nn.Module, not a {type(network).__name__}")
        return network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.contiguous(memory_format=self.memory_format))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits, targets = self._logits(batch), batch[1]
        loss = plain = F.cross_entropy(logits, targets)
        if self.label_smoothing > 0:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
            self._log_loss("train/loss_smoothed", loss, len(targets))
        self.log("train/loss_step", loss.detach(), on_step=True, on_epoch=False, prog_bar=True)
        self.log("lr", self.optimizers().param_groups[0]["lr"], on_step=False, on_epoch=True, sync_dist=True)
        self._measure("train", logits, targets, plain)
        finite = loss.detach().isfinite()
        self.loss_is_finite = finite if self.loss_is_finite is None else self.loss_is_finite & finite
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer = self.trainer
        due = trainer.is_last_batch or (batch_idx + 1) % max(1, trainer.log_every_n_steps) == 0
        if not self.stop_when_not_finite or not due or self.loss_is_finite is None:
            return
        finite, self.loss_is_finite = bool(self.loss_is_finite), None
        if not trainer.strategy.reduce_boolean_decision(finite, all=True):
            raise UserError(
                f"the loss became infinite or not a number in epoch {trainer.current_epoch + 1}, at or before step "
                f"{trainer.global_step}, and the run was stopped: lower the learning rate or clip the gradients "
                "(--trainer.gradient_clip_val); --model.stop_when_not_finite false goes on regardless"
            )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        logits, targets = self._logits(batch), batch[1]
        self._measure(stage, logits, targets, F.cross_entropy(logits, targets))
        self.confusion.update(logits, targets)

    def on_validation_epoch_end(self) -> None:
        self._keep_confusion_matrix()

    def on_test_epoch_end(self) -> None:
        if self.trainer.is_global_zero:
            print(f"measured on {len(self.trainer.datamodule.splits.test)} {self.trainer.datamodule.splits.tested}")
        self._keep_confusion_matrix()

    def _keep_confusion_matrix(self) -> None:
        self.confusion_matrix = self.confusion.compute().cpu()  # of all processes together
        self.confusion.reset()

    def _logits(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = self(batch[0])
        if logits.shape[1:] != (len(self.class_names),):
            raise UserError(
                f"the network gives {' × '.join(map(str, logits.shape[1:]))} outputs for an image, and the data have "
                f"{len(self.class_names)} classes: set the network's number of classes to {len(self.class_names)}"
            )
        return logits

    def _measure(self, stage: str, logits: Tensor, targets: Tensor, loss: Tensor) -> None:
        self._log_loss(f"{stage}/loss", loss, len(targets))
        measures = self.measures[f"{stage}_"]
        measures.update(logits.detach(), targets)
        for name, measure in measures.items():
            self.log(f"{stage}/{name}", measure, on_step=False, on_epoch=True, prog_bar=name == "top1")

    def _log_loss(self, name: str, loss: Tensor, batch_size: int) -> None:
        self.log(name, loss.detach(), on_step=False, on_epoch=True, batch_size=batch_size, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self._new_optimizer()
        if scheduler is None:
            return optimizer
        schedule = {"scheduler": scheduler, "interval": self.schedule_interval, "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _new_optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = self.optimizer(self.network.parameters())
        return optimizer, None if self.scheduler is None else self.scheduler(optimizer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Lightning divides each piece's loss by accumulate_grad_batches, also where an epoch ends before a batch has
        # all its pieces. The gradient shall be the average over the pieces there are.
        planned = self.trainer.accumulate_grad_batches
        pieces = self.trainer.fit_loop.epoch_loop.batch_idx % planned + 1
        if pieces != planned:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, planned / pieces)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_names"] = self.class_names
        checkpoint["preprocessing"] = self.preprocessing

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        different = differences(checkpoint["state_dict"], self.state_dict())
        if different:
            raise UserError(
                f"the checkpoint {self.trainer.ckpt_path} is of another network than the configuration's: {different}; "
                "give the configuration that it was trained with, or start a new run with its --model.weights"
            )
        if self.trainer.state.fn == TrainerFn.FITTING:
            for name, (old, new) in follow_configuration(checkpoint, *self._new_optimizer()).items():
                if self.trainer.is_global_zero:
                    print(f"resuming with {name} {new}, as configured; the checkpoint has {old}")


def _measures(num_classes: int) -> MetricCollection:
    tops = (1, 5) if num_classes > 5 else (1,)
    return MetricCollection({f"top{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro") for k in tops})
