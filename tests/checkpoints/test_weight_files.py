from __future__ import annotations

import os
import pickle
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

from efficient_densenet.checkpoints import read_state_dict, write_state_dict
from efficient_densenet.errors import MissingExtraError, UserError

STATE = {"features.a": torch.arange(6.0).view(2, 3), "head.b": torch.tensor(3), "head.c": torch.ones(2).half()}


class Payload:
    """Unpickling it creates the folder `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


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
        "view": large[0, 0, 0, :4],
        "tied": large[0, 0, 0, :4],
        "channels_last": large[:, :, :2, :2].contiguous(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(5),
        "trained": nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / f"weights{suffix}"
    write_state_dict(state, path)
    assert_state(read_state_dict(path), {name: tensor.detach() for name, tensor in state.items()})
    assert path.stat().st_size < 20_000  # the views do not drag the large tensor along


@pytest.mark.parametrize("entry", ["state_dict", "model_state_dict", "model", "net", "network"])
def test_a_training_checkpoint_holds_the_state_dict_under_a_usual_name(tmp_path, entry):
    torch.save(
        {"epoch": 3, "optimizer": {"state": {}, "param_groups": []}, entry: OrderedDict(STATE)}, tmp_path / "a.tar"
    )
    assert_state(read_state_dict(tmp_path / "a.tar"))


def test_a_state_dict_may_lie_deeper_and_beside_a_configuration(tmp_path):
    torch.save({"model": {"name": "densenet"}, "state": {"net": STATE}}, tmp_path / "a.pt")
    assert_state(read_state_dict(tmp_path / "a.pt"))


def test_a_lightning_checkpoint_is_read(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(OrderedDict(features=nn.Linear(2, 3), head=nn.Linear(3, 1)))

    module = Module()
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "epoch=1.ckpt")
    assert_state(read_state_dict(tmp_path / "epoch=1.ckpt"), module.network.state_dict())


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "network.", "module._orig_mod.model.densenet121."]
)
def test_wrappers_are_taken_off_the_names(tmp_path, prefix):
    torch.save({prefix + name: tensor for name, tensor in STATE.items()}, tmp_path / "a.pth")
    assert_state(read_state_dict(tmp_path / "a.pth"))


def test_the_features_of_an_encoder_are_no_wrapper(tmp_path):
    state = {"features.conv0.weight": torch.ones(1), "features.norm0.weight": torch.ones(1)}
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "a.pth")
    assert_state(read_state_dict(tmp_path / "a.pth"), state)


def test_a_file_of_the_format_before_zip_is_read(tmp_path):
    torch.save(STATE, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert_state(read_state_dict(tmp_path / "a.pth"))


def saved(content, **options):
    return lambda path: torch.save(content, path, **options)


def cut(fraction, suffix=".pth", **options):
    def write(path):
        if suffix == ".safetensors":
            write_state_dict({"a": torch.randn(100, 100)}, path)
        else:
            torch.save({"a": torch.randn(100, 100)}, path, **options)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * fraction)])

    return write


def torchscript(path):
    traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    traced.save(str(path))


OLD = {"_use_new_zipfile_serialization": False}
BAD_FILES = {
    "missing": (lambda path: None, "there is no file"),
    "folder": (lambda path: path.mkdir(), "is not a file"),
    "empty": (lambda path: path.touch(), "not a checkpoint"),
    "text": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "not a checkpoint"),
    "web page": (lambda path: path.write_text("<html>not found</html>"), "not a checkpoint"),
    "cut": (cut(0.5), "cut short"),
    "cut at the end": (cut(0.999), "cut short"),
    "cut, old format": (cut(0.5, **OLD), "cut short"),
    "cut early, old format": (cut(0.001, **OLD), "cut short"),
    "module": (saved(nn.Linear(2, 2)), "torch.nn.modules.linear.Linear besides weights.*model.state_dict()"),
    "module, old format": (
        saved(nn.Linear(2, 2), **OLD),
        "Python objects or damaged bytes besides weights.*model.state_dict()",
    ),
    "torchscript": (torchscript, "TorchScript"),
    "list": (saved([torch.ones(2)]), "holds no state dict"),
    "no tensors": (saved({"epoch": 1, "args": "none", "lr": 0.1, "x": 1}), "holds no state dict.*epoch.*and 1 more"),
    "numbers for names": (saved({0: torch.ones(2)}), "holds no state dict"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named_in_one_line(tmp_path, kind):
    write, message = BAD_FILES[kind]
    path = tmp_path / "bad.pth"
    write(path)
    with pytest.raises(UserError, match=message) as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fraction", [0, 0.001, 0.5, 0.999])
def test_a_cut_safetensors_file_is_named(tmp_path, fraction):
    path = tmp_path / "a.safetensors"
    cut(fraction, ".safetensors")(path)
    with pytest.raises(UserError, match="cut short or damaged") as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "write", [torch.save, lambda o, p: torch.save(o, p, **OLD), None], ids=["zip", "old", "pickle"]
)
def test_code_in_a_file_does_not_run(tmp_path, write):
    path = tmp_path / "a.pth"
    content = {"state_dict": STATE, "extra": Payload(tmp_path / "created by the payload")}
    if write is None:
        path.write_bytes(pickle.dumps(content))
    else:
        write(content, path)
    with pytest.raises(UserError):
        read_state_dict(path)
    assert os.listdir(tmp_path) == ["a.pth"]
    pickle.loads(pickle.dumps(content))
    assert len(os.listdir(tmp_path)) == 2  # what would have happened


@pytest.mark.parametrize("position", range(0, 2000, 37))
def test_a_damaged_file_never_gives_a_trace(tmp_path, position):
    """Bytes are overwritten rather than cut, so that the archive's directory at the end stays."""
    torch.save({"a": torch.randn(20, 20)}, tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    data[position : position + 16] = b"\xff" * 16
    (tmp_path / "a.pth").write_bytes(data)
    try:
        read_state_dict(tmp_path / "a.pth")  # it may lie among the numbers of the tensor, or in padding
    except UserError as error:
        assert "\n" not in str(error)


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


def test_safetensors_not_installed_is_said(tmp_path, monkeypatch):
    write_state_dict(STATE, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (read_state_dict, lambda path: write_state_dict(STATE, path)):
        with pytest.raises(MissingExtraError, match=r"efficient-densenet\[checkpoints\]"):
            use(tmp_path / "a.safetensors")
