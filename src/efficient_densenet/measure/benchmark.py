"""The command `benchmark`: time and memory of training steps, or the largest batch that fits a given memory."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from efficient_densenet.errors import UserError
from efficient_densenet.measure import contest, devices, machine, max_batch, networks, results, tables
from efficient_densenet.measure.contender import DTYPES
from efficient_densenet.measure.contenders import (
    COMPILED,
    CONTENDERS,
    FORMS,
    PEERS,
    PEERS_IN_EVALUATION,
    USUAL,
    contender_list,
)
from efficient_densenet.measure.machine import HELD
from efficient_densenet.measure.networks import Network, int_list, positive_int
from efficient_densenet.measure.processes import Job
from efficient_densenet.units import parse_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    devices.add_arguments(parser)
    parser.add_argument(
        "--num-devices",
        type=int_list,
        default="1",
        help="devices that share the batch (DistributedDataParallel); of several numbers, as in 1,2,4, each in turn",
    )
    parser.add_argument(
        "--contenders",
        type=contender_list,
        help=f"who takes part (None: {', '.join(USUAL)}). "
        + "; ".join(f"{name}: {made.description}" for name, made in CONTENDERS.items()),
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="measure ours in every mode beside other libraries', compiled ones and runtimes for evaluation, and "
        "compare each with float64; what cannot take part is named, with the reason",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="type of weights and images; amp-bf16: float32 under autocast to bfloat16",
    )
    parser.add_argument(
        "--evaluation", action="store_true", help="time forward alone, in evaluation mode, under inference_mode"
    )
    parser.add_argument(
        "--instructions",
        choices=tuple(HELD),
        help="hold the kernels of this library, PyTorch's and oneDNN's to this level (None: the best there is)",
    )
    parser.add_argument("--batch-size", type=positive_int, default=128, help="images over all devices")
    parser.add_argument("--rounds", type=positive_int, default=5, help="turns of each contender")
    parser.add_argument("--warmup", type=positive_int, default=1, help="steps in each turn that do not count")
    parser.add_argument("--iterations", type=positive_int, default=4, help="timed steps in each turn")
    parser.add_argument(
        "--threads",
        type=positive_int,
        help="CPU threads of each process; None: all cores, shared out over the devices",
    )
    parser.add_argument(
        "--max-batch",
        type=parse_bytes,
        metavar="MEMORY",
        help="instead of timing, find the largest batch that fits so much memory, such as 12GB or 500MB",
    )
    parser.add_argument("--output", type=Path, default="benchmark.json", help="file for all results, as JSON")
    networks.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, and write everything that was measured to a file."""
    network = networks.from_arguments(arguments)
    arguments.contenders = arguments.contenders or contenders(arguments)
    results.check_output(arguments.output)
    job = contest.job(
        network,
        arguments.batch_size,
        arguments.warmup,
        arguments.iterations,
        dtype=arguments.dtype,
        training=not arguments.evaluation,
    )
    measure = _times if arguments.max_batch is None else _largest_batches
    content, table = measure(arguments, network, job)
    print(f"{network}\n\n{table}\n")
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    record = {"arguments": given, "network": asdict(network), **machine.describe(arguments.device), **content}
    results.write_json(arguments.output, record)
    print(f"written to {arguments.output}")
    return 0


def contenders(arguments: argparse.Namespace) -> list[str]:
    """Who takes part where nobody was named."""
    if not arguments.peers:
        return list(USUAL)
    names = dict.fromkeys((*PEERS_IN_EVALUATION, *COMPILED) if arguments.evaluation else (*PEERS, *FORMS, *COMPILED))
    if arguments.max_batch is None:
        return list(names)
    return [name for name in names if CONTENDERS[name].compile is None]  # each trial would compile again


def _times(arguments: argparse.Namespace, network: Network, job: Job) -> tuple[dict[str, Any], str]:
    for num_devices in arguments.num_devices:
        devices.check(arguments.device, num_devices, arguments.batch_size)
        network.check_images(arguments.batch_size // num_devices, training=not arguments.evaluation)
    if arguments.peers and arguments.num_devices != [1]:
        raise UserError("--peers measures one device: leave --num-devices away")
    timed: list[contest.Result] = []
    gaps: list[dict[str, str]] = []
    for num_devices in arguments.num_devices:
        timed += contest.run(
            arguments.contenders,
            job,
            arguments.rounds,
            arguments.device,
            num_devices,
            arguments.threads,
            HELD.get(arguments.instructions),
            check=arguments.peers,
            gaps=gaps if arguments.peers else None,
        )
    rows = contest.summarize(timed)
    table = tables.peers(rows, arguments.batch_size) if arguments.peers else tables.contest(rows)
    return {"results": timed, "summary": rows, "gaps": gaps}, "\n".join([table, *tables.gaps(gaps)])


def _largest_batches(arguments: argparse.Namespace, network: Network, job: Job) -> tuple[dict[str, Any], str]:
    if arguments.num_devices != [1]:
        raise UserError("--max-batch measures one device: leave --num-devices away")
    if arguments.instructions:
        raise UserError("--max-batch measures memory, which no instructions change: leave --instructions away")
    devices.check(arguments.device, num_devices=1, batch_size=1)
    network.check_images(1, training=not arguments.evaluation)
    gaps: list[dict[str, str]] = []
    found = max_batch.run(
        arguments.contenders,
        job,
        arguments.max_batch,
        arguments.device,
        arguments.threads,
        gaps if arguments.peers else None,
    )
    return {"results": found, "gaps": gaps}, "\n".join([tables.largest_batches(found), *tables.gaps(gaps)])
