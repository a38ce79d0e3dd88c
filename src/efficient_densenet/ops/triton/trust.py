"""Which GPUs the kernels may run on: those that they were seen to compute the right numbers on.

The first use on a kind of machine (GPU, driver, PyTorch, Triton, version of the kernels) and in a type of activations
runs `check` in a child process; its verdict is kept in the user's cache. The environment variable
EFFICIENT_DENSENET_GPU says ``auto`` (this), ``trust`` (no check) or ``off`` (no kernels).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from torch import distributed
from torch._guards import detect_fake_mode

from efficient_densenet.errors import UserError
from efficient_densenet.files import replacing
from efficient_densenet.ops.triton import check

VARIABLE = "EFFICIENT_DENSENET_GPU"
SECONDS = 600
"""How long a check may take; it compiles some fifty kernels."""

PROGRAM = [sys.executable, "-c", f"from {check.__name__} import main; main()"]
"""The child process: gets a device and a kind, and prints what `check.main` does."""


@dataclass(frozen=True)
class Verdict:
    """On the kernels, on one kind of machine and for one kind of product.

    Attributes:
        reason: why they must not run there; empty if they are right.
        date: of the check.
        final: whether the check came to its end. What prevented it may be over the next time.
    """

    reason: str
    date: str
    final: bool = True

    def __str__(self) -> str:
        found = f"WRONG: {self.reason}" if self.reason and self.final else self.reason or "right"
        return f"{found} (checked on {self.date[:10]})" if self.final else f"not checked: {found}"


def obstacle(device: torch.device, kind: str) -> str:
    """Why the kernels must not run there, or nothing. May check them first, which takes a minute.

    In a process group all use the verdict of the first process.

    Raises:
        UserError: the environment variable says none of the three.
    """
    in_group = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    key = (device, kind, in_group, os.environ.get(VARIABLE))
    if key not in _reasons:
        reason = _obstacle_of_the_group(device, kind) if in_group else _obstacle_here(device, kind)
        if reason is None:
            return (
                "they have not been checked on this GPU yet, which cannot be done while a CUDA graph is captured or a "
                "model is traced: run a step before, or the command efficient-densenet check-gpu"
            )
        _reasons[key] = reason
    return _reasons[key]


_reasons: dict[tuple, str] = {}


def _obstacle_here(device: torch.device, kind: str) -> str | None:
    """As this process finds it; None where nothing is known and nothing can be found out now."""
    mode = mode_of_trust()
    if mode != "auto":
        return "" if mode == "trust" else f"{VARIABLE} is off"
    verdict = stored(device, kind)
    if verdict is None:
        if torch.compiler.is_compiling() or detect_fake_mode() or torch.cuda.is_current_stream_capturing():
            return None
        warnings.warn(
            f"the Triton kernels for {kind} are used on this machine for the first time: they are compared with plain "
            f"PyTorch, which takes a minute, once ({VARIABLE}=trust does without)",
            stacklevel=6,
        )
        verdict = judge(device, kind)
    if not verdict.reason:
        return ""
    return f"{verdict.reason}; efficient-densenet check-gpu checks again, {VARIABLE}=trust uses them nevertheless"


def _obstacle_of_the_group(device: torch.device, kind: str) -> str | None:
    """As the first process finds it, which tells the others; so that all compute alike, and only one checks."""
    store = distributed.distributed_c10d._get_default_store()
    key = f"efficient_densenet/{kind}"
    if distributed.get_rank() == 0:
        reason = _obstacle_here(device, kind)
        if reason is not None:
            store.set(key, json.dumps([reason, machine(device)]))
        return reason
    if mode_of_trust() != "auto":
        return _obstacle_here(device, kind)
    try:
        store.wait([key], timedelta(seconds=2 * SECONDS))
    except RuntimeError:  # the first process has no use for the kernels
        return _obstacle_here(device, kind)
    reason, its_machine = json.loads(store.get(key))
    # Where the first says that they are right, it says so of its own kind of machine.
    return reason if reason or its_machine == machine(device) else _obstacle_here(device, kind)


def mode_of_trust() -> str:
    """``"auto"``, ``"trust"`` or ``"off"``."""
    mode = os.environ.get(VARIABLE) or "auto"
    if mode not in ("auto", "trust", "off"):
        raise UserError(f"{VARIABLE} is {mode!r}: set it to auto, trust or off")
    return mode


def judge(device: torch.device, kind: str) -> Verdict:
    """Check the kernels now, in a child process, and store the verdict if it is final."""
    verdict = _judged(device, kind)
    if verdict.final:
        try:
            with replacing(_file(device, kind)) as path:
                path.write_text(json.dumps({"machine": machine(device), "kind": kind, **asdict(verdict)}, indent=1))
        except (UserError, OSError) as error:  # it is checked again the next time
            warnings.warn(f"the verdict on the Triton kernels cannot be stored: {error}", stacklevel=7)
    return verdict


def stored(device: torch.device, kind: str) -> Verdict | None:
    """The verdict of an earlier check on such a machine."""
    try:
        found = json.loads(_file(device, kind).read_text())
        return Verdict(str(found["reason"]), str(found["date"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@functools.cache
def machine(device: torch.device) -> dict[str, str]:
    """What a verdict is about."""
    gpu = torch.cuda.get_device_properties(device)
    kernels = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        kernels.update(path.read_bytes())
    return {
        "gpu": f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors",
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "efficient-densenet": f"{_version('efficient-densenet')}, kernels {kernels.hexdigest()[:12]}",
    }


def folder() -> Path:
    """Where verdicts are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "efficient-densenet" / "gpu"


def _file(device: torch.device, kind: str) -> Path:
    about = json.dumps(machine(device), sort_keys=True)
    return folder() / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}-{kind}.json"


def _judged(device: torch.device, kind: str) -> Verdict:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    package = str(Path(__file__).parents[3])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    try:
        child = subprocess.run(
            [*PROGRAM, str(device), kind],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"PYTHONPATH": paths, VARIABLE: "trust"},
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Verdict(f"the check of the kernels took more than {SECONDS} seconds", now)
    except OSError as error:
        return Verdict(f"the check of the kernels cannot be started: {error}", now, final=False)
    printed = child.stdout.strip().splitlines()
    if child.returncode == 0:
        try:
            found = json.loads(printed[-1])
            if "undecided" in found:
                return Verdict(found["undecided"], now, final=False)
            faults = [str(fault) for fault in found["faults"]]
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            return Verdict(faults[0] + more if faults else "", now)
        except (IndexError, ValueError, KeyError, TypeError):
            return Verdict("the check of the kernels printed no verdict", now, final=False)
    how = f"was killed by signal {-child.returncode}" if child.returncode < 0 else f"ended with {child.returncode}"
    last = (child.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    # Before the first kernel it is not their fault, but that of the GPU or of the environment.
    return Verdict(f"the check of the kernels {how}: {last}", now, final=check.READY in printed)


def _driver() -> str:
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        if Path(path).exists():
            return Path(path).read_text().splitlines()[0]
    return "unknown"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
