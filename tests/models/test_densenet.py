"""What a DenseNet is: torchvision's network under torchvision's names, in every size and shape."""

from __future__ import annotations

import inspect
import re
import typing

import pytest
import torch
import torchvision
from comparison import assert_close, assert_identical, training_step
from torch import nn

import efficient_densenet
from efficient_densenet import DenseNet, EfficiencyWarning, UserError, densenet121, densenet_cifar, ops
from efficient_densenet.models import VARIANTS, build

every_way = pytest.mark.parametrize("efficient", [False, "recompute", True])


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("densenet121", {}, 7_978_856),
        ("densenet161", {}, 28_681_000),
        ("densenet169", {}, 14_149_480),
        ("densenet201", {}, 20_013_928),
        ("densenet264", {}, 72_686_632),
        ("densenet_cifar", {"depth": 40, "growth_rate": 12}, 1_059_298),
        ("densenet_cifar", {"depth": 100, "growth_rate": 12, "bottleneck": True}, 769_162),
        ("densenet_cifar", {"depth": 250, "growth_rate": 24, "bottleneck": True}, 15_324_406),
        ("densenet_cifar", {"depth": 190, "growth_rate": 40, "bottleneck": True}, 25_624_430),
    ],
)
def test_parameter_counts(name, arguments, parameters):
    with torch.device("meta"):
        network = build(name, **arguments)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_names_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        ours, theirs = getattr(efficient_densenet, name)(), getattr(torchvision.models, name)()
    shapes = [{k: (v.shape, v.dtype) for k, v in network.state_dict().items()} for network in (ours, theirs)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    assert [k for k, _ in ours.named_parameters()] == [k for k, _ in theirs.named_parameters()]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@every_way
def test_equals_torchvision(training, efficient):
    torch.manual_seed(0)
    theirs = torchvision.models.densenet121(num_classes=10).double().train(training)
    ours = densenet121(num_classes=10, efficient=efficient).double().train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    assert_close(training_step(ours, x), training_step(theirs, x))


def test_dropout_equals_torchvision():
    theirs = torchvision.models.DenseNet(8, (1, 2, 1, 1), 8, bn_size=2, drop_rate=0.4, num_classes=5).double()
    ours = DenseNet(3, 8, 8, (1, 2, 1, 1), 0.5, 224, 2, drop_rate=0.4, num_classes=5, efficient=True).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 45, 64, dtype=torch.float64)
    results = []
    for network in (ours, theirs):
        torch.manual_seed(7)
        results.append(training_step(network, x))
    assert_close(*results)


@every_way
@pytest.mark.parametrize("bn_size", [None, 3])
@pytest.mark.parametrize(
    ("block_config", "final_norm"), [((2,), "norm2"), ((1, 2, 1), "norm4"), ((1, 1, 1, 1, 1), "norm6")]
)
def test_any_number_of_blocks(block_config, final_norm, bn_size, efficient):
    network = DenseNet(2, 5, None, block_config, 0.7, 32, bn_size, num_classes=3, efficient=efficient)
    result = training_step(network, torch.randn(2, 2, 37, 33))
    assert result["output"].shape == (2, 3)
    assert f"buffer features.{final_norm}.running_mean" in result
    assert network.features.denseblock1.denselayer1.conv1.weight.shape[0] == (2 if bn_size is None else 6)


