"""Checkpoints in several files: found by their index and by their folder, and refused in one sentence otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from efficient_densenet.checkpoints import convert_file, load_network, read_state_dict
from efficient_densenet.errors import UserError
from efficient_densenet.models import DenseNet
from efficient_densenet.weights.published import get_published

INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


def network() -> DenseNet:
    torch.manual_seed(0)
    return DenseNet(num_init_features=8, growth_rate=4, block_config=(2, 1), num_classes=5)


@pytest.fixture(params=INDEX)
def sharded(tmp_path, request) -> Path:
    """A folder with several shards, as Hugging Face writes them, and their index."""
    pattern = "model{suffix}.safetensors" if request.param == "safetensors" else "pytorch_model{suffix}.bin"
    save_torch_state_dict(
        network().state_dict(),
        tmp_path,
        filename_pattern=pattern,
        max_shard_size=4000,
        safe_serialization=request.param == "safetensors",
    )
    assert len(list(tmp_path.glob("*-of-*"))) > 1
    return tmp_path / INDEX[request.param]


def first_shard(index: Path) -> Path:
    return min(index.parent.glob("*-of-*"))


def assert_found(path: Path) -> None:
    found = read_state_dict(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in network().state_dict().items())


@pytest.mark.parametrize("by", ["index", "folder"])
def test_it_is_found(sharded, by):
    path = sharded if by == "index" else sharded.parent
    assert_found(path)
    assert load_network(path).num_classes == 5


def test_one_file_is_found_in_its_folder(tmp_path):
    torch.save(network().state_dict(), tmp_path / "pytorch_model.bin")
    assert_found(tmp_path)


def test_links_to_shards_are_followed(sharded, tmp_path_factory):
    """In the cache of Hugging Face everything is a link."""
    snapshot = tmp_path_factory.mktemp("snapshot")
    for file in sharded.parent.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert_found(snapshot)


def test_a_missing_shard_is_named(sharded):
    shard = first_shard(sharded)
    shard.unlink()
    with pytest.raises(UserError, match=rf"names the shard {shard.name}, which is missing: copy or download all \d"):
        read_state_dict(sharded)


def test_a_damaged_shard_is_named(sharded):
    shard = first_shard(sharded)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{shard.name} is cut short"):
        read_state_dict(sharded)


def test_a_tensor_that_its_shard_lacks_is_named(sharded):
    content = json.loads(sharded.read_text())
    content["weight_map"]["classifier.scale"] = first_shard(sharded).name
    sharded.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{first_shard(sharded).name} lacks the tensor classifier\.scale"):
        read_state_dict(sharded)


@pytest.mark.parametrize("sharded", ["safetensors"], indirect=True)
def test_tensors_are_those_of_the_shard_that_the_index_names(sharded):
    """Shards of another version of the checkpoint may hold the same names."""
    first, last = first_shard(sharded), max(sharded.parent.glob("*-of-*"))
    save_file({name: t + 1 for name, t in load_file(first).items()} | load_file(last), last)
    assert_found(sharded)


@pytest.mark.parametrize("shard", ["../outside.bin", "a/../../outside.bin", "{folder}/outside.bin"])
def test_names_outside_the_folder_are_refused(sharded, shard):
    folder = sharded.parent / "inside"
    folder.mkdir()
    shutil.copy(first_shard(sharded), sharded.parent / "outside.bin")
    file = shard.format(folder=sharded.parent)
    (folder / sharded.name).write_text(json.dumps({"weight_map": {"classifier.weight": file}}))
    with pytest.raises(UserError, match=r"outside\.bin, which is outside its folder: it is refused"):
        read_state_dict(folder)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "[" * 100_000, '{"metadata": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'],
)
def test_what_is_not_an_index_is_refused(tmp_path, content):
    index = tmp_path / INDEX["bin"]
    index.write_text(content)
    with pytest.raises(UserError, match=r"bin.index.json is not an index of shards") as caught:
        read_state_dict(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_index_among_the_shards_is_refused(tmp_path):
    index = tmp_path / INDEX["bin"]
    index.write_text(json.dumps({"weight_map": {"classifier.weight": index.name}}))
    with pytest.raises(UserError, match="is not a checkpoint but text, such as JSON"):
        read_state_dict(index)


def test_of_one_shard_the_index_is_named(sharded):
    with pytest.raises(UserError, match=rf"is one of \d+ shards of a checkpoint: give {sharded.name}, or the folder"):
        read_state_dict(first_shard(sharded))


@pytest.mark.parametrize("sharded", ["safetensors"], indirect=True)
def test_a_shard_is_not_written_over(sharded):
    before = first_shard(sharded).read_bytes()
    with pytest.raises(UserError, match="is the checkpoint itself"):
        convert_file(sharded.parent, first_shard(sharded))
    assert first_shard(sharded).read_bytes() == before


def test_all_shards_are_got_from_hugging_face(sharded, monkeypatch):
    asked = []

    def download(_repository, file):
        asked.append(file)
        if not (sharded.parent / file).exists():
            raise EntryNotFoundError("404")
        return str(sharded.parent / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    shards = sorted(path.name for path in sharded.parent.glob("*-of-*"))
    assert_found(get_published("hf:somebody/something").path)
    assert sorted(file for file in asked if "-of-" in file) == shards
    (sharded.parent / shards[-1]).unlink()
    with pytest.raises(UserError, match=f"somebody/something on Hugging Face lacks the file {shards[-1]}, which its"):
        get_published("hf:somebody/something")
