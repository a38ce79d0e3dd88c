"""What training scripts of this field have: every option in the table of docs/training.md, in a run of a moment."""

from __future__ import annotations

import csv
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_run import run

TABLE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
SETTINGS = re.findall(r"`(--[^`]+)`", "".join(line for line in TABLE.splitlines(True) if line.startswith("| ")))
LONGER = {"FindLearningRate": ["--trainer.limit_train_batches=4", "--trainer.max_epochs=6"]}
LOGGERS = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}


def test_there_is_a_table():
    assert len(SETTINGS) > 30


@pytest.mark.parametrize("setting", [s for s in SETTINGS if not any(name in s for name in LOGGERS)])
@pytest.mark.filterwarnings("ignore")
def test_a_setting_works(tmp_path, images, setting):
    small = setting.replace("inductor", "aot_eager")  # the compiler of C++ code takes its time
    longer = next((options for name, options in LONGER.items() if name in setting), [])
    assert run("fit", tmp_path, *images, *longer, *shlex.split(small)) == 0
    assert list(tmp_path.glob("tiny/version_0/checkpoints/best.ckpt"))


def first_row(run):
    return next(csv.DictReader((run / "metrics.csv").open()))


def preprocessing(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["preprocessing"]


EFFECTS = {
    "--trainer.callbacks+=Throughput": lambda run: float(first_row(run)["train/images_per_second"]) > 0,
    "--model.label_smoothing=0.1": lambda run: first_row(run)["train/loss_minimised"] != first_row(run)["train/loss"],
    "--model.class_weights=[1,2,0.5]": lambda run: (
        first_row(run)["train/loss_minimised"] != first_row(run)["train/loss"]
    ),
    "--data.size=[40,48]": lambda run: preprocessing(run)["size"] == [40, 48],
    "--data.mean=[0.1,0.2,0.3]": lambda run: preprocessing(run)["mean"] == [0.1, 0.2, 0.3],
    "--data.in_channels=1": lambda run: preprocessing(run)["in_channels"] == 1,
    "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitor=val/loss --trainer.callbacks.save_top_k=2": (
        lambda run: len(list((run / "checkpoints").iterdir())) == 4
    ),
    "--trainer.callbacks+=FindLearningRate --trainer.limit_train_batches=4 --trainer.max_epochs=6": (
        lambda run: first_row(run)["lr"] != "0.1"
    ),
}


@pytest.mark.parametrize("setting", EFFECTS)
@pytest.mark.filterwarnings("ignore")
def test_what_a_setting_leaves(tmp_path, images, setting):
    assert run("fit", tmp_path, *images, *shlex.split(setting)) == 0
    assert EFFECTS[setting](tmp_path / "tiny" / "version_0")


def test_what_the_data_decide_is_said(tmp_path, images, capsys):
    assert run("fit", tmp_path, *images, "--data.size=[40,48]", "--data.in_channels=1") == 0
    assert (
        "the data decide: images of 40×48 pixels with 1 channel, 3 classes (cat, dog, fox)" in capsys.readouterr().out
    )


@pytest.mark.parametrize("logger", LOGGERS)
def test_a_logger_that_is_not_installed_is_named_with_the_command_that_installs_it(tmp_path, images, capsys, logger):
    if find_spec(LOGGERS[logger]):
        pytest.skip(f"{LOGGERS[logger]} is installed")
    assert run("fit", tmp_path, *images, f"--trainer.logger={logger}") == 2
    assert f"pip install -U '{LOGGERS[logger]}" in capsys.readouterr().err


def test_further_loggers_get_the_same_and_the_folder_of_the_run_stays(tmp_path, images):
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'elsewhere'}"]
    assert run("fit", tmp_path, *images, *logger, "--trainer.log_every_n_steps=1") == 0
    assert (tmp_path / "tiny/version_0/metrics.csv").exists()
    (further,) = (tmp_path / "elsewhere").rglob("metrics.csv")
    assert "val/top1" in further.read_text()


REFUSED = {
    "model.network.in_channels=1": "model.network.in_channels is 1, and the data have 3: leave it out",
    "model.network.num_classes=7": "model.network.num_classes is 7, and the data have 3",
    "model.network.keep=features": "model.network.keep features is for networks that run efficiently",
    "model.freeze=features.denseblock9": "there is no features.denseblock9 in a DenseNet; write stem, blocks, backbone",
    "model.freeze=[backbone,classifier]": "leaves nothing to train",
    "model.unfreeze_at=1": "that model.freeze does not name",
    "model.freeze=stem --model.unfreeze_at=1 --trainer.devices=2 --trainer.strategy=ddp": "in one process alone",
    "model.rates='{head: 0.1}'": "no parameter's name begins with head; there are features, classifier",
    "model.rates='{features: -1}'": "must not be negative",
    "model.rates.features=0.1 --model.scheduler=OneCycleLR --model.scheduler.max_lr=1": "ignored by OneCycleLR",
    "model.warmup=-1": "model.warmup must be 0 or more",
    "model.warmup=2": "model.warmup 2 must be less than trainer.max_epochs 2",
    "model.warmup=1 --model.scheduler=OneCycleLR --model.scheduler.max_lr=1": "does not go together with OneCycleLR",
    "model.schedule_interval=step --model.scheduler=null": "give model.scheduler or model.warmup",
    "model.scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau --model.monitor=val/top1": "mode must be max",
    "model.monitor=val/nothing": "could not find the monitored key",
    "model.class_weights=[1,2]": "a positive number for each of 3 classes, not [1.0, 2.0]",
    "model.class_weights=heavy": "must be balanced, or a positive number for each of 3 classes",
    "model.weights=DEFAULT": "are those of a network with a name",
    "model.channels_last=maybe": "model.channels_last must be bool",
    "data.mixup=-1": "mixup and cutmix must be 0 or more",
    "data.val_fraction=2": "val_fraction must be above 0 and below 1",
    "data.smallest_crop=0.5": "smallest_crop is for images of more than 32 pixels",
    "data.std=[1,1,0]": "std must be above 0",
    "data.value_range=[5,5]": "value_range goes from a smaller value to a larger one",
    "data.augmentation+=torchvision.transforms.v2.NoSuch": "has no attribute 'NoSuch'",
    "trainer.callbacks+=FindLearningRate": "found in 20 steps or more, and the run has fewer",
}


@pytest.mark.parametrize("setting", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_contradicts_the_data_or_would_be_ignored_is_refused(tmp_path, images, capsys, setting):
    assert run("fit", tmp_path, *images, *shlex.split(f"--{setting}")) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("efficient-densenet: "))
    assert REFUSED[setting] in error
