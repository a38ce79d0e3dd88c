"""Fifteen kills, eight of them while a checkpoint is written over an older one. As a program: all runs, one by one.

The runs are forks of one process, which has imported everything, so that each begins in a moment.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from efficient_densenet.cli import main
from efficient_densenet.training import lightning_cli, plots  # before the forks: imports take seconds
from efficient_densenet.training.data import Digits

CONFIG = """
model:
  network:
    class_path: efficient_densenet.DenseNet
    init_args: {num_init_features: 8, growth_rate: 4, block_config: [1, 1], drop_rate: 0.2}
  scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR}
data: {class_path: Digits, init_args: {num_workers: 0, batch_size: 8}}
trainer: {accelerator: cpu, devices: 1, max_epochs: 50, limit_train_batches: 2, limit_val_batches: 1}
"""


def run(root: Path, *changes) -> int:
    """The process number of a run that goes on in the folder `root`; `changes` are called in it before."""
    pid = os.fork()
    if pid:
        return pid
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    for change in changes:
        change()
    options = ["--trainer.default_root_dir", str(root), "--ckpt_path", "last"]
    with mock.patch.object(plots, "curves"), mock.patch.object(plots, "confusion_matrix"):
        os._exit(main(["fit", "--config", str(root.parent / "tiny.yaml"), *options]))


def die_at_checkpoint(number: int, share: float) -> None:
    """SIGKILL for this process when it has written so large a share of that checkpoint, counted from now."""
    write, count = Path.write_bytes, 0

    def write_and_die(path: Path, data: memoryview) -> int:
        nonlocal count
        count += ".last." in path.name  # the partial file, beside the older checkpoint
        if count == number:
            write(path, data[: int(share * len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, data)

    Path.write_bytes = write_and_die


def written(file: Path) -> int:
    """When, in nanoseconds; 0: never."""
    return file.stat().st_mtime_ns if file.exists() else 0


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def all_runs(folder: Path) -> None:
    assert lightning_cli  # imported
    Digits().setup()  # and what reads the data
    (folder / "tiny.yaml").write_text(CONFIG)
    assert os.waitstatus_to_exitcode(os.waitpid(run(folder / "unbroken"), 0)[1]) == 0
    generator = random.Random(3)
    kills = ["writing"] * 8 + ["anywhere"] * 7
    generator.shuffle(kills)
    last = folder / "killed" / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    for kill in kills:
        if kill == "writing":
            number, share = generator.choice((1, 2)) + (not last.exists()), generator.random()
            pid = run(folder / "killed", lambda n=number, s=share: die_at_checkpoint(n, s))
        else:
            pid, before = run(folder / "killed"), written(last)
            if generator.random() < 0.7:  # later than when it begins
                while written(last) == before and not has_ended(pid):
                    time.sleep(0.001)
            time.sleep(0.05 * generator.random())
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == -signal.SIGKILL, (kill, status)
        if kill == "writing":
            torch.load(last, weights_only=True)  # the older one is whole
            assert list(last.parent.glob(".last.*.partial.ckpt"))
    assert os.waitstatus_to_exitcode(os.waitpid(run(folder / "killed"), 0)[1]) == 0


def test_a_run_that_was_killed_fifteen_times_ends_as_the_unbroken_one(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, __file__, str(tmp_path)]
    result = subprocess.run(program, capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, result.stderr
    unbroken, killed = (tmp_path / name / "tiny" / "version_0" for name in ("unbroken", "killed"))
    assert (killed / "metrics.csv").read_text() == (unbroken / "metrics.csv").read_text()
    for name in ("best", "last"):
        a, b = (torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in (unbroken, killed))
        assert a["epoch"] == b["epoch"]
        for key, tensor in a["state_dict"].items():
            assert torch.equal(b["state_dict"][key], tensor), key
    assert [path.name for path in killed.parent.iterdir()] == ["version_0"]
    assert not list(tmp_path.rglob("*.partial*"))


if __name__ == "__main__":
    all_runs(Path(sys.argv[1]))
