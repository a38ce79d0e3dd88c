"""The command `env`: hardware, versions and backends, to paste into a report of a bug."""

from __future__ import annotations

import argparse
import importlib.metadata

import torch

import efficient_densenet
from efficient_densenet.measure import machine
from efficient_densenet.units import format_bytes

# What this library works on or is compared with; versions decide many a bug.
_PACKAGES = (
    *("triton", "torchvision", "timm", "monai", "torchxrayvision", "segmentation-models-pytorch"),
    *("lightning", "jsonargparse", "safetensors", "onnx", "onnxruntime", "openvino"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has no options."""


def run(arguments: argparse.Namespace) -> int:
    """Print what there is."""
    found = machine.describe("cuda" if torch.cuda.is_available() else "cpu")
    hardware = found["hardware"]
    print(f"cpu: {hardware['cpu']}, {hardware['cores']} cores, {format_bytes(hardware['memory_bytes'])}")
    for gpu in hardware.get("gpus", []):
        print(f"gpu: {gpu['name']}, {format_bytes(gpu['memory_bytes'])}")
    print(f"system: {hardware['system']}")
    print(f"commit: {found['commit'] or 'unknown'}")
    for name, version in {**found["versions"], **_installed()}.items():
        print(f"{name} {version or 'none'}")
    print(efficient_densenet.backends())
    return 0


def _installed() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
