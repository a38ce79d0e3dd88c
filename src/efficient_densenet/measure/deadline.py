"""Contenders that are measured one after the other, each alone on the GPU, within a fixed time."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from efficient_densenet.errors import UserError
from efficient_densenet.measure import gpu_worker
from efficient_densenet.measure.processes import Job, Team


class Deadline:
    """The seconds that are left, and the end of a contender that takes longer.

    A contender needs ten seconds before it can begin, to import what it needs: the next one does that meanwhile.
    """

    MOST = 120  # seconds for one, or a single compilation might leave none to the others
    PREPARATION = 240  # seconds for all that are prepared side by side
    SIDE_BY_SIDE = 3  # more would not fit into the GPU's memory

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self._starter = ThreadPoolExecutor(1)
        self._next: tuple[Job, Future[Team]] | None = None
        self._prepared: list[tuple[Job, Team | str]] = []

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Let contenders compile side by side, before anything is measured; each then waits for its turn."""
        end = min(self.end, time.monotonic() + self.PREPARATION)

        def prepared(job: Job) -> Team | str:
            left = end - time.monotonic()
            if left < 5:
                return f"there was no time to prepare it in the first {self.PREPARATION} s"
            try:
                team = Team(gpu_worker.__name__, job, "cuda")
            except (UserError, OSError) as error:
                return str(error)
            timer = threading.Timer(left, team.close)
            timer.start()
            try:
                team.ask("prepare")
            except (UserError, ValueError, OSError) as error:
                team.close()
                out_of_time = f"took more than {self.PREPARATION} s to compile"
                return out_of_time if time.monotonic() >= end else str(error)
            finally:
                timer.cancel()
            return team

        with ThreadPoolExecutor(self.SIDE_BY_SIDE) as pool:
            self._prepared = list(zip(jobs, pool.map(prepared, jobs), strict=True))

    def ask(self, job: Job, request: str, following: Job | None = None, until_the_end: bool = False) -> dict[str, Any]:
        """The contender's answer, or why there is none; the `following` contender may get ready.

        It may take `MOST` seconds, or all that are left.
        """
        began = time.monotonic()
        if self.end - began < 5:
            return {"failed": "no time left"}
        end = self.end if until_the_end else min(self.end, began + self.MOST)
        ready = self._ready(job)
        if isinstance(ready, str):
            return {"failed": ready}
        try:
            with ready.result(end - began) as team:
                if following is not None and following != job and not self._is_prepared(following):
                    self._next = following, self._start(following)
                timer = threading.Timer(max(0, end - time.monotonic()), team.close)
                timer.start()
                try:
                    (answer,) = team.ask(request)
                finally:
                    timer.cancel()
            return {**answer, "seconds": time.monotonic() - began}
        except (UserError, ValueError, OSError, TimeoutError) as error:
            if not ready.done():
                ready.add_done_callback(self._end)  # should it get ready after all
            out_of_time = "no time left" if end == self.end else f"took more than {self.MOST} s"
            return {"failed": out_of_time if time.monotonic() >= end else str(error)}

    def close(self) -> None:
        """End whatever has been got ready."""
        if self._next is not None:
            self._end(self._next[1])
        self._starter.shutdown()
        for _, team in self._prepared:
            if not isinstance(team, str):
                team.close()

    def _start(self, job: Job) -> Future[Team]:
        return self._starter.submit(Team, gpu_worker.__name__, job, "cuda")

    def _is_prepared(self, job: Job) -> bool:
        return any(job == prepared for prepared, _ in self._prepared)

    def _ready(self, job: Job) -> Future[Team] | str:
        """A process for the job, by now or soon; or why there is none."""
        for i, (known, team) in enumerate(self._prepared):
            if job == known:
                del self._prepared[i]
                if isinstance(team, str):
                    return team
                done: Future[Team] = Future()
                done.set_result(team)
                return done
        following, self._next = self._next, None
        if following is not None:
            expected, starting = following
            if expected == job:
                return starting
            self._end(starting)
        return self._start(job)

    @staticmethod
    def _end(team: Future[Team]) -> None:
        if team.exception() is None:
            team.result().close()
