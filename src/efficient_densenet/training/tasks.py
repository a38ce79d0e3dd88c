"""What is to be learned: one class an image, or several labels. The loss, and what is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchmetrics.utilities.data import dim_zero_cat

from efficient_densenet.errors import UserError

_STAGES = ("train", "val", "test")


class Task(nn.Module):
    """The part of training that depends on what the classes of an image are.

    Attributes:
        best: the metric that says which epoch is the best.
        measures: of each stage, what is measured batch by batch.
        confusion: (class, predicted class) counts, or None.
        scores: what is measured over all images together, or None.
    """

    best: str

    def __init__(self, class_names: Sequence[str], label_smoothing: float) -> None:
        super().__init__()
        self.class_names = list(class_names)
        self.label_smoothing = label_smoothing
        self.weight: Tensor | None
        self.measures = nn.ModuleDict({f"{stage}_": MetricCollection({}) for stage in _STAGES})
        self.confusion: Metric | None = None
        self.scores: Metric | None = None

    def set_weights(self, weights: str | Sequence[float] | None, targets: Tensor | None) -> None:
        """Weigh the classes in the loss: by the numbers given, or ``balanced`` by the training `targets`.

        Raises:
            UserError: there is not one positive number for each class, or nothing is known of the targets.
        """
        weight = None
        if weights == "balanced":
            if targets is None:
                raise UserError(
                    "model.class_weights balanced needs the targets of the training images, which this data module "
                    "does not tell: give it a method training_targets, or give one number for each class"
                )
            weight = self._balanced(targets)
        elif weights is not None:
            if isinstance(weights, str) or len(weights) != len(self.class_names) or min(weights) <= 0:
                raise UserError(
                    f"model.class_weights must be balanced, or a positive number for each of {len(self.class_names)} "
                    f"classes, not {weights}"
                )
            weight = torch.tensor(weights, dtype=torch.float32)
        self.register_buffer("weight", weight, persistent=False)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What training minimises."""
        raise NotImplementedError

    def plain_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The cross entropy without smoothing and weights, which can be compared between runs."""
        raise NotImplementedError

    def update(self, stage: str, logits: Tensor, targets: Tensor) -> None:
        """Count a batch in."""
        raise NotImplementedError

    def _balanced(self, targets: Tensor) -> Tensor:
        raise NotImplementedError


class SingleLabel(Task):
    """Each image has one class: cross entropy; ``top1`` and, with more than five classes, ``top5``."""

    best = "val/top1"

    def __init__(self, class_names: Sequence[str], label_smoothing: float) -> None:
        super().__init__(class_names, label_smoothing)
        classes = len(class_names)
        tops = (1, 5) if classes > 5 else (1,)
        for measures in self.measures.values():
            measures.add_metrics({f"top{k}": MulticlassAccuracy(classes, top_k=k, average="micro") for k in tops})
        self.confusion = MulticlassConfusionMatrix(classes)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, self.weight, label_smoothing=self.label_smoothing)

    def plain_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def update(self, stage: str, logits: Tensor, targets: Tensor) -> None:
        logits = logits.detach()
        classes = targets if targets.dim() == 1 else targets.argmax(1)  # mixed images count as the larger part
        self.measures[f"{stage}_"].update(logits, classes)
        if stage != "train":
            self.confusion.update(logits, classes)

    def _balanced(self, targets: Tensor) -> Tensor:
        counts = torch.bincount(targets, minlength=len(self.class_names)).clamp(min=1)
        return len(targets) / (len(self.class_names) * counts)


class MultiLabel(Task):
    """Each image has any of the labels: binary cross entropy over the targets that are known (others are NaN); of
    validation and test images, for every label, the area under the ROC curve and the average precision.
    """

    best = "val/auroc"

    def __init__(self, class_names: Sequence[str], label_smoothing: float) -> None:
        super().__init__(class_names, label_smoothing)
        self.scores = LabelScores(class_names)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return _known_mean(logits, targets.lerp(torch.full_like(targets, 0.5), self.label_smoothing), self.weight)

    def plain_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return _known_mean(logits, targets, None)

    def update(self, stage: str, logits: Tensor, targets: Tensor) -> None:
        if stage != "train":
            self.scores.update(logits.detach().float(), targets)

    def _balanced(self, targets: Tensor) -> Tensor:
        positive, negative = (targets == 1).sum(0), (targets == 0).sum(0)
        return negative.clamp(min=1) / positive.clamp(min=1)


def _known_mean(logits: Tensor, targets: Tensor, pos_weight: Tensor | None) -> Tensor:
    known = ~targets.isnan()
    losses = F.binary_cross_entropy_with_logits(
        logits, targets.nan_to_num(0.0), pos_weight=pos_weight, reduction="none"
    )
    return (losses * known).sum() / known.sum().clamp(min=1)


class LabelScores(Metric):
    """``auroc`` and ``ap`` (average precision): the means over all labels, and ``auroc/LABEL`` and ``ap/LABEL``.

    A label counts where an image is known to have it, and another one is known not to.
    """

    full_state_update = False

    def __init__(self, class_names: Sequence[str]) -> None:
        super().__init__()
        self.class_names = list(class_names)
        self.add_state("logits", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        self.logits.append(logits)
        self.targets.append(targets)

    def compute(self) -> dict[str, Tensor]:
        logits, targets = dim_zero_cat(self.logits), dim_zero_cat(self.targets)
        scores = dict(self._of_labels(logits, targets))
        means = {
            kind: torch.stack([score for name, score in scores.items() if name.startswith(kind)]).mean()
            for kind in ("auroc", "ap")
            if scores
        }
        return means | scores

    def _of_labels(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, scored, truth in zip(self.class_names, logits.T, targets.T, strict=True):
            known = (truth == 0) | (truth == 1)
            scored, positive = scored[known], truth[known].long()
            if 0 < positive.sum() < len(positive):
                yield f"auroc/{name}", binary_auroc(scored, positive)
                yield f"ap/{name}", binary_average_precision(scored, positive)


def task_for(multi_label: bool, class_names: Sequence[str], **settings: Any) -> Task:
    return (MultiLabel if multi_label else SingleLabel)(class_names, **settings)
