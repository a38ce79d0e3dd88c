"""Measure other people's DenseNets before and after `make_efficient`, and write what the documentation says about it.

    python benchmarks/adoption.py                        # everything: some three minutes on two cores
    python benchmarks/adoption.py --sections conversion  # this again; the other section stays as it is

The measurements go to ``results/adoption.json`` beside this file, each section with its hardware, versions, commit and
date; ``results/adoption.md`` is made from that file alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import monai.networks.nets
import timm
import torch
import torchvision
from engine_report import megabytes, source, table
from torch import nn

from efficient_densenet import make_efficient
from efficient_densenet.execution import KEEP
from efficient_densenet.files import replacing
from efficient_densenet.measure import machine
from efficient_densenet.measure.memory import peak_bytes
from efficient_densenet.measure.report import write_json

Record = dict[str, Any]
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Subject:
    """A model, the shape of one image, the batches whose peaks are compared, and what is to be reached.

    The batches of the shared buffer are large enough that its scratch, a few megabytes, no longer grows.
    """

    name: str
    build: Build
    image: tuple[int, ...]
    batches: tuple[int, int]
    bars: dict[str, float]  # megabytes per image, by what is kept


@dataclass(frozen=True)
class Plan:
    subjects: tuple[Subject, ...]
    converted: dict[str, Build]


_TWO_DIMENSIONS = {"features": 18.0, "bottleneck": 36.0}
_VOLUME = (1, 64, 64, 64)


def _volumes(**arguments: Any) -> nn.Module:
    return monai.networks.nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=2, **arguments)


FULL = Plan(
    subjects=(
        Subject("torchvision densenet121", torchvision.models.densenet121, (3, 224, 224), (4, 8), _TWO_DIMENSIONS),
        Subject(
            "torchvision densenet121, memory_efficient",
            lambda: torchvision.models.densenet121(memory_efficient=True),
            (3, 224, 224),
            (4, 8),
            {},
        ),
        Subject("timm densenet121", lambda: timm.create_model("densenet121"), (3, 224, 224), (4, 8), _TWO_DIMENSIONS),
        Subject("MONAI DenseNet121, 3D", _volumes, _VOLUME, (2, 4), {"features": 0.25}),
    ),
    converted={
        "torchvision, DenseNet-264 k=48": lambda: torchvision.models.DenseNet(48, (6, 12, 64, 48), 96),
        "timm densenet264d": lambda: timm.create_model("densenet264d"),
    },
)


def _tiny() -> nn.Module:
    return torchvision.models.DenseNet(12, (6, 6), 8)


QUICK = Plan(
    subjects=(Subject("tiny", _tiny, (3, 64, 64), (2, 4), {"features": 1.0}),),
    converted={"tiny": _tiny},
)


def memory(plan: Plan) -> list[Record]:
    """Bytes of live tensors that a training step adds, at two batches; their slope leaves out constant scratch."""
    records = []
    for subject in plan.subjects:
        ways = ("ordinary",) if "memory_efficient" in subject.name else ("ordinary", *KEEP)
        ordinary = 0.0
        for way in ways:
            print(f"memory: {subject.name}, {way}", file=sys.stderr, flush=True)
            model = subject.build() if way == "ordinary" else make_efficient(subject.build(), way)
            batches = (1, 2) if way == "ordinary" else subject.batches  # it has no scratch
            peaks = {n: _peak(model, subject.image, n) for n in batches}
            slope = (peaks[batches[1]] - peaks[batches[0]]) / (batches[1] - batches[0])
            ordinary = slope if way == "ordinary" else ordinary
            bar = subject.bars.get(way)
            limit = None if bar is None else bar * ordinary if bar < 1 else bar * 1e6
            records.append(
                {
                    "network": subject.name,
                    "image": subject.image,
                    "contender": way,
                    "peak_bytes": peaks,
                    "bytes_per_image": slope,
                    "at_most": limit,
                }
            )
    return records


def conversion(plan: Plan) -> list[Record]:
    """Seconds that `make_efficient` takes, five times, each on a new model."""
    records = []
    for name, build in plan.converted.items():
        print(f"conversion: {name}", file=sys.stderr, flush=True)
        seconds = []
        for _ in range(5):
            model = build()
            start = time.perf_counter()
            make_efficient(model)
            seconds.append(time.perf_counter() - start)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        records.append({"network": name, "million_parameters": millions, "seconds": seconds, "at_most": 2.0})
    return records


SECTIONS: dict[str, Callable[[Plan], list[Record]]] = {"memory": memory, "conversion": conversion}


def tables(found: Record) -> str:
    parts = ["# Other people's DenseNets, measured\n\nMade by `python benchmarks/adoption.py` from `adoption.json`."]
    for name, (title, rows) in {
        "memory": ("Activation memory of a training step: live tensor bytes, constant scratch left out", _memory),
        "conversion": ("Time of `make_efficient`", _conversion),
    }.items():
        if name in found:
            parts.append(f"## {title}\n\n{rows(found[name]['records'])}\n\n{source(found[name])}")
    return "\n\n".join(parts) + "\n"


def _memory(records: Sequence[Record]) -> str:
    ordinary = {r["network"]: r["bytes_per_image"] for r in records if r["contender"] == "ordinary"}
    return table(
        ["network", "after `make_efficient`, keep", "image", "MB per image", "at most", "times less"],
        [
            [
                r["network"],
                "" if r["contender"] == "ordinary" else r["contender"],
                "×".join(map(str, r["image"])),
                megabytes(r["bytes_per_image"]),
                _bar(r["bytes_per_image"], r["at_most"], megabytes),
                f"{ordinary[r['network']] / r['bytes_per_image']:.1f}",
            ]
            for r in records
        ],
    )


def _conversion(records: Sequence[Record]) -> str:
    return table(
        ["network", "million parameters", "seconds, median of five", "slowest", "at most"],
        [
            [
                r["network"],
                f"{r['million_parameters']:.1f}",
                f"{median(r['seconds']):.2f}",
                f"{max(r['seconds']):.2f}",
                _bar(max(r["seconds"]), r["at_most"], "{:.2f}".format),
            ]
            for r in records
        ],
    )


def _bar(value: float, limit: float | None, show: Callable[[float], str]) -> str:
    return "" if limit is None else f"{show(limit)} {'reached' if value <= limit else 'MISSED'}"


def _peak(model: nn.Module, image: Sequence[int], n: int) -> int:
    x = torch.randn(n, *image)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return peak_bytes(lambda: model(x).square().sum().backward())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="measure other libraries' DenseNets before and after make_efficient")
    parser.add_argument(
        "--sections", nargs="*", choices=tuple(SECTIONS), default=list(SECTIONS), help="what to measure"
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks, to try this program")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "adoption.json"
    found: Record = json.loads(file.read_text()) if file.exists() else {}
    for name in arguments.sections:
        records = SECTIONS[name](QUICK if arguments.quick else FULL)
        found[name] = {"quick": arguments.quick, **machine.describe("cpu"), "records": records}
        write_json(file, found)  # at once: what comes later may fail
    text = tables(json.loads(file.read_text()))
    print(text, end="")
    with replacing(file.with_suffix(".md")) as beside:
        beside.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
