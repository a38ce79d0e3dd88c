"""What a training step would take on an H100, by a model; and the largest batch, by counting. Needs no GPU.

    python benchmarks/gpu_model.py            # compiles for a minute or two

Times are of each part of a step at 224, batch 256, bfloat16, of what is counted in the compiled kernels: what that
assumes is in `ops/triton/estimate.py`. The largest batch of L = 40, k = 12 is planned with the scratch of the kernels.
Results: ``results/gpu_model.json``; ``redraw.py`` makes the tables in docs/gpu.md of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
import triton

from efficient_densenet import densenet121, densenet161, densenet201, densenet264, densenet_cifar, plan
from efficient_densenet.measure import machine, results
from efficient_densenet.ops import triton as kernels
from efficient_densenet.ops.triton import ahead_of_time, estimate, tiles

NOTE = "a model, nothing was run: training steps at 224, batch 256, bfloat16, one H100"
NETWORKS = {
    "DenseNet-121": densenet121,
    "DenseNet-161": densenet161,
    "DenseNet-201": densenet201,
    "DenseNet-264": densenet264,
}
MEMORY = "12GB"


def times() -> list[dict[str, object]]:
    """Milliseconds of each part of a step of each network."""
    found: list[dict[str, object]] = []
    for name, build in NETWORKS.items():
        with torch.device("meta"):
            layers = estimate.layers_of(build(), 256, 56)
        found += [{"network": name, "part": part, **cost._asdict()} for part, cost in estimate.costs(layers).items()]
    return found


def largest_batches() -> dict[str, int]:
    """Images of a step of L = 40, k = 12 in float32 that fit `MEMORY`, for each way to run it."""
    device = ahead_of_time.device_of(estimate.TARGET)
    # A CPU takes the GPU's place: the kernels are asked what they allocate, and for which device.
    with mock.patch.object(kernels, "plans", lambda x: True), mock.patch.object(tiles, "device_of", lambda x: device):
        network = densenet_cifar(40, 12).to(memory_format=torch.channels_last)
        planned = plan(network, (3, 32, 32), batch_size=128, memory=MEMORY, optimizer="none")
    return {way.name: way.largest_batch or 0 for way in planned.ways}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="estimate the kernels' time on an H100 from their machine code")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args(argv)
    about = machine.describe("cpu")
    about["versions"]["triton"] = triton.__version__
    found = {"note": NOTE, **about, "records": times(), "largest_batch": largest_batches()}
    results.write_json(arguments.output / "gpu_model.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
