"""The command `efficient-densenet`: one line per command; what a command does is written in its package.

Every command's module has ``add_arguments(parser)`` and ``run(arguments) -> int`` (the exit code), and is imported
only when its command is asked for. Lightning parses the options of `fit`, `validate` and `test` by itself.
"""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from efficient_densenet import __version__
from efficient_densenet.errors import UserError

_OUTPUT_NOT_WANTED = 141  # what shells report of a program that writes to a pipe that nobody reads any more


class _Command(NamedTuple):
    module: str
    help: str
    own_parser: bool = False  # its module has ``main(command, options) -> int`` instead


_COMMANDS = {
    "check-gradients": _Command("measure.check_gradients", "compare the efficient network with the ordinary one"),
    "check-gpu": _Command("measure.check_gpu", "check the Triton kernels on this machine's GPU"),
    "benchmark": _Command("measure.benchmark", "time forward and backward, and measure memory"),
    "env": _Command("measure.env", "print hardware, versions and backends, for a report of a bug"),
    "inspect": _Command("adopt.inspect", "show what make_efficient would do to a model of another library"),
    "plan": _Command("measure.plan", "tell what a training step needs in memory, without running it"),
    "convert": _Command("checkpoints.convert", "rewrite a checkpoint of another library under other names"),
    "prepare-imagenet": _Command("training.prepare_imagenet", "unpack the ImageNet archives into folders"),
    "fit": _Command("training.lightning_cli", "train a network", own_parser=True),
    "validate": _Command("training.lightning_cli", "measure a trained network on the validation set", own_parser=True),
    "test": _Command("training.lightning_cli", "measure a trained network on the test set", own_parser=True),
    "predict": _Command("training.predict", "print the top classes of image files"),
    "export": _Command("training.export", "write a trained network as ONNX or as a torch.export program"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code: 0 fine, 1 a check failed, 2 a mistake of the user's, 130
    interrupted, 141 where what reads the output, such as ``head``, has ended.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else ""
    try:
        code = _run(name, argv)
        sys.stdout.flush()  # or a pipe that nobody reads would be noticed only when Python ends
        return code
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_output():
            return _OUTPUT_NOT_WANTED
        # An OSError (no such file, disk full, no permission) already says what and where.
        print(f"efficient-densenet: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("efficient-densenet: interrupted", file=sys.stderr)
        return 130


def _run(name: str, argv: list[str]) -> int:
    if name in _COMMANDS and _COMMANDS[name].own_parser:
        return _module(name).main(name, argv[1:])
    arguments = parser(name).parse_args(argv)
    return _module(arguments.command).run(arguments)


def _nobody_reads_output() -> bool:
    """Whether it is the output's pipe that is broken, and not one between processes; if so, the output is dropped."""
    try:
        output, poll = sys.stdout.fileno(), select.poll()
    except (OSError, AttributeError):  # no file, or a system without poll
        return False
    poll.register(output, 0)  # errors are told whatever is asked for
    broken = bool(poll.poll(0))
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # or Python complains when it ends
    return broken


def parser(wanted: str) -> argparse.ArgumentParser:
    """The command line's, with the options of the command that is wanted; others are not imported."""
    everything = argparse.ArgumentParser(
        prog="efficient-densenet", description="DenseNets that train in a fraction of the memory."
    )
    everything.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = everything.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.help,
            description=command.help,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if name == wanted and not command.own_parser:
            _module(name).add_arguments(subparser)
    return everything


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"efficient_densenet.{_COMMANDS[name].module}")
