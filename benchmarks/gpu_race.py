"""Are the kernels right on a full GPU: as they are, and without the wait for Hopper's products?

    python benchmarks/gpu_race.py --output FOLDER

Every operation runs nine times, in grids of four programs for each multiprocessor, and is compared bit for bit with
itself and with float64. Without the wait, a device of compute capability 9.0 and Triton before 3.9 may show faults: see
``forward.norm_relu_conv_kernel``. Elsewhere both are the same kernels. Results: ``race.json``, beside those that exist.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import triton

from efficient_densenet.measure import machine, results
from efficient_densenet.ops import triton as kernels
from efficient_densenet.ops.triton import check, forward


def main(argv: Sequence[str] | None = None) -> int:
    """0 if there is no fault with the wait as the kernels are shipped, else 1."""
    parser = argparse.ArgumentParser(description="look for products that are overtaken")
    parser.add_argument("--quick", action="store_true", help="one small shape and kind, to try this program")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    arguments = parser.parse_args(argv)
    kinds, rows, shapes = [kind for kind in check.KINDS if kind != "float32"], 0, check.SHAPES
    if arguments.quick:
        kinds, rows, shapes = ["float16"], 1, (check.Shape(16, 8, 3),)
        check._SIDE, check._REPEATS = 6, 1
    shipped, records = forward._MUST_WAIT, []
    for kind in kinds:
        torch.backends.cudnn.conv.fp32_precision = "tf32" if kind == "tf32" else "ieee"  # type: ignore[attr-defined]
        for wait in (True, False):
            forward._MUST_WAIT = wait
            faults = check.faults(kernels, torch.device("cuda"), kind, rows, shapes)
            records.append({"kind": kind, "wait": wait, "shipped": wait == shipped, "faults": faults})
            print(f"{kind:10}{'with' if wait else 'without'} the wait: {'; '.join(faults) or 'right'}", flush=True)
    file = arguments.output / "race.json"
    arguments.output.mkdir(parents=True, exist_ok=True)
    about = machine.describe("cuda")
    name = f"{about['hardware']['gpus'][0]['name']}, Triton {triton.__version__}"
    results.keep(file, name, "race", {"quick": arguments.quick, **about, "records": records})
    return 1 if any(record["faults"] for record in records if record["shipped"]) else 0


if __name__ == "__main__":
    sys.exit(main())
