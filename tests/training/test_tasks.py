"""Losses and measures beside their definitions, in double precision."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional as F

from efficient_densenet.errors import UserError
from efficient_densenet.training.tasks import MultiLabel, SingleLabel

NAN = float("nan")


@pytest.fixture
def labelled():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    targets = (torch.rand(40, 3, generator=generator) < 0.3).double()
    targets[torch.rand(40, 3, generator=generator) < 0.2] = NAN
    return logits, targets


def test_binary_cross_entropy_of_what_is_known(labelled):
    logits, targets = labelled
    task = MultiLabel(["a", "b", "c"], label_smoothing=0.1)
    task.set_weights([2.0, 1.0, 0.5], None)
    known = [(i, j) for i in range(40) for j in range(3) if not targets[i, j].isnan()]
    expected, plain = 0.0, 0.0
    for i, j in known:
        target, probability = targets[i, j], logits[i, j].sigmoid()
        smooth = 0.9 * target + 0.05
        weight = [2.0, 1.0, 0.5][j]
        expected -= weight * smooth * probability.log() + (1 - smooth) * (1 - probability).log()
        plain -= target * probability.log() + (1 - target) * (1 - probability).log()
    torch.testing.assert_close(task.loss(logits, targets), expected / len(known))
    torch.testing.assert_close(task.plain_loss(logits, targets), plain / len(known))


def test_what_is_unknown_gets_no_gradient(labelled):
    logits, targets = labelled
    logits.requires_grad_()
    task = MultiLabel(["a", "b", "c"], label_smoothing=0.0)
    task.set_weights(None, None)
    task.loss(logits, targets).backward()
    assert torch.equal(logits.grad == 0, targets.isnan())


def test_scores_of_each_label(labelled):
    logits, targets = labelled
    targets[:, 2] = 0  # nobody has it
    task = MultiLabel(["a", "b", "c"], label_smoothing=0.0)
    for part in (slice(0, 15), slice(15, 40)):
        task.update("val", logits[part], targets[part])
    scores = task.scores.compute()
    assert scores.keys() == {"auroc", "ap", "auroc/a", "ap/a", "auroc/b", "ap/b"}
    for j, name in enumerate("ab"):
        known = ~targets[:, j].isnan()
        truth, scored = targets[known, j], logits[known, j]
        assert scores[f"auroc/{name}"] == pytest.approx(roc_auc_score(truth, scored), abs=1e-6)
        assert scores[f"ap/{name}"] == pytest.approx(average_precision_score(truth, scored), abs=1e-6)
    assert scores["auroc"] == pytest.approx((scores["auroc/a"] + scores["auroc/b"]).item() / 2)


def test_balanced_weights():
    single = SingleLabel(["a", "b"], label_smoothing=0.0)
    single.set_weights("balanced", torch.tensor([0, 0, 0, 1]))
    assert single.weight.tolist() == pytest.approx([4 / 6, 2])
    multi = MultiLabel(["a", "b"], label_smoothing=0.0)
    multi.set_weights("balanced", torch.tensor([[1, 0], [0, NAN], [0, 1], [0, 1.0]]))
    assert multi.weight.tolist() == [3, 0.5]
    with pytest.raises(UserError, match="does not tell: give it a method training_targets"):
        multi.set_weights("balanced", None)


def test_targets_that_are_mixed():
    logits = torch.randn(4, 3, dtype=torch.float64)
    targets = torch.tensor([[0.7, 0.3, 0], [0, 1, 0], [0.2, 0, 0.8], [0, 0.4, 0.6]], dtype=torch.float64)
    task = SingleLabel(["a", "b", "c"], label_smoothing=0.0)
    task.set_weights(None, None)
    torch.testing.assert_close(task.loss(logits, targets), -(targets * F.log_softmax(logits, 1)).sum(1).mean())
    task.update("train", targets, targets)
    assert task.measures["train_"].compute() == {"top1": 1}
