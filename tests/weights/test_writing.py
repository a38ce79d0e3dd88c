from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from efficient_densenet.errors import UserError
from efficient_densenet.weights.canonical import read_state_dict
from efficient_densenet.weights.writing import write_state_dict

LAYER = "features.denseblock1.denselayer1"
STATE = {f"{LAYER}.a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "c": torch.ones(2).half()}


def assert_state(actual, expected=STATE):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_what_is_written_is_read(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    write_state_dict(STATE, path)
    assert_state(read_state_dict(path))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_shared_and_strided_tensors_are_written_each_by_itself(tmp_path, suffix):
    large = torch.randn(2, 3, 100, 100)
    state = {
        f"{LAYER}.view": large[0, 0, 0, :4],
        "tied": large[0, 0, 0, :4],
        "channels_last": large[:, :, :2, :2].contiguous(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(5),
        "trained": nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / f"weights{suffix}"
    write_state_dict(state, path)
    assert_state(read_state_dict(path), {name: tensor.detach() for name, tensor in state.items()})
    assert path.stat().st_size < 20_000  # the views do not drag the large tensor along


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("weights.onnx", "ends? in .pth"),
        ("weights", "ends? in .pth"),
        ("nowhere/weights.pth", "does not exist"),
        ("folder.pth", "is not a file"),
    ],
)
def test_a_bad_output_is_refused(tmp_path, output, message):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(UserError, match=message):
        write_state_dict(STATE, tmp_path / output)
    assert os.listdir(tmp_path) == ["folder.pth"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix, function):
    path = tmp_path / f"weights{suffix}"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        write_state_dict(STATE, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]
