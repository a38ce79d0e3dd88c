"""What could go wrong without a word: it is said, refused or done right."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from PIL import Image
from tiny_run import CONFIG, begin_fit, run

from efficient_densenet import DenseNet
from efficient_densenet.errors import UserError
from efficient_densenet.files import _HOST, remove_left_over, replacing
from efficient_densenet.training import plots, runs
from efficient_densenet.training.data.images import read_image
from efficient_densenet.training.facts import refuse_other_classes
from efficient_densenet.training.predict import image_files


def rows(folder):
    return list(csv.DictReader((folder / "metrics.csv").open()))


def test_runs_that_begin_together_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: runs.claim_folder(tmp_path / "runs"), range(40)))
    assert sorted(folders) == sorted(tmp_path / "runs" / f"version_{number}" for number in range(40))


def test_the_folder_is_printed_and_can_be_named(tmp_path, capsys):
    assert run("fit", tmp_path, "--name", "mine") == 0
    printed = capsys.readouterr().out
    assert f"this run writes to {tmp_path}/mine/version_0\n" in printed
    assert printed.endswith(f"this run is in {tmp_path}/mine/version_0\n")
    assert run("validate", tmp_path, "--name", "mine") == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_its_exit_code(tmp_path, number, code):
    options = ["--trainer.max_epochs=100000", "--model.scheduler=null"]
    process = begin_fit(tmp_path / "output", CONFIG, tmp_path, *options)
    last = tmp_path / "tiny/version_0/checkpoints/last.ckpt"
    deadline = time.monotonic() + 100
    while not last.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    output = (tmp_path / "output").read_text()
    assert process.exitcode == code, output
    assert "Traceback" not in output
    assert f"this run was stopped; it is in {tmp_path}/tiny/version_0; --ckpt_path last goes on" in output
    torch.load(last, weights_only=True)
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    options = ["--model.optimizer=SGD", "--model.optimizer.lr=1e30"]
    assert run("fit", tmp_path, *options) == 2
    assert "the loss became infinite or not a number in epoch 1" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))
    assert run("fit", tmp_path, *options, "--model.stop_when_not_finite=false") == 0


def test_a_schedule_that_follows_a_metric_counts_the_last_epoch_before_a_stop(tmp_path):
    options = ["--model.scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau", "--model.scheduler.factor=0.5"]
    options += ["--model.scheduler.patience=0", "--model.scheduler.threshold=1e9"]  # no epoch is better than another
    assert run("fit", tmp_path, *options) == 0
    assert run("fit", tmp_path, *options, "--ckpt_path=last", "--trainer.max_epochs=4") == 0
    assert [float(row["lr"]) for row in rows(tmp_path / "tiny/version_0")] == [0.1, 0.05, 0.025, 0.0125]


def test_a_resumed_run_follows_its_configuration_and_says_so(tmp_path, capsys):
    sgd = ["--model.optimizer=SGD", "--model.scheduler=null"]
    assert run("fit", tmp_path, *sgd, "--model.optimizer.lr=0.1") == 0
    capsys.readouterr()
    resumed = ["--ckpt_path=last", "--trainer.max_epochs=3"]
    assert run("fit", tmp_path, *sgd, *resumed, "--model.optimizer.lr=0.01", "--model.optimizer.weight_decay=0.5") == 0
    said = "".join(capsys.readouterr())
    assert "resuming with lr 0.01, as configured; the checkpoint has 0.1" in said
    assert "resuming with weight_decay 0.5, as configured; the checkpoint has 0" in said
    assert [float(row["lr"]) for row in rows(tmp_path / "tiny/version_0")] == [0.1, 0.1, 0.01]


def test_a_resumed_run_with_the_same_configuration_says_nothing(tmp_path, capsys):
    assert run("fit", tmp_path) == 0
    capsys.readouterr()
    assert run("fit", tmp_path, "--ckpt_path=last") == 0
    assert "resuming with" not in "".join(capsys.readouterr())


def test_a_schedule_is_as_long_as_the_training_also_of_a_run_that_goes_on_longer(tmp_path):
    assert run("fit", tmp_path, "--trainer.max_epochs=2") == 0
    assert [float(row["lr"]) for row in rows(tmp_path / "tiny/version_0")] == pytest.approx([0.1, 0.05])
    assert run("fit", tmp_path, "--trainer.max_epochs=4", "--ckpt_path=last") == 0
    assert run("fit", tmp_path, "--trainer.max_epochs=4") == 0
    longer, fresh = ([float(row["lr"]) for row in rows(tmp_path / f"tiny/version_{n}")] for n in (0, 1))
    assert longer[2:] == fresh[2:]
    assert run("fit", tmp_path, "--trainer.max_epochs=2", "--model.scheduler.T_max=100") == 0
    assert float(rows(tmp_path / "tiny/version_2")[1]["lr"]) > 0.09


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".last.{_HOST}-{dead.pid}.partial.ckpt"
    others = [tmp_path / f".last.{_HOST}-{os.getppid()}.partial.ckpt", tmp_path / ".last.elsewhere-1.partial.ckpt"]
    for path in (left, *others):
        path.touch()
    with replacing(tmp_path / "last.ckpt") as beside:
        beside.write_bytes(b"new")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "last.ckpt", *others])
    left.touch()
    remove_left_over(tmp_path.iterdir())
    assert not left.exists()


def test_test_says_what_it_measured(tmp_path, capsys):
    assert run("fit", tmp_path) == 0
    assert run("test", tmp_path) == 0
    assert "measured on 599 validation images (there is no test set)" in capsys.readouterr().out
    # A share: "1" is one batch or all of them, as the order in which typing was asked for Union[int, float] has it.
    assert run("test", tmp_path, "--trainer.limit_test_batches", "0.1") == 0
    assert "measured on 64 validation images" in capsys.readouterr().out


def test_fit_says_how_large_the_network_is_and_how_much_of_it_is_trained(tmp_path, capsys):
    assert run("fit", tmp_path, "--trainer.fast_dev_run", "true", "--model.freeze", "backbone") == 0
    network = DenseNet(1, 8, 4, (1, 1), num_classes=10)
    total, head = (sum(p.numel() for p in part.parameters()) for part in (network, network.classifier))
    printed = capsys.readouterr().out
    assert f"the network: DenseNet, {total:,} parameters, of which {head:,} are trained\n" in printed
    assert "FLOPs" not in printed


def test_weights_of_other_programs_are_measured(tmp_path, capsys):
    state = DenseNet(1, 8, 4, (1, 1), num_classes=10).state_dict()
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "theirs.pth")
    assert run("validate", tmp_path, "--ckpt_path", str(tmp_path / "theirs.pth")) == 0
    assert run("fit", tmp_path, "--ckpt_path", str(tmp_path / "theirs.pth")) == 2
    assert "to start from its weights, give --model.weights" in capsys.readouterr().err
    assert run("fit", tmp_path, "--model.weights", str(tmp_path / "theirs.pth"), "--trainer.max_epochs=1") == 0
    torch.save(DenseNet(1, 8, 4, (1, 1), num_classes=9).state_dict(), tmp_path / "nine.pth")
    assert run("validate", tmp_path, "--ckpt_path", str(tmp_path / "nine.pth")) == 2
    assert "weights of another network" in capsys.readouterr().err


def test_names_of_classes_are_drawn_as_they_are(tmp_path):
    names = ["$x_{$", "a" * 200, "two\nlines", "\N{CJK UNIFIED IDEOGRAPH-72AC}"]
    with pytest.warns(UserWarning, match="missing from font"):
        plots.confusion_matrix(torch.eye(4), names, "Confusion matrix", tmp_path / "a.png")
    assert min(Image.open(tmp_path / "a.png").size) > 400


def test_other_classes_are_refused_and_other_sizes_are_said(tmp_path, capsys, images):
    folder = tmp_path / "images"
    shutil.copytree(images[images.index("--data.root") + 1], folder)
    options = [*images, "--data.root", str(folder), "--trainer.max_epochs=1"]
    assert run("fit", tmp_path, *options) == 0
    assert run("validate", tmp_path, *options[:-1], "--data.size=28") == 0
    assert "images with size 28, as configured; the checkpoint was trained with 32" in capsys.readouterr().out
    (folder / "cat").rename(folder / "gnu")
    for command in ("fit", "validate", "test"):
        assert run(command, tmp_path, *options[: None if command == "fit" else -1], "--ckpt_path=last") == 2
        assert "for other classes than the data have, 'cat' in the place of 'dog'" in capsys.readouterr().err


def test_images_that_were_trained_on_are_not_validated(tmp_path, capsys, images):
    folder = tmp_path / "images"
    shutil.copytree(images[images.index("--data.root") + 1], folder)
    options = [*images, "--data.root", str(folder)]
    assert run("fit", tmp_path, *options, "--trainer.max_epochs=1") == 0
    for command, other in (("fit", "seed=1"), ("validate", "seed=1"), ("test", "val_fraction=0.5")):
        assert run(command, tmp_path, *options, f"--data.{other}", "--ckpt_path=last") == 2
        assert "it would be validated on images that it was trained on; give the same" in capsys.readouterr().err
    shutil.copy(folder / "cat/0.png", folder / "cat/new.png")
    assert run("validate", tmp_path, *options) == 0
    assert "37 images are divided, and 36 were when the checkpoint was trained" in capsys.readouterr().out


def test_a_test_set_of_its_own_is_measured_whatever_is_held_out(tmp_path, capsys, images):
    source = images[images.index("--data.root") + 1]
    for part in ("train", "test"):
        shutil.copytree(source, tmp_path / "images" / part)
    options = [*images, "--data.root", str(tmp_path / "images")]
    assert run("fit", tmp_path, *options, "--trainer.max_epochs=1") == 0
    assert run("test", tmp_path, *options, "--data.seed=1") == 0
    assert "measured on 36 test images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("trained", "given", "message"),
    [
        (["cat", "dog"], ["cat", "gnu"], "'dog' in the place of 'gnu' for one"),
        (["cat", "dog"], ["dog", "cat"], "'cat' in the place of 'dog' for one"),
        (["cat", "dog"], ["cat", "dog", "fish"], "for 2 classes and the data have 3: "),
        (["0", "1"], ["cat", "dog", "fish"], "for 2 classes and the data have 3: "),
        (["cat", "dog", "fish"], ["0", "1"], "for 3 classes and the data have 2: "),
        (["cat", "dog"], ["cat", "dog"], None),
        (["0", "1"], ["cat", "dog"], None),  # numbers are no names
        (None, ["cat", "dog"], None),  # a checkpoint of another program
    ],
)
def test_classes_of_a_checkpoint(trained, given, message):
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        refuse_other_classes(trained, given, "a.ckpt")


def test_label_smoothing_has_a_column_of_its_own(tmp_path):
    assert run("fit", tmp_path, "--model.label_smoothing=0.5", "--trainer.max_epochs=1") == 0
    (row,) = rows(tmp_path / "tiny/version_0")
    assert float(row["train/loss_minimised"]) != float(row["train/loss"])
    assert run("fit", tmp_path, "--trainer.max_epochs=1") == 0
    (plain,) = rows(tmp_path / "tiny/version_1")
    assert "train/loss_minimised" not in plain


@pytest.mark.filterwarnings("ignore")
def test_processes_that_are_spawned_read_what_lightning_writes_for_them(tmp_path, monkeypatch):
    # They get as much as spawned ones, and are forks of a process that has imported what they need (see `tiny_run`).
    monkeypatch.setitem(StrategyRegistry["ddp_spawn"]["init_params"], "start_method", "forkserver")
    options = ["--trainer.strategy=ddp_spawn", "--trainer.devices=2", "--trainer.max_epochs=1"]
    assert run("fit", tmp_path, *options) == 0
    assert (tmp_path / "tiny/version_0/checkpoints/last.ckpt").exists()


def test_images_are_turned_as_their_exif_data_say(tmp_path):
    image = Image.new("RGB", (4, 2), "red")
    image.putpixel((0, 0), (0, 0, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90° clockwise
    image.save(tmp_path / "a.png", exif=exif)
    turned = read_image(tmp_path / "a.png")
    assert turned.size == (2, 4)
    assert turned.getpixel((1, 0)) == (0, 0, 255)


def test_hidden_files_are_no_images(tmp_path):
    for name in ("a.png", "._a.png", ".hidden/b.png", "c/.ipynb_checkpoints/d.png", "c/d.PNG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(tmp_path / name)
    assert list(image_files([tmp_path])) == [tmp_path / "a.png", tmp_path / "c/d.PNG"]


def test_images_in_folders_that_are_links_are_predicted(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "elsewhere/a.gif")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/linked").symlink_to(tmp_path / "elsewhere")
    assert list(image_files([tmp_path / "new"])) == [tmp_path / "new/linked/a.gif"]
