"""Short training runs of which every loss is kept in ``golden_losses.json``, for each way to run.

    python tests/golden_losses.py     # writes them again, after a change that is meant to change results

Weights and images come from Python's generator, whose numbers are the same in every version; PyTorch's are not promised
to be.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import torch
from torch import nn

from efficient_densenet import DenseNet, make_efficient
from efficient_densenet.execution import KEEP
from efficient_densenet.files import replacing

FILE = Path(__file__).with_suffix(".json")
STEPS, IMAGES, CLASSES = 6, 6, 4
NETWORKS = {
    "plain, CIFAR stem": {"num_init_features": 8, "growth_rate": 4, "block_config": (3, 3), "input_size": 16},
    "bottleneck, ImageNet stem": {
        **{"num_init_features": 16, "growth_rate": 8, "block_config": (2, 3), "input_size": 40},
        **{"bn_size": 2, "compression": 0.5},
    },
}
TYPES = {"float64": torch.float64, "float32": torch.float32}
WAYS = ("ordinary", *KEEP, "recompute")


def losses(network: str, dtype: str, way: str) -> list[list[float]]:
    """Of each step, the loss in training, and behind the step in evaluation, which running statistics decide."""
    numbers = random.Random(0)

    def uniform(*shape: int, bound: float) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return torch.tensor([numbers.uniform(-bound, bound) for _ in range(count)], dtype=TYPES[dtype]).view(shape)

    model = DenseNet(**NETWORKS[network], num_classes=CLASSES).to(TYPES[dtype])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(uniform(*parameter.shape, bound=(6 / parameter[0].numel()) ** 0.5))
    size = NETWORKS[network]["input_size"]
    images, labels = uniform(IMAGES, 3, size, size, bound=1.0), torch.arange(IMAGES) % CLASSES
    if way != "ordinary":
        make_efficient(model, **({"way": way} if way == "recompute" else {"keep": way}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    found = []
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            found.append([loss.item(), nn.functional.cross_entropy(model.eval()(images), labels).item()])
    return found


def main() -> int:
    found = {n: {t: {w: losses(n, t, w) for w in WAYS} for t in TYPES} for n in NETWORKS}
    text = re.sub(r"\[\s+([\d.e-]+),\s+([\d.e-]+)\s+\]", r"[\1, \2]", json.dumps(found, indent=1))  # a step a line
    with replacing(FILE) as beside:
        beside.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
