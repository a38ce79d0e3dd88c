"""Train the ordinary and the efficient network from the same weights on scanned digits, with several seeds.

    python benchmarks/curves.py            # some two minutes on two cores

The curves go to ``results/curves.json`` beside this file, and `redraw.py` draws them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_densenet import DenseNet, make_efficient
from efficient_densenet.errors import require
from efficient_densenet.execution import KEEP
from efficient_densenet.measure import tables
from efficient_densenet.measure.processes import progress
from efficient_densenet.measure.results import Record
from efficient_densenet.measure.script import Script, Section

FOLDER = Path(__file__).parent / "results"
WAYS = ("ordinary", *KEEP)
_HELD_OUT = 3  # every third image


@dataclass(frozen=True)
class Plan:
    """How much is trained."""

    seeds: int = 5
    epochs: int = 12
    batch_size: int = 64


FULL, QUICK = Plan(), Plan(seeds=2, epochs=1, batch_size=256)


def curves(plan: Plan) -> list[Record]:
    """Of each way and seed: the mean loss of each epoch, and the share of held-out images that is wrong behind it."""
    images, classes = _digits()
    records = []
    for seed in range(plan.seeds):
        torch.manual_seed(seed)
        network = DenseNet(1, 16, 8, (4, 4), compression=0.5, bn_size=4, num_classes=10)
        for way in WAYS:
            progress(f"seed {seed}, {way}")
            twin = copy.deepcopy(network)
            if way != "ordinary":
                make_efficient(twin, way)
            losses, errors = zip(*_train(twin, images, classes, plan, seed), strict=True)
            records.append({"way": way, "seed": seed, "loss": losses, "error": errors})
    return records


def _digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 8×8 grey pixels, normalised, and their classes."""
    digits = require("sklearn.datasets", "train").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    return (images - images.mean()) / images.std(), torch.tensor(digits.target)


def _train(network: nn.Module, images: Tensor, classes: Tensor, plan: Plan, seed: int) -> Iterator[tuple[float, float]]:
    held_out = torch.arange(len(images)) % _HELD_OUT == 0
    x, y = images[~held_out], classes[~held_out]
    order = torch.Generator().manual_seed(seed)
    steps = plan.epochs * (len(x) // plan.batch_size)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(plan.epochs):
        network.train()
        losses = []
        for batch in torch.randperm(len(x), generator=order).split(plan.batch_size)[: steps // plan.epochs]:
            loss = F.cross_entropy(network(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        with torch.no_grad():
            wrong = network.eval()(images[held_out]).argmax(1) != classes[held_out]
        yield mean(losses), wrong.double().mean().item()


def table(records: list[Record]) -> str:
    """Where the curves end: mean and range over the seeds."""
    rows = []
    for way in WAYS:
        ends = [(r["loss"][-1], 100 * r["error"][-1]) for r in records if r["way"] == way]
        rows.append([way, *(f"{mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in zip(*ends, strict=True))])
    return tables.markdown(["way", "training loss", "held-out error, %"], rows, names=1)


SCRIPT = Script(
    "curves",
    "Training curves of the ordinary and the efficient network",
    {"digits": Section("Scanned digits, last epoch: mean and range over seeds", curves, table)},
)


def main(argv: Sequence[str] | None = None) -> int:
    return SCRIPT.main(argv, FOLDER, FULL, QUICK)


if __name__ == "__main__":
    sys.exit(main())
