from __future__ import annotations

import pytest
import torch

from efficient_densenet.checkpoints import load_network, read_densenet
from efficient_densenet.checkpoints.architecture import architecture_of
from efficient_densenet.errors import UserError
from efficient_densenet.models import DenseNet, build

ARGUMENTS = {
    "in_channels": 2,
    "num_init_features": 6,
    "growth_rate": 4,
    "block_config": (2, 1),
    "compression": 0.5,
    "input_size": 32,
    "bn_size": None,
    "num_classes": 3,
}


def state_of(**changes) -> dict[str, torch.Tensor]:
    return DenseNet(**(ARGUMENTS | changes)).state_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bn_size": 1},
        {"bn_size": 4, "input_size": 224},
        {"num_classes": 0},
        {"block_config": (3,), "compression": 1.0},
        {"block_config": (1, 2, 3, 1, 2), "compression": 0.75},
        {"block_config": (11, 2), "compression": 1.0},
    ],
    ids=str,
)
def test_the_arguments_are_found(changes):
    architecture = architecture_of(state_of(**changes))
    assert architecture.arguments == ARGUMENTS | changes
    assert architecture.dimensions == 2


@pytest.mark.parametrize("compression", [0.1, 1 / 3, 0.37, 0.5, 0.5001, 2 / 3, 0.7123456, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("growth_rate", [7, 1009])  # of the wide transitions, few fractions give the very width
@pytest.mark.parametrize("block_config", [(3, 2), (7, 5, 3), (20, 15, 10, 5)])
def test_a_compression_with_the_same_transitions_is_found(compression, growth_rate, block_config):
    with torch.device("meta"):
        network = DenseNet(3, 23, growth_rate, block_config, compression)
        found = architecture_of(network.state_dict()).arguments
        again = DenseNet(**found)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


@pytest.mark.parametrize(
    ("variant", "depth"),
    # The one called 264 has 265 layers, counted as for the others.
    [("densenet121", 121), ("densenet161", 161), ("densenet169", 169), ("densenet201", 201), ("densenet264", 265)],
)
def test_a_network_is_described_by_its_depth(variant, depth):
    with torch.device("meta"):
        bottleneck = build(variant).state_dict()
        plain = build("densenet_cifar", depth=40).state_dict()
    assert str(architecture_of(bottleneck)).startswith(f"2D DenseNet of depth {depth}, ")
    assert str(architecture_of(plain)).startswith("2D DenseNet of depth 40, ")


def change(name, tensor):
    return lambda state: state | {name: tensor}


def drop(*names):
    return lambda state: {k: v for k, v in state.items() if not k.startswith(names)}


LAYER = "features.denseblock1.denselayer2"
BAD_STATES = {
    "stem": (drop("features.conv0"), "features.conv0.weight is missing"),
    "layer": (drop(LAYER + "."), "wrong shape"),
    "layer inside": (
        drop("features.denseblock1.denselayer1.norm1"),
        r"missing: 5 \(features.denseblock1.denselayer1.norm1.weight, .* and 2 more\)",
    ),
    "first layers": (drop("features.denseblock2.denselayer1.conv1"), "denselayer1.conv1.weight"),
    "block": (lambda s: drop("features.denseblock1")(s), "features.denseblock1.denselayer1.conv1.weight is missing"),
    "transition": (drop("features.transition1.conv"), "features.transition1.conv.weight is missing"),
    "last norm": (drop("features.norm3"), "missing: 5 "),
    "other names": (change(f"{LAYER}.attention.weight", torch.ones(1)), r"unknown: 1 \(features.*attention.weight\)"),
    "line break": (change("features.a\nb", torch.ones(1)), r"unknown: 1 \(features.a b\)"),
    "long": (change("features." + "a" * 999, torch.ones(1)), r"unknown: 1 \(features\.a{90}…a{20}\)"),
    "number": (change("features.denseblock1.denselayer9999.norm1.weight", torch.ones(1)), "denselayer3 is missing"),
    "number of a block": (change("features.denseblock9999.denselayer1.norm1.weight", torch.ones(1)), "is missing"),
    "whole numbers": (
        change("features.conv0.weight", torch.ones(6, 2, 3, 3, dtype=torch.int32)),
        r"not of real numbers: 1 \(features.conv0.weight of torch.int32\)",
    ),
    "complex numbers": (
        change(f"{LAYER}.norm1.bias", torch.ones(10, dtype=torch.complex64)),
        r"not of real numbers: 1 \(.*norm1.bias of torch.complex64\)",
    ),
    "wide": (
        change(f"{LAYER}.norm1.bias", torch.ones(11)),
        r"of the wrong shape: 1 \(features.*denselayer2.norm1.bias with \(11,\) instead of \(10,\)",
    ),
    "kernel": (change(f"{LAYER}.conv1.weight", torch.ones(4, 10, 3, 1)), r"\(4, 10, 3, 1\) instead of \(4, 10, 3, 3\)"),
    "kernel dimensions": (change(f"{LAYER}.conv1.weight", torch.ones(4, 10, 3, 3, 3)), "wrong shape"),
    "scalar": (change("features.transition1.conv.weight", torch.tensor(1.0)), "has the shape"),
    "nothing": (change("features.conv0.weight", torch.ones(0, 2, 3, 3)), "has the shape"),
    "bottleneck": (
        change("features.denseblock1.denselayer1.conv2.weight", torch.ones(3, 4, 3, 3)),
        "bottleneck of 4 channels is not supported",
    ),
    "weight norm": (change(f"{LAYER}.conv2.weight_g", torch.ones(4, 1, 1, 1)), "weight_g is not a weight but what"),
    "pruned": (change(f"{LAYER}.conv2.weight_mask", torch.ones(4, 4, 3, 3)), "prune.remove of torch.nn.utils"),
    "parametrized": (change(f"{LAYER}.conv2.parametrizations.weight.original0", torch.ones(4)), "what one is computed"),
    "wider transition": (change("features.transition1.conv.weight", torch.ones(15, 14, 1, 1)), "14 to 15 channels"),
}


@pytest.mark.parametrize("kind", BAD_STATES)
def test_what_is_wrong_is_said_in_one_line(tmp_path, kind):
    spoil, message = BAD_STATES[kind]
    path = tmp_path / "a.pth"
    torch.save(spoil(state_of()), path)
    with pytest.raises(UserError, match=message) as caught:
        read_densenet(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_transitions_of_different_compression_are_refused():
    state = state_of(block_config=(5, 5, 1), bn_size=None)
    # 26 to 13 is one half; make the second one wider.
    width = state["features.transition2.conv.weight"].shape[1]
    state["features.transition2.conv.weight"] = torch.ones(width, width, 1, 1)
    with pytest.raises(
        UserError, match="no one compression up to 1 gives all its transitions: 26 to 13 channels, 33 to"
    ):
        architecture_of(state)


@pytest.mark.parametrize(
    "names", [["conv1.weight", "fc.weight"], ["features.0.weight", "classifier.weight"], ["a", "b"]]
)
def test_of_another_network_it_is_said_what_is_there(tmp_path, names):
    torch.save(dict.fromkeys(names, torch.ones(2, 2)), tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"no dense blocks .*; its tensors are called {', '.join(names)}"):
        read_densenet(tmp_path / "a.pth")


def test_a_classifier_without_bias_gets_zeros(tmp_path):
    torch.save(drop("classifier.bias")(state_of()), tmp_path / "a.pth")
    state = read_densenet(tmp_path / "a.pth").state
    assert torch.equal(state["classifier.bias"], torch.zeros(3))


def test_a_name_that_comes_twice_is_refused(tmp_path):
    state = state_of()
    state["features.norm5.weight"] = state["features.norm3.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"has features.norm3.weight twice, once under the name features.norm5.weight"):
        read_densenet(tmp_path / "a.pth")


def test_a_network_is_loaded_with_what_its_file_does_not_say(tmp_path):
    original = DenseNet(**ARGUMENTS).eval()
    torch.save(original.state_dict(), tmp_path / "a.pth")
    network = load_network(tmp_path / "a.pth", efficient="recompute", drop_rate=0.5)
    assert network.training
    assert network.efficient == "recompute"
    x = torch.randn(2, 2, 9, 9)
    assert torch.equal(network.eval()(x), original(x))


def test_a_network_in_half_precision_is_loaded_in_single(tmp_path):
    torch.save(DenseNet(**ARGUMENTS).half().state_dict(), tmp_path / "a.pth")
    assert {p.dtype for p in load_network(tmp_path / "a.pth").parameters()} == {torch.float32}


def test_what_the_weights_fix_cannot_be_chosen(tmp_path):
    torch.save(state_of(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"num_classes cannot be chosen .*reset_classifier"):
        load_network(tmp_path / "a.pth", num_classes=10)


def test_a_3d_network_is_not_loaded(tmp_path):
    state = {k: v.unsqueeze(-1).expand(*v.shape, v.shape[-1]) if v.dim() == 4 else v for k, v in state_of().items()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="3D network"):
        load_network(tmp_path / "a.pth")
