"""Workers answer, whatever they print; when they fail, the reason arrives; none is left behind."""

from __future__ import annotations

import os
import textwrap

import pytest
import torch

from efficient_densenet import UserError
from efficient_densenet.measure.processes import OutOfMemoryError, Team

WORKER = """
    import os, subprocess, sys, time
    import torch
    import torch.distributed as dist
    from efficient_densenet import UserError
    from efficient_densenet.measure.processes import serve

    print("printed while importing")

    def start(job, place):
        def noise():
            print("from Python")
            os.write(1, b"from C\\n")
            subprocess.run(["echo", "from a child"])
            return [job["value"], place.rank, os.getpid(), torch.get_num_threads()]

        def die():
            if place.rank == place.size - 1:
                print("the last words", file=sys.stderr, flush=True)
                os._exit(7)
            time.sleep(600)

        def wrong():
            raise UserError("use another value")

        def full():
            raise torch.OutOfMemoryError("tried to allocate")

        return {"noise": noise, "die": die, "wrong": wrong, "full": full}

    if __name__ == "__main__":
        serve(start)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "test_worker.py").write_text(textwrap.dedent(WORKER))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "test_worker"


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_answers_and_ends(worker):
    with Team(worker, {"value": "ä"}, num_devices=2, threads=1) as team:
        answers = [team.ask("noise"), team.ask("noise")]
        assert answers[0] == answers[1]
        assert [answer[:2] for answer in answers[0]] == [["ä", 0], ["ä", 1]]
        assert all(answer[3] == 1 for answer in answers[0])
    assert not any(alive(answer[2]) for answer in answers[0])


def test_errors_are_told_apart(worker):
    with Team(worker, {"value": 1}) as team:
        with pytest.raises(UserError, match="use another value"):
            team.ask("wrong")
        with pytest.raises(OutOfMemoryError, match="smaller batch"):
            team.ask("full")


def test_a_death_is_reported_at_once(worker):
    """The other worker would sleep for ten minutes: nothing waits for it, and it does not survive."""
    with Team(worker, {"value": 1}, num_devices=2) as team:
        pids = [answer[2] for answer in team.ask("noise")]
        with pytest.raises(UserError, match=r"device 1 ended with code 7(.|\n)*the last words"):
            team.ask("die")
    assert not any(alive(pid) for pid in pids)


def test_a_worker_that_cannot_start():
    with pytest.raises(UserError, match="No module named"):
        Team("there_is_no_such_module", {}, threads=torch.get_num_threads())
