"""Worker processes that answer requests: both sides of the talk, in lines of JSON over pipes.

A worker is a module with ``if __name__ == "__main__": serve(start)``; `start` gets the job and the place that it runs
at, and returns what the worker can do, by name. A `Team` is the same job at every place of a group.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from efficient_densenet.errors import UserError
from efficient_densenet.measure.devices import Place

Job = dict[str, Any]
Operations = Mapping[str, Callable[[], Any]]
_LINES_OF_LAST_WORDS = 8


class OutOfMemoryError(UserError):
    """The device of a worker had less memory than the work needs."""


def progress(text: str) -> None:
    """Tell what is being done now; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


class Team:
    """One worker process for each of `num_devices` devices. A context: at its end no process is left.

    Args:
        module: what the workers run.
        job: what they get to start with; plain data.
        device_type: ``"cpu"`` or ``"cuda"``.
        num_devices: how many share the work, as one distributed group.
        threads: CPU threads of each; None: those of this process are shared out.
        environment: variables that the workers have besides those of this process.

    Raises (here and in `ask`):
        UserError: a worker raised it, or died; then with the last lines that it printed.
        OutOfMemoryError: a worker's device is too small.
    """

    def __init__(
        self,
        module: str,
        job: Job,
        device_type: str = "cpu",
        num_devices: int = 1,
        threads: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.threads = threads or max(1, torch.get_num_threads() // num_devices)
        self._folder = tempfile.TemporaryDirectory(prefix="efficient-densenet-")
        self._workers: list[_Worker] = []
        folder = Path(self._folder.name)
        places = [Place(device_type, i, num_devices, str(folder / "store"), self.threads) for i in range(num_devices)]
        try:
            for place in places:
                self._workers.append(_Worker(module, place.rank, folder / f"printed-{place.rank}", environment or {}))
            self._exchange([{"job": job, "place": asdict(place)} for place in places])
        except BaseException:
            self.close()
            raise

    def ask(self, request: str) -> list[Any]:
        """Have every worker do what it calls `request`; the results in the order of the devices."""
        return self._exchange([request] * len(self._workers))

    def close(self) -> None:
        """Kill the workers, whatever they are doing: they hold nothing that is worth keeping."""
        for worker in self._workers:
            worker.kill()
        self._folder.cleanup()

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _exchange(self, requests: list[Any]) -> list[Any]:
        results: dict[int, Any] = {}
        with selectors.DefaultSelector() as waiting:
            for worker, request in zip(self._workers, requests, strict=True):
                worker.send(request)
                waiting.register(worker.replies, selectors.EVENT_READ, worker)
            # In the order of arrival: when one dies, the others may wait for it forever.
            while waiting.get_map():
                for key, _ in waiting.select():
                    results[key.data.rank] = key.data.receive()
                    waiting.unregister(key.fileobj)
        return [results[worker.rank] for worker in self._workers]


class _Worker:
    """This side of one worker process.

    Requests go to its stdin. Replies have a pipe of their own, so that whatever is printed, also by libraries and in
    C, does not come between them; `printed` is the file that it goes to.
    """

    def __init__(self, module: str, rank: int, printed: Path, environment: Mapping[str, str]) -> None:
        self.rank = rank
        self._printed = printed
        ours, theirs = os.pipe()
        self.replies = os.fdopen(ours)
        with printed.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=(theirs,),
                text=True,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the workers
            )
        os.close(theirs)

    def send(self, request: Any) -> None:
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._death() from None

    def receive(self) -> Any:
        line = self.replies.readline()
        if not line:
            raise self._death()
        reply = json.loads(line)
        if "error" in reply:
            raise (OutOfMemoryError if reply["out_of_memory"] else UserError)(reply["error"])
        return reply["result"]

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()  # waits, and closes its stdin
        self.replies.close()

    def _death(self) -> UserError:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        if code == -signal.SIGKILL:
            how += " (as happens when the machine runs out of memory)"
        lines = self._printed.read_text(errors="replace").strip().splitlines()[-_LINES_OF_LAST_WORDS:]
        return UserError("\n  ".join([f"the worker process of device {self.rank} {how}; its last words:", *lines]))


def serve(start: Callable[[Job, Place], Operations]) -> None:
    """Be a worker: start the job that comes first, then answer requests until there are no more."""
    pipe = int(sys.argv[1])
    os.set_inheritable(pipe, False)
    operations: Operations | None = None
    with os.fdopen(pipe, "w") as replies:
        for line in sys.stdin:
            request = json.loads(line)
            result = None
            try:
                if operations is None:
                    place = Place(**request["place"])
                    place.enter()
                    operations = start(request["job"], place)
                else:
                    result = operations[request]()
                reply = {"result": result}
            except UserError as error:
                reply = {"error": str(error), "out_of_memory": False}
            except torch.OutOfMemoryError:
                reply = {"error": "the device ran out of memory: use a smaller batch", "out_of_memory": True}
            print(json.dumps(reply), file=replies, flush=True)
