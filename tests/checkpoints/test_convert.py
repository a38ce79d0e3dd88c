from __future__ import annotations

import os

import pytest
import torch

from efficient_densenet.checkpoints import convert_file, read_state_dict
from efficient_densenet.cli import main
from efficient_densenet.errors import UserError
from efficient_densenet.models import DenseNet

ARGUMENTS = {"num_init_features": 6, "growth_rate": 4, "block_config": (2, 1), "compression": 0.5, "bn_size": 2}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = DenseNet(**ARGUMENTS).state_dict()
    torch.save({"epoch": 2, "state_dict": {f"module.{name}": t for name, t in state.items()}}, "in.pth")
    return tmp_path


def convert(*options):
    return main(["convert", *options])


@pytest.mark.parametrize("to", ["efficient", "normal"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("efficient", [False, True])
def test_efficient_and_normal_load_into_either_network(folder, capsys, to, suffix, efficient):
    assert convert("--to", to, "--checkpoint", "in.pth", "--output", f"out{suffix}") == 0
    network = DenseNet(**ARGUMENTS, efficient=efficient)
    network.load_state_dict(read_state_dict(f"out{suffix}"), strict=True)
    assert sorted(os.listdir(folder)) == ["in.pth", f"out{suffix}"]
    printed = capsys.readouterr()
    assert printed.err == ""
    for said in ("names of efficient-densenet", "growth rate 4", "blocks of 2 1 layers", "100 classes", f"out{suffix}"):
        assert said in printed.out
    assert f"{len(network.state_dict())} tensors" in printed.out


def test_another_librarys_names_are_written_on_request(folder):
    assert convert("--to", "monai", "--checkpoint", "in.pth", "--output", "out.pth") == 0
    assert "class_layers.out.weight" in torch.load("out.pth")


def test_what_is_left_behind_is_said(folder, capsys):
    state = DenseNet(**ARGUMENTS).state_dict()
    torch.save(
        {"state_dict": {f"net.{name}": t for name, t in (state | {"attention": torch.ones(2)}).items()}}, "a.pth"
    )
    assert convert("--checkpoint", "a.pth", "--output", "out.pth") == 0
    printed = capsys.readouterr().out
    assert "behind the prefix 'state_dict.net.'" in printed
    assert "without  attention, which are no part of it" in printed


def test_weights_that_are_not_finite_are_written_where_that_is_allowed(folder):
    state = DenseNet(**ARGUMENTS).state_dict()
    torch.save(state | {"classifier.bias": torch.full((100,), torch.inf)}, "infinite.pth")
    assert convert("--checkpoint", "infinite.pth", "--allow-non-finite", "--output", "out.pth") == 0
    assert torch.load("out.pth")["classifier.bias"].isinf().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "none.pth", "--output", "out.pth"], "there is no file none.pth"),
        (["--checkpoint", ".", "--output", "out.pth"], "not a file"),
        (["--checkpoint", "cut.pth", "--output", "out.pth"], "cut short"),
        (["--checkpoint", "text.pth", "--output", "out.pth"], "not a checkpoint"),
        (["--checkpoint", "resnet.pth", "--output", "out.pth"], "its tensors are called conv1.weight, fc.weight"),
        (["--checkpoint", "infinite.pth", "--output", "out.pth"], "infinite or not a number: classifier.bias"),
        (["--checkpoint", "two.pth", "--output", "out.pth"], "prefixes 'left.', 'right.'; say which one"),
        (["--checkpoint", "two.pth", "--prefix", "middle", "--output", "out.pth"], "and not 'middle.'"),
        (["--checkpoint", "in.pth", "--ema", "--output", "out.pth"], "none is an average (EMA)"),
        (["--checkpoint", "lacking.pth", "--output", "out.pth"], "of its tensors are missing: "),
        (["--checkpoint", "in.pth", "--output", "in.pth"], "is the checkpoint itself"),
        (["--checkpoint", "in.pth", "--output", "./in.pth"], "is the checkpoint itself"),
        (["--checkpoint", "in.pth", "--output", "out.onnx"], "cannot tell the format"),
        (["--checkpoint", "in.pth", "--output", "nowhere/out.pth"], "create nowhere first"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing_behind(folder, capsys, options, message):
    data = (folder / "in.pth").read_bytes()
    (folder / "cut.pth").write_bytes(data[: len(data) // 2])
    (folder / "text.pth").write_text("hello")
    torch.save({"conv1.weight": torch.ones(1), "fc.weight": torch.ones(1)}, "resnet.pth")
    state = DenseNet(**ARGUMENTS).state_dict()
    torch.save({name: t for name, t in state.items() if ".norm2." not in name}, "lacking.pth")
    torch.save(state | {"classifier.bias": torch.full((100,), torch.inf)}, "infinite.pth")
    torch.save({f"{side}.{name}": t for side in ("left", "right") for name, t in state.items()}, "two.pth")
    before = sorted(os.listdir(folder))

    assert convert(*options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("efficient-densenet: error: ")
    assert error.count("\n") == 1
    assert sorted(os.listdir(folder)) == before
    assert (folder / "in.pth").read_bytes() == data


def test_a_full_disk_gets_one_line_and_leaves_nothing_behind(folder, capsys, monkeypatch):
    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert convert("--checkpoint", "in.pth", "--output", "out.pth") == 2
    error = capsys.readouterr().err
    assert error.startswith("efficient-densenet: error: cannot write out.pth: No space left on device; ")
    assert error.count("\n") == 1
    assert os.listdir(folder) == ["in.pth"]


def test_the_function_names_the_targets_it_has(folder):
    with pytest.raises(UserError, match=r"no target 'keras'; there are: efficient, normal"):
        convert_file("in.pth", "out.pth", to="keras")
