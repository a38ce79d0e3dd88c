"""The one DenseNet in files as people have them, wherever it is and whatever else they hold."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import re
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import timm
import torch
from monai.data import MetaTensor
from torch import nn
from torchvision.models import DenseNet

from efficient_densenet import make_efficient
from efficient_densenet.errors import UserError
from efficient_densenet.weights.canonical import read_weights

OLD = {"_use_new_zipfile_serialization": False}


def network() -> DenseNet:
    torch.manual_seed(0)
    return DenseNet(growth_rate=4, block_config=(2, 2, 1, 1), num_init_features=6, bn_size=2, num_classes=5).eval()


STATE = network().state_dict()
FEATURES = {name.removeprefix("features."): t for name, t in STATE.items() if name.startswith("features.")}


def prefixed(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


def head_alone(names, state=STATE):
    return {names + name: state[f"classifier.{name}"] for name in ("weight", "bias")}


def head(names):
    return FEATURES_ONLY | head_alone(names)


FEATURES_ONLY = prefixed("features.", FEATURES)
CHANNELS = len(FEATURES["norm5.bias"])
OTHER = {name: t + 1 for name, t in STATE.items()}

HOLDERS = {
    "state dict": STATE,
    "module": network(),
    "module in a dictionary": {"model": network(), "optimizer": torch.optim.Adam(network().parameters())},
    "data parallel": nn.DataParallel(network()),
    "compiled": prefixed("_orig_mod."),
    "compiled module": torch.compile(network()),
    "counts of a profiler": STATE
    | {"features.total_ops": torch.zeros(1), "features.conv0.total_params": torch.zeros(1)},
    "wrapped parts": {
        name.replace("features.", "features.module.")
        .replace("denseblock1.", "denseblock1._orig_mod.")
        .replace("denselayer1.", "denselayer1._fsdp_wrapped_module._checkpoint_wrapped_module.")
        .replace("transition1.", "transition1._checkpoint_wrapped_module."): tensor
        for name, tensor in STATE.items()
    },
    "a wrapped head": {name.replace("classifier.", "fc._orig_mod."): tensor for name, tensor in STATE.items()},
    "a wrapped head of MONAI's": {
        re.sub(r"(denselayer\d)\.", r"\1.layers._checkpoint_wrapped_module.", name).replace(
            "classifier.", "class_layers._orig_mod.out._orig_mod."
        ): tensor
        for name, tensor in STATE.items()
    },
    "several wrappers": prefixed("module._orig_mod.model.densenet121."),
    "arguments of a script": {
        "args": argparse.Namespace(lr=0.1, data=pathlib.PosixPath("a"), nested=argparse.Namespace(x=1)),
        "state_dict": STATE,
    },
    "numpy, dates, default dictionaries": {
        "best": np.float64(0.9),
        "history": np.arange(3),
        "random": np.random.default_rng(0).bit_generator.state,
        "when": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
        "log": defaultdict(list, a=[1, 2]),
        "sets": ({1, 2}, frozenset("a"), b"bytes", bytearray(3), 3 + 4j, slice(1, 2)),
        "model": STATE,
    },
    "types and functions": {"criterion": nn.CrossEntropyLoss(), "type": nn.ReLU, "f": torch.relu, "net": STATE},
    "optimiser and random numbers": {
        "optimizer": torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9).state_dict(),
        "rng": torch.get_rng_state(),
        "model_state_dict": OrderedDict(STATE),
    },
    "a loss with weights": {"state_dict": prefixed("model.") | {"criterion.pos_weight": torch.ones(5)}},
    "a larger network": prefixed("encoder.") | {"decoder.conv.weight": torch.ones(3, 3), "head.bias": torch.ones(3)},
    "deep": {"a": [{"b": ({"c": STATE},)}]},
    "beside an average": {"state_dict": STATE, "state_dict_ema": OTHER},
    "beside another average": prefixed("online_model.") | prefixed("ema_model.", OTHER),
    "beside a better one": {"model": STATE, "best": OTHER},
    "subclass of tensor": {name: MetaTensor(t) for name, t in STATE.items()},
    "parameters": dict(network().named_parameters()) | dict(network().named_buffers()),
    "head in a sequence": head("classifier.0."),
    "head behind dropout": head("classifier.1."),
    "head of another name": head("fc."),
    "head beside the features": prefixed("backbone.", FEATURES_ONLY) | head_alone("head."),
    "head beside the features alone": prefixed("model.encoder.", FEATURES) | head_alone("model.fc."),
    "head beside a wrapped encoder": {
        "state_dict": prefixed("module.encoder.", FEATURES_ONLY)
        | head_alone("module.classifier.1.")
        | {"criterion.weight": torch.ones(5)}
    },
    "head outside of what is wrapped": prefixed("module.encoder.", FEATURES_ONLY) | head_alone("classifier."),
    "head beside an average": {
        "state_dict": prefixed("backbone.", FEATURES_ONLY) | head_alone("head.fc."),
        "state_dict_ema": prefixed("backbone.", FEATURES_ONLY) | head_alone("head.fc.", OTHER),
    },
    "parts with state dicts of their own": {
        "encoder": FEATURES_ONLY,
        "classifier": head_alone(""),
        "optimizer": torch.optim.Adam(network().parameters()).state_dict(),
    },
}


def assert_found(path, expected=STATE, **reading):
    found = read_weights(path, **reading).load()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_it_is_found(tmp_path, holder, options):
    torch.save(HOLDERS[holder], tmp_path / "a.pth", **options)
    assert_found(tmp_path / "a.pth")


@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.ones(1, 3, 64, 64))])
@pytest.mark.filterwarnings("ignore")
def test_it_is_found_in_a_torchscript_program(tmp_path, make):
    make(network()).save(tmp_path / "a.pt")
    assert_found(tmp_path / "a.pt", {k: v for k, v in STATE.items() if "num_batches" not in k})


HEADLESS = {
    "features alone": FEATURES,
    "features in a wrapper": prefixed("module.backbone.", FEATURES),
    "children of the features": prefixed("encoder.", nn.Sequential(*network().features.children()).state_dict()),
    "children of the features and a head": nn.Sequential(
        *network().features.children(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), network().classifier
    ).state_dict(),
    "fastai": {"model": prefixed("0.0.", FEATURES) | {"1.2.weight": torch.ones(9), "1.8.weight": torch.ones(2, 9)}},
    "a head of two layers": FEATURES_ONLY
    | {"classifier.0.weight": torch.ones(9, CHANNELS), "classifier.2.weight": torch.ones(5, 9)},
    "a head that sees more than the features": FEATURES_ONLY | {"classifier.weight": torch.ones(5, 99)},
    "two heads beside them": prefixed("backbone.", FEATURES_ONLY) | head_alone("fc.") | head_alone("head."),
    # What is between them is known by its length alone, so that nothing is taken.
    "a norm before the head": head("classifier.") | {"bottleneck.weight": torch.ones(CHANNELS)},
    "a layer before the head": prefixed("net.", FEATURES_ONLY)
    | head_alone("head.")
    | {"neck.weight": torch.ones(CHANNELS, CHANNELS)},
}


@pytest.mark.parametrize("holder", HEADLESS)
def test_features_without_a_linear_head_are_found(tmp_path, holder):
    torch.save(HEADLESS[holder], tmp_path / "a.pth")
    assert_found(tmp_path / "a.pth", FEATURES_ONLY)
    weights = read_weights(tmp_path / "a.pth")
    assert "classifier.weight" not in weights.tensors
    assert not [name for name in weights.left_behind if name in FEATURES_ONLY]


def test_a_part_that_is_there_twice_is_refused(tmp_path):
    torch.save(STATE | prefixed("features.module.", FEATURES), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"it has features\.conv0\.weight twice, in a wrapper and without one: save"):
        read_weights(tmp_path / "a.pth")


def test_of_a_pickled_efficient_network_nothing_is_left_behind(tmp_path):
    torch.save(make_efficient(network()), tmp_path / "a.pth")
    assert_found(tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth").left_behind == []


def test_timm_features_only(tmp_path):
    theirs = timm.create_model("densenet121", features_only=True, growth_rate=4, block_config=(1, 1, 1, 1)).state_dict()
    torch.save({"state_dict": prefixed("encoder.model.", theirs)}, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth")
    assert found.dialect == "timm features_only"
    assert torch.equal(found.load()["features.norm5.weight"], theirs["features_norm5.weight"])


@pytest.mark.parametrize("averaged", ["state_dict_ema", "ema", "model_ema", "ema_state_dict", "swa_model", "model.ema"])
def test_the_average_is_taken_where_it_is_wanted(tmp_path, averaged):
    torch.save({"model": STATE, averaged: OTHER}, tmp_path / "a.pth")
    assert_found(tmp_path / "a.pth")
    assert_found(tmp_path / "a.pth", OTHER, ema=True)


def test_the_average_is_taken_where_there_is_nothing_else(tmp_path):
    torch.save({"model_ema": STATE}, tmp_path / "a.pth")
    assert_found(tmp_path / "a.pth")


@pytest.mark.parametrize("prefix", ["net.left.", "net.left", "left"])
def test_a_prefix_says_which_one_is_meant(tmp_path, prefix):
    torch.save({"state_dict": prefixed("net.left.") | prefixed("net.right.", OTHER)}, tmp_path / "a.pth")
    assert_found(tmp_path / "a.pth", prefix=prefix)
    with pytest.raises(UserError, match=r"prefixes 'state_dict.net.left.', 'state_dict.net.right.'; say which one"):
        read_weights(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"have the prefixes .* and not 'eft.'"):
        read_weights(tmp_path / "a.pth", prefix="eft")


def test_strings_of_python_2_are_read(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"note": "NAME", "state_dict": STATE}, path, **OLD)
    data = path.read_bytes()
    # Python 2 wrote names as strings of bytes (U and a length), not all of them ASCII.
    data = data.replace(b"X\x04\0\0\0NAME", b"U\x04caf\xe9").replace(b"X\x15\0\0\0features.", b"U\x15features.")
    assert data.count(b"U\x15features.conv0.weight") == 1
    path.write_bytes(data)
    assert_found(path)
