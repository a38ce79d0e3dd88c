"""Every wrong value is one sentence, and the exit code is 2."""

from __future__ import annotations

import resource
import sys

import pytest
import torch
from PIL import Image
from tiny_run import run

from efficient_densenet import DenseNet
from efficient_densenet.cli import main
from efficient_densenet.training.mistakes import fact_of, refuse_repeated_entries
from efficient_densenet.training.module import Classifier

SETTINGS = {
    "trainer.accelerator=quantum": "invalid accelerator name",
    "trainer.strategy=foo": "invalid strategy name",
    "trainer.strategy=fsdp": "requires a GPU",
    "trainer.devices=foo": "`devices`",
    "trainer.devices=-3": "`devices`",
    "trainer.num_nodes=0": "`num_nodes` must be a positive integer",
    "trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches must be at least 1, not 0",
    "trainer.val_check_interval=0": "trainer.val_check_interval must be more than 0, not 0",
    "trainer.val_check_interval=5000": "(5000) must be less than or equal to the number of the training batches (2)",
    "trainer.check_val_every_n_epoch=0": "must be at least 1, not 0",
    "trainer.check_val_every_n_epoch=7": "none of 2 epochs would be validated",
    "trainer.gradient_clip_val=-1": "trainer.gradient_clip_val must be at least 0, not -1",
    "trainer.max_epochs=0": "trainer.max_epochs must be at least 1, or -1 for no end, not 0",
    "trainer.max_epochs=x": "trainer.max_epochs must be int or NoneType, not x",
    "trainer.precision=13": "trainer.precision must be 64, 32, 16 or",
    "trainer.logger=NoLogger": "trainer.logger: there is no class NoLogger",
    "trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=nothing": "metric `nothing` which is not available",
    "trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitor=nothing": "could not find the monitored key",
    "seed_everything=-5": "seed_everything must be at least 0, not -5",
    "model.optimizer=SGD --model.optimizer.lr=-1": "Invalid learning rate: -1",
    "model.optimizer=SparseAdam": "does not support dense gradients",
    "model.scheduler=StepLR": "model.scheduler.step_size is required",
    "model.scheduler.T_max=0": "a number in the configuration is 0 and must be more",
    "model.schedule_interval=step": "model.scheduler.T_max is required, the number of steps",
    "model.network=datetime.datetime": "Expected 'datetime.datetime' to be a subclass of",
    "model.network=torch.nn.ReLU": "model.network makes a ReLU, which has no parameters to train",
    "model.network=no.such.thing": "model.network: No module named 'no'",
    "model.label_smoothing=x": "model.label_smoothing must be float, not x",
    "model.network.keep=all": "model.network.keep must be 'bottleneck', 'features', 'inputs' or 'auto', not all",
    "model.network.foo=1": "model.network has no option 'foo'",
    "model.optimizer.lr=1": "give one first, with --model.optimizer CLASS",
    "model.compile=nothing": "model.compile must be a backend of torch.compile, such as inductor, not 'nothing'",
    "data.batch_size=x": "data.batch_size must be int, not x",
    "data.augmentation+=torchvision.transforms.v2.RandomRotation": "data.augmentation.degrees is required",
    "model.weights=nothing.pth": "there is no file nothing.pth",
    "data=Foo": "data: there is no class Foo",
    "data=ImageFolder": "data.root is required",
    "name=a/b": "--name is the name of a folder, which 'a/b' cannot be",
    "modle.weights=a": "unrecognized arguments: --modle.weights=a",
}


def one_sentence(capsys) -> str:
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("efficient-densenet: ")]
    assert len(errors) == 1
    assert len(errors[0]) < 500
    return errors[0]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_value_is_named(tmp_path, capsys, setting):
    assert run("fit", tmp_path, *f"--{setting}".split()) == 2
    assert SETTINGS[setting] in one_sentence(capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "not text in UTF-8"),
        (b"model: [1", "Problems parsing config"),
        (b"model:\n\tnetwork: 1", "YAML is indented with spaces, and a tab is none"),
        (b"trainer: {max_epochs: 1}\ntrainer: {devices: 1}", "has the entry trainer twice: make one of the two"),
        (b"trainer: {max_epochs: 1, max_epochs: 2}", "has the entry max_epochs twice"),
        (b"", "a configuration has no sections, such as model, data and trainer"),
        (b"- model\n- data\n", "a configuration has no sections, such as model, data and trainer"),
        (None, "does not exist"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "a.yaml").write_bytes(content)
    assert main(["fit", "--config", str(tmp_path / "a.yaml")]) == 2
    assert message in one_sentence(capsys)


@pytest.mark.parametrize(
    "content",
    [
        "model: &a {network: [*a]}",
        "a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]" for i in range(1, 30)),
    ],
    ids=["itself", "many times"],
)
def test_entries_that_hold_each_other_are_looked_at_once(tmp_path, content):
    (tmp_path / "a.yaml").write_text(content)
    refuse_repeated_entries(tmp_path / "a.yaml")  # and ends


def test_a_machine_without_gpu_says_what_trains_there():
    assert fact_of("No supported gpu backend found!").endswith(
        "found on this machine; --trainer.accelerator cpu trains without"
    )


def test_no_configuration_at_all_is_named(capsys):
    assert main(["fit"]) == 2
    assert one_sentence(capsys) == "efficient-densenet: error: model.network is required"


def test_a_single_class_is_refused_and_no_folder_is_made(tmp_path, capsys):
    (tmp_path / "images" / "only").mkdir(parents=True)
    for number in range(5):
        Image.new("L", (8, 8), number).save(tmp_path / "images" / "only" / f"{number}.png")
    options = ["--data", "ImageFolder", "--data.root", str(tmp_path / "images"), "--data.size", "8"]
    assert run("fit", tmp_path, *options) == 2
    assert "a single class (only)" in one_sentence(capsys)
    assert not list(tmp_path.rglob("version_*"))


def test_an_optimiser_that_does_not_fit_the_checkpoint_is_refused(tmp_path, capsys):
    assert run("fit", tmp_path) == 0
    assert run("fit", tmp_path, "--ckpt_path=last", "--trainer.max_epochs=3", "--model.optimizer=Adam") == 2
    assert "optimiser is not the configuration's Adam" in one_sentence(capsys)


def test_out_of_memory_says_how_many_images_fit(tmp_path, capsys, monkeypatch):
    forward = Classifier.forward

    def small_memory(module, images):
        if len(images) > 20 and module.training:
            raise torch.OutOfMemoryError("out of memory")
        return forward(module, images)

    monkeypatch.setattr(Classifier, "forward", small_memory)
    assert run("fit", tmp_path) == 2
    message = one_sentence(capsys)
    assert "out of memory on cpu: 16 of 64 images fit" in message
    assert "--data.init_args.batch_size 16 and --trainer.accumulate_grad_batches 4" in message


@pytest.mark.parametrize("name", ["a.pt2", "a.onnx"])
@pytest.mark.filterwarnings("ignore")
def test_a_full_disk_during_export_is_a_sentence(tmp_path, capsys, monkeypatch, name):
    torch.save(DenseNet(num_init_features=16, block_config=(3, 3), num_classes=4).state_dict(), tmp_path / "a.pth")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would be cut short without a word
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
    try:
        assert main(["export", "--checkpoint", str(tmp_path / "a.pth"), "--output", str(tmp_path / name)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert f"error: cannot write {tmp_path / name}: " in one_sentence(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
