"""Measure other people's DenseNets before and after `make_efficient`, and write what the documentation says about it.

    python benchmarks/adoption.py                        # everything: some three minutes on two cores
    python benchmarks/adoption.py --sections conversion  # this again; the other section stays as it is

The measurements go to ``results/adoption.json`` beside this file, by processor, each section with its hardware,
versions, commit and date; ``results/adoption.md`` is made from that file alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from efficient_densenet import make_efficient, recomputing
from efficient_densenet.errors import require
from efficient_densenet.execution import KEEP
from efficient_densenet.measure import tables
from efficient_densenet.measure.memory import bytes_per_image, peak_bytes
from efficient_densenet.measure.processes import progress
from efficient_densenet.measure.results import Record
from efficient_densenet.measure.script import Script, Section

FOLDER = Path(__file__).parent / "results"
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Subject:
    """A model, the shape of one image, and the batches whose peaks are compared.

    The batches of the shared buffer are large enough that its workspace, a few megabytes, no longer grows. A model with
    a decoder is measured with `recomputing` too.
    """

    name: str
    build: Build
    image: tuple[int, ...]
    batches: tuple[int, int]
    decoder: bool = False


@dataclass(frozen=True)
class Plan:
    subjects: tuple[Subject, ...]
    converted: dict[str, Build]


def _torchvision(*shape: Any, **arguments: Any) -> nn.Module:
    return require("torchvision", "peers").models.DenseNet(*shape, **arguments)


def _timm(name: str, **arguments: Any) -> nn.Module:
    return require("timm", "peers").create_model(name, **arguments)


def _volumes() -> nn.Module:
    nets = require("monai.networks.nets", "peers")
    return nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=2)


def _unet() -> nn.Module:
    return require("segmentation_models_pytorch", "dev").Unet("densenet121", encoder_weights=None, classes=3)


_tiny = partial(_torchvision, 12, (6, 6), 8)


FULL = Plan(
    subjects=(
        Subject("torchvision densenet121", _torchvision, (3, 224, 224), (4, 8)),
        Subject(
            "torchvision densenet121, memory_efficient",
            partial(_torchvision, memory_efficient=True),
            (3, 224, 224),
            (4, 8),
        ),
        Subject("timm densenet121", partial(_timm, "densenet121"), (3, 224, 224), (4, 8)),
        Subject("MONAI DenseNet121, 3D", _volumes, (1, 64, 64, 64), (2, 4)),
        Subject(
            "timm densenet121, features_only", partial(_timm, "densenet121", features_only=True), (3, 128, 128), (8, 16)
        ),
        Subject("segmentation_models_pytorch Unet, densenet121", _unet, (3, 128, 128), (8, 16), decoder=True),
    ),
    converted={
        "torchvision, DenseNet-264 k=48": partial(_torchvision, 48, (6, 12, 64, 48), 96),
        "timm densenet264d": partial(_timm, "densenet264d"),
    },
)
QUICK = Plan(subjects=(Subject("tiny", _tiny, (3, 64, 64), (2, 4), decoder=True),), converted={"tiny": _tiny})


def memory(plan: Plan) -> list[Record]:
    """Bytes of live tensors that a training step adds."""
    records = []
    for subject in plan.subjects:
        for name in ("ordinary",) if "memory_efficient" in subject.name else ("ordinary", *KEEP):
            progress(f"memory: {subject.name}, {name}")
            model = subject.build() if name == "ordinary" else make_efficient(subject.build(), name)
            batches = (1, 2) if name == "ordinary" else subject.batches  # it has no workspace
            found = bytes_per_image(_live_bytes(model, subject.image), batches)
            records.append({"network": subject.name, "image": subject.image, "contender": name, **found})
        if subject.decoder:
            name = "inputs, recomputing"
            progress(f"memory: {subject.name}, {name}")
            model = make_efficient(subject.build(), "inputs")
            found = bytes_per_image(_live_bytes(model, subject.image, recomputing), subject.batches)
            records.append({"network": subject.name, "image": subject.image, "contender": name, **found})
    return records


def conversion(plan: Plan) -> list[Record]:
    """Seconds that `make_efficient` takes, five times, each on a new model."""
    records = []
    for name, build in plan.converted.items():
        progress(f"conversion: {name}")
        seconds = []
        for _ in range(5):
            model = build()
            start = time.perf_counter()
            make_efficient(model)
            seconds.append(time.perf_counter() - start)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        records.append({"network": name, "million_parameters": millions, "seconds": seconds})
    return records


def _conversion_table(records: list[Record]) -> str:
    rows = [
        [r["network"], f"{r['million_parameters']:.1f}", f"{median(r['seconds']):.2f}", f"{max(r['seconds']):.2f}"]
        for r in records
    ]
    return tables.markdown(["network", "million parameters", "seconds, median of five", "slowest"], rows, names=1)


def _live_bytes(
    model: nn.Module, image: Sequence[int], context: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Callable[[int], int]:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step(x: torch.Tensor) -> None:
        with context():
            made = model(x)
        outputs = made if isinstance(made, list) else [made]
        torch.stack([output.square().sum() for output in outputs]).sum().backward()

    def peak_of(batch_size: int) -> int:
        x = torch.randn(batch_size, *image)
        return peak_bytes(lambda: step(x))

    return peak_of


SCRIPT = Script(
    "adoption",
    "Other people's DenseNets, measured",
    {
        "memory": Section(
            "Activation memory: live tensor bytes over a training step; for each image, without constant workspace",
            memory,
            tables.memory,
        ),
        "conversion": Section("Time of `make_efficient`", conversion, _conversion_table),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    return SCRIPT.main(argv, FOLDER, FULL, QUICK)


if __name__ == "__main__":
    sys.exit(main())
