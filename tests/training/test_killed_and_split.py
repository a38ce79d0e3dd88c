"""Runs that are killed, batches that are split, and the trainer's options."""

from __future__ import annotations

import os
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from forks import FORKS
from lightning.pytorch import Trainer, seed_everything
from tiny_run import begin_fit
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Subset

from efficient_densenet import DenseNet
from efficient_densenet.cli import main
from efficient_densenet.training.data import Digits
from efficient_densenet.training.module import Classifier

TINY = """
model:
  network:
    class_path: efficient_densenet.DenseNet
    init_args: {num_init_features: 8, growth_rate: 4, block_config: [1, 1], drop_rate: 0.2}
  scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: 6}}
data: {class_path: Digits, init_args: {num_workers: 0}}
trainer: {accelerator: cpu, devices: 1, max_epochs: 6, limit_train_batches: 8}
"""


@pytest.fixture
def tiny(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    return config


def test_a_killed_run_goes_on_from_its_last_checkpoint_as_if_nothing_had_happened(tiny, tmp_path):
    def command(root):
        folder = ["--trainer.default_root_dir", str(tmp_path / root)]
        return ["fit", "--config", str(tiny), *folder, "--ckpt_path", "last"]

    def run_folder(root):
        return tmp_path / root / "tiny" / "version_0"

    def last(root):
        return run_folder(root) / "checkpoints" / "last.ckpt"

    (tmp_path / "killed").mkdir()
    killed = begin_fit(tmp_path / "output", TINY, tmp_path / "killed", "--ckpt_path", "last")
    deadline = time.monotonic() + 120
    while not last("killed").exists() and killed.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert torch.load(last("killed"), weights_only=True)["epoch"] < 5  # whole, and from before the end

    for root in ("killed", "unbroken"):
        assert main(command(root)) == 0
    resumed, unbroken = (torch.load(last(root), weights_only=True) for root in ("killed", "unbroken"))
    assert resumed["global_step"] == unbroken["global_step"] == 48
    for key, tensor in unbroken["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], tensor), key
    assert (run_folder("killed") / "metrics.csv").read_text() == (run_folder("unbroken") / "metrics.csv").read_text()
    assert not (tmp_path / "killed/tiny/version_1").exists()


class SameImages(Digits):
    """The same 64 images in every epoch, without augmentation."""

    def train_dataloader(self) -> DataLoader:
        return self._loader(Subset(self.splits.val, range(64)))


class FrozenNorms(Classifier):
    """The images of a batch do not influence each other, so splitting it changes nothing but the order of sums."""

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()


def weights_after_a_step(batch_size: int = 64, **options) -> dict[str, Tensor]:
    """Of a network that has made one step on `SameImages`."""
    seed_everything(3, verbose=False)
    network = partial(DenseNet, num_init_features=8, growth_rate=4, block_config=(1, 1))
    module = FrozenNorms(network, partial(torch.optim.SGD, lr=0.5))
    no_output = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, limit_val_batches=0, enable_model_summary=False, **no_output, **options
    )
    trainer.fit(module, datamodule=SameImages(batch_size=batch_size, num_workers=0))
    assert trainer.global_step == 1
    return module.network.state_dict()


@pytest.mark.parametrize(
    ("batch_size", "planned_pieces"),
    [(16, 4), (16, 6), (24, 3)],
    ids=["a whole batch in four pieces", "an epoch that ends two pieces early", "an epoch that ends in a smaller one"],
)
def test_accumulation_steps_by_the_average_gradient(batch_size, planned_pieces):
    whole = weights_after_a_step(devices=1)
    split = weights_after_a_step(devices=1, batch_size=batch_size, accumulate_grad_batches=planned_pieces)
    torch.testing.assert_close(split, whole)


def test_two_processes_step_by_the_average_gradient(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKS.Process(target=step_as, args=(rank, port, tmp_path), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]
    whole = weights_after_a_step(devices=1)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"rank{rank}", weights_only=True), whole)


def step_as(rank: int, port: int, folder: Path) -> None:
    """The step of one of two processes, which are started as by a cluster, not by Lightning."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.save(weights_after_a_step(devices=2, strategy="ddp"), folder / f"rank{rank}")
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.precision", "bf16-mixed"],
        ["--trainer.gradient_clip_val", "0.1"],
        ["--trainer.accumulate_grad_batches", "3"],
        ["--trainer.sync_batchnorm", "true"],
        ["--model.channels_last", "true"],
        ["--model.scheduler", "CosineAnnealingWarmRestarts", "--model.scheduler.T_0", "1"],
        ["--model.scheduler", "MultiStepLR", "--model.scheduler.milestones", "[1]"],
        [
            *("--model.schedule_interval", "step", "--model.scheduler", "CyclicLR"),
            *("--model.scheduler.base_lr", "0.01", "--model.scheduler.max_lr", "0.1"),
        ],
    ],
    ids=lambda options: options[0] if len(options) == 2 else options[-3],
)
def test_options_of_the_trainer(tiny, tmp_path, options):
    brief = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    assert main(["fit", "--config", str(tiny), "--trainer.default_root_dir", str(tmp_path), *brief, *options]) == 0
    assert (tmp_path / "tiny/version_0/checkpoints/best.ckpt").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "cut short"), (b"not a checkpoint at all", "not a checkpoint")],
)
def test_a_damaged_checkpoint_is_refused(tiny, tmp_path, capsys, content, message):
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(content)
    arguments = ["--config", str(tiny), "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", str(damaged)]
    assert main(["fit", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_validation_without_a_checkpoint_says_what_to_do(tiny, tmp_path, capsys):
    assert main(["validate", "--config", str(tiny), "--trainer.default_root_dir", str(tmp_path)]) == 2
    assert "train first" in capsys.readouterr().err


def test_batch_norm_across_processes_needs_gpus(tiny, tmp_path, capsys):
    folder = ["--trainer.default_root_dir", str(tmp_path)]
    together = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.sync_batchnorm", "true"]
    assert main(["fit", "--config", str(tiny), *folder, *together]) == 2
    assert "sync_batchnorm works on GPUs alone" in capsys.readouterr().err
