"""The command `check-gradients`: does the efficient network compute what the ordinary network computes?"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from efficient_densenet.errors import UserError
from efficient_densenet.execution import KEEP
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
        "--efficient",
        choices=("true", "recompute"),
        default="true",
        help="the way to compare: the shared buffer, up to rounding; or recomputing, bit for bit",
    )
    parser.add_argument(
        "--keep", choices=KEEP, default="bottleneck", help="what the shared buffer keeps for the backward pass"
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
    """Compare, print what was compared, the worst difference and a verdict; 0 if all is well, else 1."""
    device, num_devices = arguments.device, arguments.num_devices
    case = Case(
        network=networks.from_arguments(arguments),
        efficient=True if arguments.efficient == "true" else arguments.efficient,
        keep=arguments.keep,
        training=not hasattr(arguments, "evaluation"),
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    devices.check(device, num_devices, case.batch_size)
    case.network.check_images(case.batch_size // num_devices, case.training)
    _check_dropout(case, device)
    differences = _on_one(case, device) if num_devices == 1 else _on_several(case, device, num_devices)
    way = f"efficient={case.efficient!r}" + ("" if case.bit_for_bit else f", keep={case.keep!r}")
    print(f"network   {case.network}")
    print(
        f"compared  {way} with efficient=False: {'training' if case.training else 'evaluation'}, {case.dtype}, "
        f"batch {case.batch_size}, seed {case.seed}, {num_devices} × {device}"
    )
    print(f"tensors   {_counts(differences)}{' on each device' if num_devices > 1 else ''}")
    if case.bit_for_bit:
        shown = wrong = gradients.not_identical(differences)
        right = "equal bit for bit"
    else:
        whole = gradients.whole_gradient(differences)
        print(f"gradient  {_describe(whole[0], case, num_devices)}")
        ordered = sorted([*differences, *whole], key=lambda d: gradients.strain(d, case.dtype), reverse=True)
        wrong = [d for d in ordered if gradients.strain(d, case.dtype) > 1]
        shown = wrong or [next(d for d in ordered if d not in whole)]  # how near the worst comes to the limit
        right = "equal up to rounding"
    lines = [_describe(difference, case, num_devices) for difference in shown[:_SHOWN]]
    if len(shown) > _SHOWN:
        lines.append(f"and {len(shown) - _SHOWN} more")
    print("worst     " + ("\n" + " " * 10).join(lines or ["none: no tensor differs"]))
    print(f"verdict   {f'DIFFERENT: {len(wrong)} of {len(differences)} tensors' if wrong else right}")
    return 1 if wrong else 0


def _check_dropout(case: Case, device: str) -> None:
    drops = case.training and case.network.arguments.get("drop_rate", 0) > 0
    if drops and not case.bit_for_bit and device == "cuda" and case.dtype != "float64":
        raise UserError(
            "on a GPU, dropout draws other numbers in float64, which rounding is judged by: use --dtype float64"
        )


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


def _describe(difference: Difference, case: Case, num_devices: int) -> str:
    d = difference
    of = "" if d.name == d.kind else f" {d.name}"
    where = f" on device {d.rank}" if num_devices > 1 else ""
    text = f"{d.kind}{of}{where}: off by {d.share(d.error):.3g} of its norm"
    if case.bit_for_bit or case.dtype == "float64":
        return text
    times = d.error / d.ordinary_error if d.ordinary_error else math.inf
    return (
        f"{text}, the ordinary network by {d.share(d.ordinary_error):.3g}"
        f"{f' ({times:.2f} times)' if math.isfinite(times) else ''}"
    )
