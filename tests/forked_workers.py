"""Workers of `measure.processes.Team` that are forks of a process which has imported what they need."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from subprocess import PIPE, STDOUT
from typing import IO, Any

from forks import FORKS, preload

preload("efficient_densenet.measure.worker", "torch._dynamo", "torch._inductor")


class Popen:
    """What a `Team` uses of `subprocess.Popen`, which is tested with it, for ``python -m MODULE PIPE``."""

    def __init__(
        self, command: Sequence[str], stdout: IO[str], env: Mapping[str, str], pass_fds: tuple[int], **others: Any
    ) -> None:
        assert command[:2] == [sys.executable, "-m"] and others["stdin"] == PIPE and others["stderr"] == STDOUT
        theirs, ours = os.pipe()
        self.stdin = os.fdopen(ours, "w")
        files = [Connection(fd) for fd in (theirs, *map(os.dup, (stdout.fileno(), *pass_fds)))]
        self._process = FORKS.Process(target=_work, args=(command[2], dict(env), files))
        self._process.start()
        for file in files:
            file.close()

    def kill(self) -> None:
        self._process.kill()

    def communicate(self) -> None:
        self.wait()
        self.stdin.close()

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


def _work(module: str, environment: dict[str, str], files: list[Connection]) -> None:
    given, printed, replies = (file.fileno() for file in files)
    for number, file in enumerate((given, printed, printed)):
        os.dup2(file, number)
    sys.stdin = open(0)  # noqa: SIM115
    sys.argv = [module, str(os.dup(replies))]
    os.environ |= environment
    runpy.run_module(module, run_name="__main__")
