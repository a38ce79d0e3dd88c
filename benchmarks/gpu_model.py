"""What a training step would take on an H100, by a model on bytes and instructions of compiled kernels; needs no GPU.

    python benchmarks/gpu_model.py            # compiles for a minute or two

For each part of the step of DenseNet-121 at 224, batch 256, bfloat16. What the model assumes is in
`ops/triton/estimate.py`. Results: ``results/gpu_model.json``; ``redraw.py`` makes the table in docs/gpu.md of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import triton

from efficient_densenet import densenet121
from efficient_densenet.measure import machine, results
from efficient_densenet.ops.triton import estimate

NOTE = "a model, nothing was run: DenseNet-121 at 224, batch 256, bfloat16, one H100"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="estimate the kernels' time on an H100 from their machine code")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args(argv)
    with torch.device("meta"):
        layers = estimate.layers_of(densenet121(), 256, 56)
    records = [{"part": part, **cost._asdict()} for part, cost in estimate.costs(layers).items()]
    about = machine.describe("cpu")
    about["versions"]["triton"] = triton.__version__
    results.write_json(arguments.output / "gpu_model.json", {"note": NOTE, **about, "records": records})
    return 0


if __name__ == "__main__":
    sys.exit(main())
