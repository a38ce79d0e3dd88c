"""The command `check-gpu`: do the Triton kernels compute the right numbers on this machine's GPU?"""

from __future__ import annotations

import argparse

import torch

from efficient_densenet.errors import UserError
from efficient_densenet.ops import triton
from efficient_densenet.ops.triton import check, trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", type=int, default=0, help="number of the GPU")
    parser.add_argument(
        "--types", nargs="+", choices=tuple(check.KINDS), default=list(check.KINDS), help="what to check"
    )
    parser.add_argument("--show", action="store_true", help="check nothing, show the verdicts that are stored")


def run(arguments: argparse.Namespace) -> int:
    """Check, or with --show look up, and print the verdicts; 1 if kernels are wrong or could not be checked, else 0."""
    count = torch.cuda.device_count()
    if not 0 <= arguments.gpu < count:
        others = f"the numbers here are 0 to {count - 1}" if count else "PyTorch sees none on this machine"
        raise UserError(f"there is no GPU number {arguments.gpu}: {others}")
    device = torch.device("cuda", arguments.gpu)
    obstacle = triton.obstacle(device, torch.float32)
    if obstacle:
        raise UserError(f"the Triton kernels do not run there: {obstacle}")
    for name, value in trust.machine(device).items():
        print(f"{name:20}{value}")
    wrong = 0
    for kind in arguments.types:
        verdict = trust.stored(device, kind) if arguments.show else trust.judge(device, kind)
        print(f"{kind:20}{verdict or 'not checked yet'}", flush=True)
        wrong += verdict is not None and bool(verdict.reason)
    print(f"{'kept in':20}{trust.folder()}")
    if trust.mode_of_trust() != "auto":
        print(f"{'not used':20}{trust.VARIABLE} is {trust.mode_of_trust()}")
    return 1 if wrong else 0