def test_state_dicts_load_into_every_form():
    networks = [densenet_cifar(22, 4, True, efficient=efficient) for efficient in (False, "recompute", True)]
    for network in networks:
        network.load_state_dict(networks[0].state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    results = [training_step(network, x) for network in networks]
    assert_identical(results[1], results[0])


def test_features_and_head_compose():
    network = densenet_cifar(22, 4, num_classes=6).eval()
    x = torch.randn(2, 3, 32, 32)
    maps = network.forward_features(x)
    assert maps.shape == (2, network.num_features, 8, 8)
    assert torch.equal(maps, network.features(x).relu())
    pooled = network.forward_head(maps, pre_logits=True)
    assert torch.equal(pooled, maps.mean((2, 3)))
    assert torch.equal(network.forward_head(maps), network(x))
    assert torch.equal(network.get_classifier()(pooled), network(x))


def test_reset_classifier():
    network = densenet_cifar(22, 4, num_classes=6).double()
    network.reset_classifier(9)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert network(x).shape == (2, 9)
    assert network.num_classes == 9
    network.reset_classifier(0)
    assert network(x).shape == (2, network.num_features)
    assert isinstance(network.get_classifier(), nn.Identity)


@pytest.mark.parametrize("efficient", [False, True])
def test_parts_of_features_can_be_used_alone(efficient):
    network = DenseNet(block_config=(1, 1), input_size=64, efficient=efficient).eval().double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(network.features[5:](network.features[:5](x)), network.features(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compression": 0}, "compression must be a number above 0 and at most 1, not 0"),
        ({"compression": 1.5}, "compression must be .* not 1.5"),
        ({"compression": "half"}, "compression must be .* not 'half'"),
        ({"block_config": ()}, "block_config needs at least one block"),
        ({"block_config": 12}, "block_config needs at least one block"),
        ({"block_config": (3, 0)}, "each entry of block_config must be a whole number of at least 1, not 0"),
        ({"growth_rate": 0}, "growth_rate must be a whole number"),
        ({"growth_rate": 2.5}, "growth_rate must be a whole number"),
        ({"num_init_features": True}, "num_init_features must be a whole number"),
        ({"in_channels": -1}, "in_channels must be a whole number"),
        ({"bn_size": 0}, r"bn_size must be a whole number of at least 1 or None \(no bottleneck\), not 0"),
        ({"drop_rate": 1.0}, "drop_rate must be a number at least 0 and below 1, not 1.0"),
        ({"num_classes": -1}, "num_classes must be a whole number of at least 0, not -1"),
        ({"efficient": "magic"}, "efficient must be False, True or 'recompute', not 'magic'"),
        ({"compression": 0.001}, "compression 0.001 leaves no channel of the 168 after block 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(UserError, match=message):
        DenseNet(**arguments)


@pytest.mark.parametrize(
    ("depth", "bottleneck", "nearest"), [(41, False, 40), (40, True, 40), (42, True, 40), (3, False, 7)]
)
def test_cifar_depths(depth, bottleneck, nearest):
    if depth == nearest:
        assert densenet_cifar(depth, 4, bottleneck).num_classes == 10
        return
    with pytest.raises(UserError, match=f"use {nearest}, not {depth}"):
        densenet_cifar(depth, 4, bottleneck)


@pytest.mark.parametrize("arguments", [("40", 12), (40.0, 12), (40, None), (40, 0)])
def test_cifar_arguments_that_are_no_whole_numbers(arguments):
    with pytest.raises(UserError, match=r"(depth|growth_rate) must be a whole number of at least 1, not"):
        densenet_cifar(*arguments)


def test_unknown_variant():
    with pytest.raises(UserError, match="no network called 'resnet50'; there are: densenet121"):
        build("resnet50")


@pytest.mark.parametrize("efficient", [False, True])
def test_a_first_convolution_that_is_replaced_says_which_images_fit(efficient):
    network = DenseNet(num_init_features=4, block_config=(1, 1), num_classes=2, efficient=efficient)
    network.features.conv0 = nn.Conv2d(1, 4, 3, padding=1)
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 2)
    with pytest.raises(UserError, match=r"takes images of shape \(N, 1, H, W\), not \(2, 3, 8, 8\)"):
        network(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("input_size", [32, 64])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_smallest_input(input_size, blocks):
    """The check's limit is the network's: one pixel less would leave nothing to look at."""
    network = DenseNet(num_init_features=4, block_config=(1,) * blocks, input_size=input_size).eval()
    smallest = network.min_input_size
    assert network.forward_features(torch.randn(1, 3, smallest, smallest)).shape[2:] == (1, 1)
    if smallest > 1:
        with pytest.raises(UserError, match=f"at least {smallest}×{smallest}"):
            network(torch.randn(1, 3, smallest, smallest - 1))
        with pytest.raises(RuntimeError, match="too small"):
            network.features(torch.randn(1, 3, smallest - 1, smallest - 1))


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (3, 32, 32)], ids=str)
def test_wrong_input_shape(shape):
    with pytest.raises(UserError, match=re.escape(f"(N, 3, H, W), not {shape}")):
        densenet_cifar(22, 4)(torch.randn(shape))


def test_where_the_buffer_would_be_slower_than_recomputing_it_is_not_used(monkeypatch):
    """As on GPUs without kernels of ours."""
    network = DenseNet(num_init_features=8, block_config=(2, 2), efficient=True)
    monkeypatch.setattr(ops, "slower_than_recomputing", lambda x: "the buffer is slower here")
    with pytest.warns(EfficiencyWarning, match="the buffer is slower here"):
        network(torch.randn(2, 3, 32, 32)).sum().backward()


def test_variants_take_every_argument_of_a_densenet():
    names = set(inspect.signature(DenseNet).parameters)
    for name, function in VARIANTS.items():
        (arguments,) = typing.get_args(typing.get_type_hints(function)["arguments"])
        assert set(typing.get_type_hints(arguments)) == names - ({"growth_rate"} if name == "densenet_cifar" else set())
    network = densenet121(growth_rate=4, num_init_features=8, block_config=(2, 3), num_classes=3)
    assert network.num_features == 20 and network.classifier.out_features == 3
