"""Fifteen kills, eight of them while a checkpoint is written over an older one."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import torch
from tiny_run import begin_fit

CONFIG = """
model:
  network:
    class_path: efficient_densenet.DenseNet
    init_args: {num_init_features: 8, growth_rate: 4, block_config: [1, 1], drop_rate: 0.2}
  scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR}
data: {class_path: Digits, init_args: {num_workers: 0, batch_size: 8}}
trainer: {accelerator: cpu, devices: 1, max_epochs: 50, limit_train_batches: 2, limit_val_batches: 1}
"""


def run(root: Path, *first):
    """The process of a run that goes on in the folder `root`."""
    root.mkdir(exist_ok=True)
    return begin_fit(root.parent / "output", CONFIG, root, "--ckpt_path", "last", first=first)


def exit_code(process) -> int:
    process.join(100)
    return process.exitcode


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


def all_runs(folder: Path) -> None:
    assert exit_code(run(folder / "unbroken")) == 0, (folder / "output").read_text()
    generator = random.Random(3)
    kills = ["writing"] * 8 + ["anywhere"] * 7
    generator.shuffle(kills)
    last = folder / "killed" / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    for kill in kills:
        if kill == "writing":
            number, share = generator.choice((1, 2)) + (not last.exists()), generator.random()
            process = run(folder / "killed", partial(die_at_checkpoint, number, share))
        else:
            process, before = run(folder / "killed"), written(last)
            if generator.random() < 0.7:  # later than when it begins
                while written(last) == before and process.is_alive():
                    time.sleep(0.001)
            time.sleep(0.05 * generator.random())
            os.kill(process.pid, signal.SIGKILL)
        status = exit_code(process)
        assert status == -signal.SIGKILL, (kill, status, (folder / "output").read_text())
        if kill == "writing":
            torch.load(last, weights_only=True)  # the older one is whole
            assert list(last.parent.glob(".last.*.partial.ckpt"))
    assert exit_code(run(folder / "killed")) == 0, (folder / "output").read_text()


def test_a_run_that_was_killed_fifteen_times_ends_as_the_unbroken_one(tmp_path):
    all_runs(tmp_path)
    unbroken, killed = (tmp_path / name / "tiny" / "version_0" for name in ("unbroken", "killed"))
    assert (killed / "metrics.csv").read_text() == (unbroken / "metrics.csv").read_text()
    for name in ("best", "last"):
        a, b = (torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in (unbroken, killed))
        assert a["epoch"] == b["epoch"]
        for key, tensor in a["state_dict"].items():
            assert torch.equal(b["state_dict"][key], tensor), key
    assert [path.name for path in killed.parent.iterdir()] == ["version_0"]
    assert not list(tmp_path.rglob("*.partial*"))
