"""Measure the efficient networks on a GPU against every usual way to run a DenseNet; or compile the kernels without it.

    python benchmarks/gpu.py                  # everything, in under ten minutes, on the first GPU
    python benchmarks/gpu.py --quick          # tiny, to try this program
    python benchmarks/gpu.py --sections L40   # one part again; the others stay as they are
    python benchmarks/gpu.py --compile-only   # needs no GPU: registers, shared memory and spills, for many devices

Every contender has a process of its own. Those that compile or search for minutes do that first, side by side; then
all are measured one after the other, so that each has the GPU for itself. Results are written after each one, beside
those that exist; what there is no time for leaves an earlier result as it is: give its section a call of its own.
Results: ``results/gpu.json``, by GPU, and ``results/triton_kernels.json`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from efficient_densenet.measure import gpu_sections, machine, results
from efficient_densenet.measure.deadline import Deadline
from efficient_densenet.measure.gpu_sections import GpuSection
from efficient_densenet.measure.gpu_worker import KERNELS
from efficient_densenet.measure.networks import cifar, imagenet
from efficient_densenet.measure.processes import progress
from efficient_densenet.measure.results import Record

OURS = ("bottleneck-channels-last", "features-channels-last", "inputs-channels-last")
COMPILED = ("compiled-channels-last", "compiled-budget-0.5", "compiled-budget-0.1", "compiled-max-autotune")
EAGER = ("ordinary", "ordinary-channels-last", "ordinary-cudnn-benchmark")


def torchvision(*contenders: str) -> tuple[str, ...]:
    """These with torchvision's network in place of ours that concatenates."""
    return tuple(f"torchvision-{name}".replace("-ordinary", "") for name in contenders)


FLAG = ("torchvision-flag", "torchvision-flag-channels-last")
# In the order of their worth, should the time run out.
SECTIONS = {
    KERNELS: GpuSection((KERNELS,)),
    "L40": GpuSection(
        (
            *(*EAGER, *OURS, "bottleneck-graph", "bottleneck-reduce-overhead"),
            *("ordinary-graph", *COMPILED),
        ),
        *(cifar(40), 128),
    ),
    "DenseNet-121": GpuSection(
        (
            *(*torchvision(*EAGER), *FLAG, "timm-channels-last", *OURS, "bottleneck-graph"),
            *("resnet50-channels-last", *torchvision(*COMPILED)),
        ),
        *(imagenet("densenet121"), 256, "amp-bf16"),
    ),
    "L40 in 12 GB": GpuSection(("ordinary", *OURS), cifar(40), memory_limit=12_000_000_000),
    "DenseNet-264": GpuSection(
        (*torchvision(*EAGER), *OURS, FLAG[1], *torchvision(COMPILED[0])),
        imagenet("densenet264"),
        dtype="amp-bf16",
    ),
    "DenseNet-201": GpuSection(
        (*torchvision(*EAGER), *OURS, FLAG[1], "timm-channels-last", *torchvision(COMPILED[0])),
        imagenet("densenet201"),
        dtype="amp-bf16",
    ),
}


def compile_only(output: Path, targets: Sequence[str] | None) -> int:
    """Compile every kernel for these devices; those of others stay in the file of results as they are."""
    import triton

    from efficient_densenet.ops.triton import ahead_of_time

    targets = targets or tuple(ahead_of_time.TARGETS)
    file = output / "triton_kernels.json"
    found = json.loads(file.read_text())["kernels"] if file.exists() else {}
    for target in targets:
        records = []
        for kind, launched in ahead_of_time.distinct(target, (*ahead_of_time.SHAPES, *ahead_of_time.FEW_PIXELS)):
            progress(f"{target} {kind} {launched.shape.name}: {launched.name}")
            records.append(ahead_of_time.record(target, kind, launched))
        found |= ahead_of_time.tables(records)
    about = machine.describe("cpu")
    about["versions"]["triton"] = triton.__version__
    results.write_json(file, {"note": "compiled, not run", **about, "kernels": found})
    kernels = ahead_of_time.records_of(found)
    faults = [fault for record in kernels for fault in ahead_of_time.faults(record)]
    print(f"{len(kernels)} kernels, {len(faults)} faults", *faults, sep="\n")
    return 1 if faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="measure the efficient networks on a GPU")
    parser.add_argument(
        "--sections", nargs="*", choices=tuple(SECTIONS), default=list(SECTIONS), help="what to measure"
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks, to try this program")
    parser.add_argument("--minutes", type=float, default=9.5, help="when to stop (9.5)")
    parser.add_argument("--compile-only", action="store_true", help="only compile the kernels; needs no GPU")
    parser.add_argument("--targets", nargs="*", help="devices to compile for (all)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.compile_only:
        return compile_only(arguments.output, arguments.targets)
    if not torch.cuda.is_available():
        print(
            "there is no GPU that PyTorch can use: run this where there is one, or give --compile-only", file=sys.stderr
        )
        return 2
    file = arguments.output / ("gpu-quick.json" if arguments.quick else "gpu.json")
    about = machine.describe("cuda")
    gpu = about["hardware"]["gpus"][0]["name"]
    before = {
        name: section["records"]
        for name, section in results.read(file).get(gpu, {}).items()
        if all(section.get(key) == about[key] for key in ("hardware", "versions", "commit"))
    }

    def keep(name: str, records: list[Record]) -> None:
        both = gpu_sections.merged(before.get(name, []), records)
        results.keep(file, gpu, name, {"quick": arguments.quick, **about, "records": both})

    deadline = Deadline(60 * arguments.minutes)
    if not arguments.quick:
        from efficient_densenet.ops.triton import ahead_of_time

        progress("compiling the kernels")
        ahead_of_time.compile_everything_here()
    try:
        gpu_sections.measure({name: SECTIONS[name] for name in arguments.sections}, deadline, arguments.quick, keep)
    finally:
        deadline.close()
    print(gpu_sections.table(results.read(file).get(gpu, {})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
