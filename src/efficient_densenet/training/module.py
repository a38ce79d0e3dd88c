"""What is trained and how one step of it goes: network, loss, optimiser and schedule, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from efficient_densenet.errors import UserError
from efficient_densenet.training.checkpointing import differences
from efficient_densenet.training.facts import facts_of, numbered, refuse_other_classes
from efficient_densenet.training.freezing import Frozen
from efficient_densenet.training.network_factory import factory_of
from efficient_densenet.training.networks import NAME_IN_CHECKPOINT, start_from
from efficient_densenet.training.optimisation import make_optimizer, make_schedule
from efficient_densenet.training.resuming import follow_configuration
from efficient_densenet.training.tasks import task_for


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)


class Classifier(LightningModule):
    """Trains a network to tell classes of images apart: one class an image, or several labels (`tasks`).

    Logged for each of train, val and test: ``loss``, and ``top1`` and ``top5`` (fractions, not percentages) or, with
    several labels, ``auroc`` and ``ap``; and the learning rate ``lr``, that of the fastest layers. ``loss`` is always
    the plain cross entropy; where training minimises something else, with `label_smoothing` or `class_weights`, that is
    ``train/loss_minimised``.

    Args:
        network: makes the network, images ``(N, in_channels, H, W)`` → logits ``(N, num_classes)``: a function or
            class, which gets the ``in_channels``, ``num_classes`` and ``input_size`` of the data if it takes them.
        optimizer: makes the optimiser from the parameters; weight decay is its affair.
        scheduler: makes the learning-rate schedule from the optimiser, for example
            ``torch.optim.lr_scheduler.MultiStepLR``.
        schedule_interval: whether the schedule counts epochs or optimiser steps.
        warmup: over how many of these the rate rises to its value, before the schedule begins.
        rates: factors of the learning rate by the beginnings of parameters' names: ``{features: 0.1}``.
        decay_norms_and_biases: whether weight decay applies to norms and biases too.
        freeze: parts that are not trained, with their norms in evaluation mode: ``stem``, ``blocks``, ``backbone``
            (all but the classifier), or names of modules.
        unfreeze_at: the epoch, counted from 0, with which they are trained; None: never.
        label_smoothing: share of the target that is spread evenly over all classes, in [0, 1].
        class_weights: of the classes in the loss, one number each, or ``balanced``; with several labels, of the
            positive images.
        channels_last: keep images and weights as NHWC in memory, which suits tensor cores.
        compile: the backend of ``torch.compile`` that the network runs with, ``inductor`` for example; None: none.
        weights: what the network starts from: a file, or a name such as DEFAULT, torchvision:densenet121,
            timm:densenet121.ra_in1k, hf:owner/name or a URL; where the classes differ, the classifier is a new one.
        monitor: the metric that ``best.ckpt`` and a schedule that follows a metric look at, for example
            ``val/loss``. None: ``val/top1`` or ``val/auroc`` for the checkpoint, ``val/loss`` for the schedule.
        stop_when_not_finite: end the run where the loss becomes infinite or not a number.
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., nn.Module],
        optimizer: OptimizerCallable = _sgd,
        scheduler: LRSchedulerCallable | None = None,
        schedule_interval: Literal["epoch", "step"] = "epoch",
        warmup: int = 0,
        rates: dict[str, float] | None = None,
        decay_norms_and_biases: bool = True,
        freeze: list[str] | str | None = None,
        unfreeze_at: int | None = None,
        label_smoothing: float = 0.0,
        class_weights: list[float] | str | None = None,
        channels_last: bool = False,
        compile: str | None = None,
        weights: str | None = None,
        monitor: str | None = None,
        stop_when_not_finite: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise UserError(f"label_smoothing must be a number from 0 to 1, not {label_smoothing!r}")
        if warmup < 0:
            raise UserError(f"model.warmup must be 0 or more, not {warmup}")
        if unfreeze_at is not None and not freeze:
            raise UserError("model.unfreeze_at says when parts are trained that model.freeze does not name")
        if schedule_interval == "step" and scheduler is None and not warmup:
            raise UserError("model.schedule_interval is that of a schedule: give model.scheduler or model.warmup")
        self.network_factory = factory_of(network)
        if weights is not None and self.network_factory.arguments.get("weights") is not None:
            raise UserError("give model.weights or model.network.weights, not both")
        self.network: nn.Module | None = None
        self.make_optimizer = optimizer
        self.make_schedule = scheduler
        self.schedule_interval = schedule_interval
        self.warmup = warmup
        self.rates = rates
        self.decay_norms_and_biases = decay_norms_and_biases
        self.names_of_frozen = [freeze] if isinstance(freeze, str) else freeze or []
        self.unfreeze_at = unfreeze_at
        self.frozen: Frozen | None = None
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.compile_with = compile
        self.weights = weights
        self.keeps_classes = False
        """Whether the weights must have the classes of the data; they need not where training goes on."""
        self.monitor = monitor
        self.stop_when_not_finite = stop_when_not_finite
        self.loss_is_finite: Tensor | None = None
        """Whether all losses were since it was looked at: on the device, since looking at each would stop a GPU."""
        self.pieces: dict[int, int] = {}
        """Images of each batch that the optimiser's next step sums up."""
        self.found_learning_rate: float | None = None
        """What `FindLearningRate` found, in place of the optimiser's."""
        self.confusion_matrix: Tensor | None = None
        """Of the last evaluation: counts (class, predicted class)."""

    def setup(self, stage: str) -> None:
        """Read from the data what they decide, and make network and task, the first time."""
        if self.network is not None:
            return
        data = self.trainer.datamodule
        self.facts = facts_of(data)
        network = self.network_factory(self.facts)
        if self.weights is not None:
            start_from(network, self.weights, self.network_factory.name, new_head=not self.keeps_classes)
        if self.trainer.is_global_zero and str(self.facts):
            print(f"the data decide: {self.facts}", flush=True)
        self.class_names = self.facts.class_names or _numbered(self.network_factory.number_of_classes)
        self.task = task_for(self.facts.multi_label, self.class_names, label_smoothing=self.label_smoothing)
        weights = self.class_weights if stage == "fit" else None
        targets = data.training_targets() if weights and hasattr(data, "training_targets") else None
        self.task.set_weights(weights, targets)
        self.frozen = Frozen(network, self.names_of_frozen)
        self.frozen.freeze()
        if stage == "fit" and self.trainer.is_global_zero:
            print(f"the network: {self.network_factory.name}, {_parameters(network)}", flush=True)
        if self.memory_format == torch.channels_last and any(p.dim() == 5 for p in network.parameters()):
            raise UserError("model.channels_last is for images: leave it out for volumes")
        self.network = network.to(memory_format=self.memory_format)
        if self.compile_with is not None:
            if self.compile_with not in torch.compiler.list_backends(()):
                raise UserError(
                    f"model.compile must be a backend of torch.compile, such as inductor, not {self.compile_with!r}"
                )
            self.network.compile(backend=self.compile_with)  # in place: names of weights stay what they are

    def on_train_epoch_start(self) -> None:
        self.frozen.freeze(self.unfreeze_at is None or self.trainer.current_epoch < self.unfreeze_at)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.contiguous(memory_format=self.memory_format))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, targets = self._logits(batch)
        loss, plain = self.task.loss(logits, targets), self.task.plain_loss(logits, targets)
        if self.label_smoothing > 0 or self.class_weights is not None:
            self._log_loss("train/loss_minimised", loss, len(targets))
        self.log("train/loss_step", loss.detach(), on_step=True, on_epoch=False, prog_bar=True)
        rate = max(group["lr"] for group in self.optimizers().param_groups)
        self.log("lr", rate, on_step=False, on_epoch=True, sync_dist=True)
        self._measure("train", logits, targets, plain)
        finite = loss.detach().isfinite()
        self.loss_is_finite = finite if self.loss_is_finite is None else self.loss_is_finite & finite
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.pieces = {}
        self.pieces[batch_idx] = len(targets)
        return loss * (len(targets) / next(iter(self.pieces.values())))

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

    def on_train_epoch_end(self) -> None:
        # Lightning steps what follows a metric after this epoch's checkpoint, and a resumed run would miss that step.
        for config in self.trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.interval == "epoch" and self.trainer.is_last_batch:
                metric = self.trainer.callback_metrics.get(config.monitor)
                if metric is not None:  # otherwise Lightning says that there is none
                    config.scheduler.step(metric)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if metric is None:
            scheduler.step()
        elif self.schedule_interval == "step":  # otherwise it has stepped in `on_train_epoch_end`
            scheduler.step(metric)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.images_tested += self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Any) -> int:
        """Count a batch in; its number of images."""
        logits, targets = self._logits(batch)
        self._measure(stage, logits, targets, self.task.plain_loss(logits, targets))
        return len(targets)

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self.images_tested = 0

    def on_test_epoch_end(self) -> None:
        count = int(self.trainer.strategy.reduce(torch.tensor(self.images_tested, device=self.device), reduce_op="sum"))
        if self.trainer.is_global_zero:
            print(f"measured on {count} {self.facts.tested}")
        self._finish_evaluation("test")

    def _finish_evaluation(self, stage: str) -> None:
        if self.task.confusion is not None:
            self.confusion_matrix = self.task.confusion.compute().cpu()  # of all processes together
            self.task.confusion.reset()
        if self.task.scores is not None:
            scores = self.task.scores.compute()  # likewise
            if not scores and not self.trainer.sanity_checking:
                raise UserError(
                    f"of no label are there {stage} images that have it and others that do not: give more of them"
                )
            for name, score in scores.items():
                self.log(f"{stage}/{name}", score, prog_bar=name == "auroc", sync_dist=True)
            self.task.scores.reset()

    def _logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, targets = images_and_targets(batch)
        logits = self(images)
        if logits.shape[1:] != (len(self.class_names),):
            raise UserError(
                f"the network gives {' × '.join(map(str, logits.shape[1:]))} outputs for an image, and the data have "
                f"{len(self.class_names)} classes: set the network's number of classes to {len(self.class_names)}"
            )
        return logits, targets

    def _measure(self, stage: str, logits: Tensor, targets: Tensor, loss: Tensor) -> None:
        self._log_loss(f"{stage}/loss", loss, len(targets))
        self.task.update(stage, logits, targets)
        for name, measure in self.task.measures[f"{stage}_"].items():
            self.log(f"{stage}/{name}", measure, on_step=False, on_epoch=True, prog_bar=name == "top1")

    def _log_loss(self, name: str, loss: Tensor, batch_size: int) -> None:
        self.log(name, loss.detach(), on_step=False, on_epoch=True, batch_size=batch_size, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self.new_optimizer()
        if schedule is None:
            return optimizer
        monitor = self.monitor or getattr(schedule, "monitor", "val/loss")  # Lightning's ReduceLROnPlateau has its own
        if isinstance(schedule, ReduceLROnPlateau) and schedule.mode != mode_of(monitor):
            raise UserError(
                f"model.scheduler.mode must be {mode_of(monitor)}, for {monitor} is better when it is "
                f"{'higher' if mode_of(monitor) == 'max' else 'lower'}"
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": self.schedule_interval, "monitor": monitor},
        }

    def new_optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        """And its schedule, or None."""
        optimizer = make_optimizer(
            self.make_optimizer, self.network, self.rates, self.decay_norms_and_biases, self.found_learning_rate
        )
        return optimizer, make_schedule(self.make_schedule, optimizer, self.warmup)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Lightning divides each piece's loss by accumulate_grad_batches, also where an epoch ends before a batch has
        # all its pieces, or with a smaller one. The gradient shall be the average over the images there are.
        pieces = list(self.pieces.values())
        factor = self.trainer.accumulate_grad_batches * pieces[0] / sum(pieces)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if factor != 1 and gradients:
            torch._foreach_mul_(gradients, factor)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_names"] = self.class_names
        checkpoint["preprocessing"] = self.facts.preprocessing
        checkpoint["multi_label"] = self.facts.multi_label
        if self.network_factory.is_known_library_network:
            checkpoint[NAME_IN_CHECKPOINT] = self.network_factory.name
        checkpoint["found_learning_rate"] = self.found_learning_rate

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        refuse_other_classes(checkpoint.get("class_names"), self.class_names, self.trainer.ckpt_path)
        for name, value in (self.facts.preprocessing or {}).items():
            trained_with = (checkpoint.get("preprocessing") or {}).get(name, value)
            if trained_with != value and self.trainer.is_global_zero:
                print(f"images with {name} {value}, as configured; the checkpoint was trained with {trained_with}")
        different = differences(checkpoint["state_dict"], self.state_dict())
        if different:
            raise UserError(
                f"the checkpoint {self.trainer.ckpt_path} is of another network than the configuration's: {different}; "
                "give the configuration that it was trained with, or start a new run with its --model.weights"
            )
        if self.trainer.state.fn == TrainerFn.FITTING and not _is_averaging(checkpoint):
            self.found_learning_rate = checkpoint.get("found_learning_rate")
            for name, (old, new) in follow_configuration(checkpoint, *self.new_optimizer()).items():
                if self.trainer.is_global_zero:
                    print(f"resuming with {name} {new}, as configured; the checkpoint has {old}")


def _is_averaging(checkpoint: dict[str, Any]) -> bool:
    """Whether `StochasticWeightAveraging` sets the learning rate, in place of the configured schedule."""
    states = [state for name, state in checkpoint["callbacks"].items() if "StochasticWeightAveraging" in name]
    return any(state["scheduler_state"] is not None for state in states)


def mode_of(metric: str) -> Literal["min", "max"]:
    """Whether a metric is better when it is lower or higher."""
    return "min" if "loss" in metric else "max"


def images_and_targets(batch: Any) -> tuple[Tensor, Tensor]:
    """The two tensors of a batch: a pair, or a dictionary with ``image`` and ``label``, as MONAI's.

    Raises:
        UserError: it is neither.
    """
    if isinstance(batch, Mapping) and {"image", "label"} <= batch.keys():
        batch = batch["image"], batch["label"]
    if not isinstance(batch, Sequence) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise UserError(
            "a batch of the data must be a pair of tensors, images and targets, or a dictionary with image and label, "
            f"not a {type(batch).__name__}"
        )
    images, targets = (part.as_subclass(Tensor) for part in batch)  # without what MONAI's tensors carry along
    return images, targets


def _parameters(network: nn.Module) -> str:
    """How many there are, and how many are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    return f"{total:,} parameters{'' if trained == total else f', of which {trained:,} are trained'}"


def _numbered(count: int | None) -> list[str]:
    if not count:
        raise UserError(
            "neither the data nor the network say how many classes there are: give the data module class_names or "
            "num_classes, or set num_classes of model.network"
        )
    return numbered(count)
