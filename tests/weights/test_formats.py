from __future__ import annotations

import gzip
import pickle
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from efficient_densenet.errors import MissingExtraError, UserError
from efficient_densenet.weights.canonical import read_state_dict, read_weights
from efficient_densenet.weights.shards import read_content
from efficient_densenet.weights.writing import write_state_dict

LAYER = "features.denseblock1.denselayer1"
STATE = {
    f"{LAYER}.conv1.weight": torch.arange(6.0).view(2, 3),
    f"{LAYER}.norm1.num_batches_tracked": torch.tensor(3),
    "classifier.bias": torch.ones(2).half(),
}


def assert_state(actual, expected=STATE):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".tar", ".bin", ""])
@pytest.mark.parametrize("format_", ["zip", "old", "safetensors"])
def test_formats_are_recognised_whatever_the_suffix(tmp_path, suffix, format_):
    path = tmp_path / f"weights{suffix}"
    if format_ == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=format_ == "zip")
    assert_state(read_state_dict(path))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_protocol_of_pickle_is_read(tmp_path, protocol, zipped):
    content = {
        "state_dict": OrderedDict(STATE),
        "sets": {1, 2},
        "tuples": ((), (1,), (1, 2), (1, 2, 3, 4)),
        "long": 2**99,
    }
    path = tmp_path / "a.pth"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert_state(read_state_dict(path))
    found = read_content(path).value
    assert {name: found[name] for name in ("sets", "tuples", "long")} == {
        n: content[n] for n in ("sets", "tuples", "long")
    }


def test_views_and_shared_storages_are_read(tmp_path):
    large = torch.randn(4, 6, 5)
    state = {
        f"{LAYER}.{name}": t for name, t in {"a": large[1, 2:4], "b": large.mT, "c": torch.ones(1).expand(3, 2)}.items()
    }
    torch.save(state, tmp_path / "a.pth")
    assert_state(read_state_dict(tmp_path / "a.pth"), state)


def of_arrays():
    """By columns; and weights of convolutions as other libraries have them in memory, with the outputs last."""
    arrays = {name: tensor.numpy().copy("F") for name, tensor in STATE.items()}
    for name, array in arrays.items():
        if array.ndim == 4:
            arrays[name] = array.transpose(2, 3, 1, 0).copy().transpose(3, 2, 0, 1)
    return arrays


ARRAYS = {
    "savez": lambda path: np.savez(path.open("wb"), **of_arrays()),
    "savez_compressed": lambda path: np.savez_compressed(path.open("wb"), **of_arrays()),
    **{f"pickle {p}": lambda path, p=p: path.write_bytes(pickle.dumps(of_arrays(), p)) for p in (2, 3, 4, 5)},
    **{f"torch.save {p}": lambda path, p=p: torch.save({"a": of_arrays()}, path, pickle_protocol=p) for p in (2, 5)},
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_numpy_are_read(tmp_path, kind):
    ARRAYS[kind](tmp_path / "a")
    assert_state(read_state_dict(tmp_path / "a"))


@pytest.mark.parametrize(
    "array",
    [np.ones(3, ">f4"), np.ones(3, np.complex64), np.array([None]), np.array(["a"])],
    ids=["big-endian", "complex", "objects", "text"],
)
def test_arrays_of_other_values_are_refused(tmp_path, array):
    name = f"{LAYER}.conv1.weight"
    np.savez((tmp_path / "a.npz").open("wb"), **{name: array})
    with pytest.raises(UserError, match=r"conv1.weight.npy is not one of plain numbers; write .* np.savez"):
        read_state_dict(tmp_path / "a.npz")
    torch.save({name: array}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"conv1.weight is not an ordinary tensor but a numpy"):
        read_weights(tmp_path / "a.pth")


def test_an_archive_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_state(read_state_dict(tmp_path / "a.pth"))


def test_a_file_of_the_format_before_zip_is_read(tmp_path):
    torch.save(STATE, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert_state(read_state_dict(tmp_path / "a.pth"))


def saved(content, **options):
    return lambda path: torch.save(content, path, **options)


def cut(fraction, suffix=".pth", **options):
    def write(path):
        if suffix == ".safetensors":
            save_file({"a": torch.randn(100, 100)}, path)
        else:
            torch.save({"a": torch.randn(100, 100)}, path, **options)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * fraction)])

    return write


def torchscript(path):
    traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    traced.save(str(path))


def archive_of_others(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "")
        archive.writestr("weights.pth", "")


OLD = {"_use_new_zipfile_serialization": False}
BAD_FILES = {
    "missing": (lambda path: None, "there is no file"),
    "folder": (lambda path: path.mkdir(), "is not a file"),
    "empty": (lambda path: path.touch(), "cut short"),
    "text": (lambda path: path.write_text("hello"), "not a checkpoint"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "web page": (lambda path: path.write_text("\n<html>not found</html>"), "a web page: download the file again"),
    "compressed": (lambda path: path.write_bytes(gzip.compress(b"a")), "gunzip"),
    "keras": (lambda path: path.write_bytes(b"\x89HDF\r\n"), "Keras"),
    "another pickle": (lambda path: path.write_bytes(pickle.dumps(list(STATE))), "not of torch.save"),
    "tensors of another pickle": (lambda path: path.write_bytes(pickle.dumps({"a": torch.ones(2)})), "no dense blocks"),
    "another archive": (lambda path: zipfile.ZipFile(path, "w").close(), "without the record data.pkl"),
    "an archive of others": (archive_of_others, "unpack it if a checkpoint is in it: it holds notes.txt, weights.pth"),
    "web page after a mark": (lambda path: path.write_text("<html>", "utf-8-sig"), "a web page: download the file"),
    "json": (lambda path: path.write_text('{"message": "Not Found"}'), "text, such as JSON"),
    "an array": (lambda path: np.save(path.open("wb"), np.ones(2)), "np.savez"),
    "distributed": (lambda path: (path / ".metadata").mkdir(parents=True), "dcp_to_torch_save"),
    "cut": (cut(0.5), "cut short"),
    "cut at the end": (cut(0.999), "cut short"),
    "cut, old format": (cut(0.5, **OLD), "cut short"),
    "cut early, old format": (cut(0.001, **OLD), "cut short"),
    "module": (saved(nn.Linear(2, 2)), "no dense blocks.*called weight, bias"),
    "torchscript": (torchscript, "no dense blocks.*called weight, bias"),
    "list": (saved([torch.ones(2)]), "no dense blocks.*called 0"),
    "no tensors": (saved({"epoch": 1, "args": "none", "lr": 0.1, "x": 1}), "no dense blocks.*epoch.*and 1 more"),
    "a number": (saved(3), "no dense blocks.*an object of the type int"),
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
    with pytest.raises(UserError, match="cut short") as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value)


def test_safetensors_not_installed_is_said(tmp_path, monkeypatch):
    write_state_dict(STATE, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (read_state_dict, lambda path: write_state_dict(STATE, path)):
        with pytest.raises(MissingExtraError, match=r"efficient-densenet\[checkpoints\]"):
            use(tmp_path / "a.safetensors")
