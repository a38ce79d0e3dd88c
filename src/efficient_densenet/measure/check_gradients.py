"""The command `check-gradients`: does the efficient network compute what the ordinary network computes?"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from efficient_densenet.measure import devices, gradients, networks
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.gradients import KINDS, Case, Difference
from efficient_densenet.measure.networks import positive_int
from efficient_densenet.measure.processes import Team

_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    devices.add_arguments(parser)
    parser.add_argument(
        "--num-devices", type=positive_int, default=1, help="processes that share the batch (DistributedDataParallel)"
    )
    parser.add_argument(
        "--efficient", choices=("recompute", "true"), default="recompute", help="the way to compare, bit for bit"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--training", action="store_true", default=argparse.SUPPRESS, help="in training mode, as without this option"
    )
    mode.add_argument("--evaluation", action="store_true", default=argparse.SUPPRESS, help="in evaluation mode")
    parser.add_argument(
        "--dtype", choices=("float32", "float64", "bfloat16"), default="float32", help="type of weights and images"
    )
    parser.add_argument("--batch-size", type=positive_int, default=4, help="images over all devices")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images, labels and dropout")
    networks.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare, print what was compared, the worst difference and a verdict; 0 if equal, else 1."""
    device, num_devices = arguments.device, arguments.num_devices
    case = Case(
        network=networks.from_arguments(arguments),
        efficient=True if arguments.efficient == "true" else arguments.efficient,
        training=not hasattr(arguments, "evaluation"),
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    devices.check(device, num_devices, case.batch_size)
    case.network.check_images(case.batch_size // num_devices, case.training)
    differences = _on_one(case, device) if num_devices == 1 else _on_several(case, device, num_devices)
    wrong = gradients.not_identical(differences)
    print(f"network   {case.network}")
    print(
        f"compared  efficient={case.efficient!r} with efficient=False: "
        f"{'training' if case.training else 'evaluation'}, {case.dtype}, batch {case.batch_size}, seed {case.seed}, "
        f"{num_devices} × {device}"
    )
    print(f"tensors   {_counts(differences)}{' on each device' if num_devices > 1 else ''}")
    worst = [_describe(difference, num_devices) for difference in wrong[:_SHOWN]] or ["none: no tensor differs"]
    if len(wrong) > _SHOWN:
        worst.append(f"and {len(wrong) - _SHOWN} more")
    print("worst     " + ("\n" + " " * 10).join(worst))
    print(f"verdict   {f'DIFFERENT: {len(wrong)} of {len(differences)} tensors' if wrong else 'equal bit for bit'}")
    return 1 if wrong else 0


def _on_one(case: Case, device: str) -> list[Difference]:
    place = Place(device)
    place.enter()
    return gradients.compare(case, place)


def _on_several(case: Case, device: str, num_devices: int) -> list[Difference]:
    with Team(gradients.__name__, asdict(case), device, num_devices) as team:
        return [Difference(*fields) for differences in team.ask("compare") for fields in differences]


def _counts(differences: Sequence[Difference]) -> str:
    counts = Counter(d.kind for d in differences if d.rank == 0)
    return ", ".join(f"{counts[kind]} {kind}{'s' if counts[kind] > 1 else ''}" for kind in KINDS if counts[kind])


def _describe(difference: Difference, num_devices: int) -> str:
    of = "" if difference.name == difference.kind else f" {difference.name}"
    where = f" on device {difference.rank}" if num_devices > 1 else ""
    return (
        f"{difference.kind}{of}{where}: off by {difference.largest:.3g}, "
        f"where the largest value is {difference.scale:.3g}"
    )
