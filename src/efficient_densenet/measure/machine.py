"""On what a measurement was made: hardware, versions, commit, date."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import efficient_densenet
from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.cpu.instructions import VARIABLE, Instructions

HELD = {
    level.option: {
        VARIABLE: level.option,
        "ATEN_CPU_CAPABILITY": pytorch,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
    }
    for level, pytorch, onednn, mkl in (
        (Instructions.BASELINE, "default", "SSE41", "SSE4_2"),
        (Instructions.AVX2, "avx2", "AVX2", "AVX2"),
        (Instructions.AVX512, "avx512", "AVX512_CORE", "AVX512"),
        (Instructions.AVX512_BF16, "avx512", "AVX512_CORE_BF16", "AVX512"),
        (Instructions.AMX, "avx512", "AVX512_CORE_AMX", "AVX512"),
    )
}
"""Environment variables that hold this library, PyTorch, oneDNN and MKL to a level; read when a process starts."""


_CPUINFO = Path("/proc/cpuinfo")
_COMPARED_WITH = ("torchvision", "timm", "monai", "onnxruntime", "openvino")


def describe(device_type: str) -> dict[str, Any]:
    """Hardware, versions of what matters, the commit of this package (None if unknown), and the date; plain data."""
    return {
        "hardware": _hardware(device_type),
        "versions": _versions(device_type),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """Its name, and the best instructions that the kernels find on it: what figures are kept by."""
    return f"{_cpu()}, {library.load().instructions.option}"


def _hardware(device_type: str) -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.platform(),
    }
    if device_type == "cuda":
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        hardware["gpus"] = [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus]
    return hardware


def _cpu() -> str:
    """As the system names it; on ARM, Linux knows numbers alone."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "CPU part" in told:
        return f"ARM, implementer {told['CPU implementer']}, part {told['CPU part']}"
    return told.get("model name") or platform.processor() or platform.machine()


def _versions(device_type: str) -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    versions["cuda"] = torch.version.cuda
    if device_type == "cuda":
        versions |= {"driver": _driver(), "triton": _version("triton")}
    versions["efficient-densenet"] = efficient_densenet.__version__
    return versions | {name: _version(name) for name in _COMPARED_WITH}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Of NVIDIA's devices, as the kernel module tells it."""
    module = Path("/proc/driver/nvidia/version")
    return module.read_text().splitlines()[0] if module.exists() else None


def _commit() -> str | None:
    """The commit, with ``-dirty`` behind it where files have changed since."""
    source = Path(efficient_densenet.__file__)

    def git(*command: str) -> str | None:
        try:
            result = subprocess.run(["git", *command], cwd=source.parent, capture_output=True, text=True)
        except FileNotFoundError:  # there is no git
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # Installed into an environment inside another repository, this file is not in that one's list.
    return git("describe", "--always", "--dirty", "--abbrev=40") if git("ls-files", source.name) else None
