"""Weights by name: local files in the real formats, and downloaders that only pretend."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file
from timm.models._manipulate import adapt_input_conv

from efficient_densenet import densenet121, densenet_cifar
from efficient_densenet.errors import UserError
from efficient_densenet.weights.loading import adapt_input_channels
from efficient_densenet.weights.published import get_published


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The weights of a DenseNet-121 as torchvision publishes them; files that are downloaded are copies of it."""
    state = torchvision.models.densenet121().state_dict()
    torch.save(state, tmp_path / "theirs.pth")
    save_file(state, tmp_path / "theirs.safetensors")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return state


def downloader(monkeypatch, source):
    calls = []

    def download(url, path, hash_prefix=None, progress=True):
        calls.append((url, hash_prefix))
        Path(path).write_bytes(source.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return calls


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_loaded(network, state):
    found = network.state_dict()
    assert [name for name in state if not torch.equal(found[name], state[name])] == []


@pytest.mark.parametrize("file", ["theirs.pth", "theirs.safetensors"])
def test_a_file(tmp_path, published, file):
    assert_loaded(densenet121(weights=tmp_path / file, efficient=True), published)


@pytest.mark.parametrize(
    "name",
    [
        "DEFAULT",
        "IMAGENET1K_V1",
        "torchvision:densenet121",
        "DenseNet121_Weights.IMAGENET1K_V1",
        torchvision.models.DenseNet121_Weights.DEFAULT,
    ],
)
def test_torchvision_by_name_with_its_cache_and_hash(tmp_path, published, monkeypatch, name):
    source = tmp_path / "theirs.pth"
    monkeypatch.setattr(
        "torchvision.models._api.WeightsEnum.url", f"https://example.org/densenet121-{sha256(source)[:8]}.pth"
    )
    calls = downloader(monkeypatch, source)
    assert_loaded(densenet121(weights=name), published)
    assert_loaded(densenet121(weights=name), published)
    assert calls == [(f"https://example.org/densenet121-{sha256(source)[:8]}.pth", sha256(source)[:8])]
    cached = tmp_path / "hub" / "checkpoints" / f"densenet121-{sha256(source)[:8]}.pth"
    assert cached.exists()
    cached.write_bytes(cached.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"is damaged \(its SHA-256 is not .*delete it"):
        densenet121(weights=name)


def test_torchvision_says_classes_and_preprocessing(tmp_path, published, monkeypatch):
    downloader(monkeypatch, tmp_path / "theirs.pth")
    monkeypatch.setattr("efficient_densenet.weights.published._check_hash", lambda *_: None)
    found = get_published("torchvision:densenet121")
    assert found.class_names[:2] == ["tench", "goldfish"]
    assert found.preprocessing["size"] == 224
    assert found.preprocessing["resize"] == 256


def test_without_network_it_is_said_which_file_belongs_where(tmp_path, published, monkeypatch):
    def download(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    place = tmp_path / "hub" / "checkpoints" / "densenet121-a639ec97.pth"
    with pytest.raises(UserError, match=rf"cannot download https://.*densenet121-a639ec97.pth .*put it here: {place}$"):
        densenet121(weights="DEFAULT")

    def hugging_face(*_):
        raise LocalEntryNotFoundError("check your connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hugging_face)
    with pytest.raises(
        UserError, match=r"get https://huggingface.co/timm/densenet121.ra_in1k/resolve/main/model.safet"
    ):
        densenet121(weights="timm:densenet121.ra_in1k")


@pytest.mark.parametrize("name", ["timm:densenet121", "timm:densenet121.ra_in1k", "hf:timm/densenet121.ra_in1k"])
def test_timm_and_hugging_face(tmp_path, published, monkeypatch, name):
    blob = tmp_path / sha256(tmp_path / "theirs.safetensors")
    (tmp_path / "theirs.safetensors").rename(blob)
    (tmp_path / "model.safetensors").symlink_to(blob)  # as in the cache of Hugging Face
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_loaded(densenet121(weights=name), published)
    assert asked == [("timm/densenet121.ra_in1k", "model.safetensors")]
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is damaged"):
        densenet121(weights=name)


def test_another_file_on_hugging_face(tmp_path, published, monkeypatch):
    def download(repository, file):
        if file == "model.safetensors":
            raise EntryNotFoundError("404")
        return str(tmp_path / "theirs.pth")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_loaded(densenet121(weights="hf:somebody/something"), published)
    assert get_published("hf:somebody/something:other.pth").path == tmp_path / "theirs.pth"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.pth", "there is no file none.pth, and there are no weights of that name"),
        ("timm:densenet264", "timm publishes no weights 'densenet264'"),
        ("torchvision:densenet264", "torchvision publishes no weights DEFAULT of densenet264"),
        ("IMAGENET1K_V7", "torchvision publishes no weights IMAGENET1K_V7 of densenet121"),
    ],
)
def test_names_that_do_not_exist(name, message):
    with pytest.raises(UserError, match=message):
        densenet121(weights=name)


def test_another_number_of_classes_gets_a_new_classifier_and_a_warning(tmp_path, published):
    with pytest.warns(UserWarning, match="classifier is a new one, because .* has 1000 classes and the network 7"):
        network = densenet121(weights=tmp_path / "theirs.pth", num_classes=7)
    assert network.classifier.weight.shape == (7, 1024)
    assert_loaded(network, {name: t for name, t in published.items() if name.startswith("features.")})
    assert_loaded(
        densenet121(weights=tmp_path / "theirs.pth", num_classes=0),
        {name: t for name, t in published.items() if name.startswith("features.")},
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_input_channels_are_adapted_as_timm_does_it(tmp_path, published, channels):
    weight = torch.randn(5, 3, 7, 7)
    assert torch.equal(adapt_input_channels(weight, channels), adapt_input_conv(channels, weight))
    network = densenet121(weights=tmp_path / "theirs.pth", in_channels=channels)
    assert torch.equal(network.features.conv0.weight, adapt_input_conv(channels, published["features.conv0.weight"]))


def test_weights_of_another_network_are_refused(tmp_path, published):
    with pytest.raises(UserError, match=r"weights of another network: .* tensors differ or are missing"):
        densenet_cifar(22, 12, weights=tmp_path / "theirs.pth")


def test_torch_hub_loads_the_networks(tmp_path):
    root = Path(__file__).parents[2]
    torch.save(densenet_cifar(22, 12).state_dict(), tmp_path / "a.pth")
    network = torch.hub.load(str(root), "densenet_cifar", source="local", depth=22, weights=tmp_path / "a.pth")
    assert_loaded(network, torch.load(tmp_path / "a.pth"))


def test_timm_and_this_library_agree_on_published_weights(tmp_path):
    theirs = timm.create_model("densenet121").eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(densenet121(weights=tmp_path / "model.safetensors").eval()(x), theirs(x))
