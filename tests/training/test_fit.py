"""Training from the command line: on real digits, for a moment."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image
from torch import nn

from efficient_densenet import DenseNet
from efficient_densenet.cli import main
from efficient_densenet.training.data import Digits
from efficient_densenet.training.module import Classifier

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = ["--config", str(CONFIGS / "digits.yaml"), "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
BRIEF = ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2"]


def fit(folder, *options, epochs=1):
    arguments = [*DIGITS, *BRIEF, "--trainer.default_root_dir", str(folder), "--trainer.max_epochs", str(epochs)]
    return main(["fit", *arguments, *options])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of two epochs."""
    folder = tmp_path_factory.mktemp("runs")
    assert fit(folder, epochs=2) == 0
    return folder / "digits" / "version_0"


def test_a_run_leaves_its_results(run):
    rows = (run / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3
    assert {"val/loss", "val/top1", "val/top5", "train/loss", "lr"} <= set(rows[0].split(","))
    for name in ("curves.png", "confusion_matrix_validation.png"):
        assert min(Image.open(run / name).size) > 300
    assert list(run.glob("events.out.tfevents*"))
    assert (run / "config.yaml").exists()
    assert {file.name for file in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_a_resumed_run_ends_like_an_unbroken_one(run, tmp_path):
    assert fit(tmp_path, epochs=1) == 0
    assert fit(tmp_path, "--ckpt_path", "last", epochs=2) == 0
    ends = [folder / "checkpoints/last.ckpt" for folder in (run, tmp_path / "digits" / "version_0")]
    unbroken, resumed = (torch.load(end, weights_only=True) for end in ends)
    assert resumed["epoch"] == unbroken["epoch"] == 1
    assert resumed["global_step"] == unbroken["global_step"] == 6
    assert resumed["lr_schedulers"] == unbroken["lr_schedulers"]
    for key, tensor in unbroken["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], tensor), key


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_is_evaluated(run, command, capsys):
    options = [*DIGITS, "--trainer.default_root_dir", str(run.parents[1])]
    assert main([command, *options]) == 0
    assert "top1" in capsys.readouterr().out


def test_predict_prints_the_top_classes(run, tmp_path, capsys):
    for i in range(3):
        Image.new("L", (8, 8), 60 * i).save(tmp_path / f"{i}.png")
    assert main(["predict", "--checkpoint", str(run / "checkpoints/best.ckpt"), str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(".png")] == [str(tmp_path / f"{i}.png") for i in range(3)]
    assert len(lines) == 3 * 6


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
@pytest.mark.filterwarnings("ignore")
def test_export_agrees_with_the_network(run, tmp_path, capsys, name):
    options = ["--checkpoint", str(run / "checkpoints/best.ckpt"), "--output", str(tmp_path / name)]
    assert main(["export", *options]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_understood(config, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(config), "--print_config"])
    assert end.value.code in (0, None)
    assert "efficient: true" in capsys.readouterr().out


def one_line_of_error(capsys):
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("efficient-densenet: error")]
    assert len(error) == 1
    return error[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.epochs", "3"], "trainer.epochs"),
        (["--model.network.init_args.compression", "1.5"], "compression must be a number above 0"),
        (["--model.network.init_args.block_config", "[]"], "block_config needs at least one block"),
        (["--model.network.init_args.block_config", "[1,1,1,1,1,1]"], "too small for this network"),
        (["--data.init_args.batch_size", "0"], "batch_size must be at least 1"),
        (["--data", "ImageFolder", "--data.root", "nowhere"], "there is no folder nowhere"),
        (["--data", "CIFAR10", "--data.root", "nowhere"], "nowhere"),
        (["--ckpt_path", "nothing.ckpt"], "there is no checkpoint nothing.ckpt"),
        (["--trainer.accelerator", "gpu", "--trainer.devices", "7,"], "gpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, options, message):
    if "gpu" in options and torch.cuda.device_count() > 7:
        pytest.skip("GPU 7 is there")
    assert fit(tmp_path, *options) == 2
    assert message in one_line_of_error(capsys)


def test_a_checkpoint_of_another_network_is_refused(run, tmp_path, capsys):
    options = ["--ckpt_path", str(run / "checkpoints/last.ckpt"), "--model.network.init_args.growth_rate", "8"]
    before = (run / "checkpoints/last.ckpt").read_bytes()
    assert fit(tmp_path, *options, epochs=3) == 2
    assert "of another network" in one_line_of_error(capsys)
    assert (run / "checkpoints/last.ckpt").read_bytes() == before


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, capsys, monkeypatch):
    assert fit(tmp_path) == 0
    last = tmp_path / "digits/version_0/checkpoints/last.ckpt"
    before = last.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert fit(tmp_path, "--ckpt_path", "last", epochs=2) == 2
    assert "No space left on device" in one_line_of_error(capsys)
    assert last.read_bytes() == before
    assert not list(tmp_path.rglob("*partial*"))


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def train(network, batch_size=64, steps=6, **options):
    """The module after some steps on the digits, and the loss of each."""
    seed_everything(1)
    module, losses = Classifier(network, lambda parameters: torch.optim.SGD(parameters, lr=0.1)), Losses()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=steps, callbacks=[losses], **quiet, **options)
    trainer.fit(module, datamodule=Digits(batch_size=batch_size, num_workers=0))
    return module, losses.values


def test_recomputation_gives_the_same_loss_at_every_step_to_the_last_bit():
    small = {"num_init_features": 8, "growth_rate": 4, "block_config": (2, 2), "bn_size": 2, "drop_rate": 0.2}
    ordinary, recomputed = (
        train(lambda efficient=efficient, **data: DenseNet(**small, **data, efficient=efficient))[1]
        for efficient in (False, "recompute")
    )
    assert len(ordinary) == 6
    assert ordinary == recomputed


def test_a_split_batch_steps_by_the_average_gradient():
    def network(in_channels, num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))

    whole, _ = train(network, batch_size=64, steps=2)
    split, losses = train(network, batch_size=16, steps=2, accumulate_grad_batches=4)
    assert len(losses) == 8
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_two_processes_train_together(tmp_path):
    options = [*DIGITS[:-1], "2", *BRIEF, "--trainer.max_epochs", "1", "--trainer.default_root_dir", str(tmp_path)]
    command = [sys.executable, "-m", "efficient_densenet", "fit", *options, "--trainer.strategy", "ddp"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "digits/version_0/checkpoints/last.ckpt").exists()


def test_a_memory_limit_decides_what_is_kept_and_the_pieces_of_a_batch(tmp_path, capsys):
    efficient = ["--model.network.efficient", "true", "--model.network.keep", "inputs"]
    assert tiny_run.run("fit", tmp_path, "--memory", "1GB", *efficient) == 0
    assert 'memory decides: keep="bottleneck": a step of 64 images needs' in capsys.readouterr().out
    assert (
        tiny_run.run("fit", tmp_path, "--memory", "200kB", "--trainer.limit_train_batches", "4", "--name", "less") == 0
    )
    told = capsys.readouterr().out
    assert "each batch of 64 in" in told and "pieces, whose gradients are added up" in told
    needed = {}
    for precision in ("32-true", "64-true", "bf16-true"):
        options = [*efficient, "--trainer.precision", precision, "--trainer.fast_dev_run", "true"]
        assert tiny_run.run("fit", tmp_path, "--memory", "1GB", *options) == 0
        needed[precision] = float(re.search(r"images needs ([\d.]+) MB", capsys.readouterr().out)[1])
    assert needed["64-true"] == pytest.approx(2 * needed["32-true"], rel=0.2)
    assert needed["bf16-true"] < needed["32-true"]
    assert tiny_run.run("fit", tmp_path, "--memory", "1GB", "--model.network.efficient", "recompute") == 2
    assert "set model.network.efficient to true" in capsys.readouterr().err
    assert tiny_run.run("fit", tmp_path, "--memory", "10kB") == 2
    assert "use smaller images, or more memory" in capsys.readouterr().err
