"""The options that describe a network."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import pytest
import torch

from efficient_densenet import UserError
from efficient_densenet.measure import networks
from efficient_densenet.measure.networks import Network


def network(*options):
    parser = argparse.ArgumentParser()
    networks.add_arguments(parser)
    return networks.from_arguments(parser.parse_args(options))


@pytest.mark.parametrize(
    ("options", "parameters", "input_size", "num_classes"),
    [
        ((), 1_100_000, 32, 100),
        (("--network", "densenet121"), 7_978_856, 224, 1000),
        (("--network", "densenet_cifar"), 1_059_298, 32, 10),
        (("--network", "densenet_cifar", "--depth", "100", "--growth-rate", "12", "--bottleneck"), 769_162, 32, 10),
        (("--bottleneck", "--bn-size", "2", "--block-config", "2, 3", "--num-classes", "7"), None, 32, 7),
        (("--network", "densenet121", "--bn-size", "none", "--input-size", "64"), None, 64, 1000),
    ],
)
def test_describes_a_network(options, parameters, input_size, num_classes):
    described = network(*options)
    assert Network(**json.loads(json.dumps(asdict(described)))) == described
    assert (described.input_size, described.num_classes) == (input_size, num_classes)
    with torch.device("meta"):
        built = described.build(efficient="recompute")
    assert built.efficient == "recompute"
    if parameters is not None:
        assert sum(p.numel() for p in built.parameters()) == pytest.approx(parameters, rel=0.02)


def test_bottleneck_options_reach_the_network():
    layer = network("--bottleneck", "--growth-rate", "5").build().features.denseblock1.denselayer1
    assert layer.conv1.out_channels == 20
    layer = network("--network", "densenet121", "--bn-size", "none").build().features.denseblock1.denselayer1
    assert layer.conv1.out_channels == 32


def test_batches_are_random_and_repeatable():
    described = network("--num-classes", "5")
    images, labels = described.batch(20, seed=3)
    assert images.shape == (20, 3, 32, 32) and images.std() > 0.9
    assert set(labels.tolist()) <= set(range(5)) and len(set(labels.tolist())) > 1
    assert torch.equal(images, described.batch(20, seed=3)[0])
    assert not torch.equal(images, described.batch(20, seed=4)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--depth", "40"), "--depth.*--network densenet_cifar"),
        (("--network", "densenet121", "--growth-rate", "12"), "--growth-rate.*densenet121"),
        (("--network", "densenet_cifar", "--block-config", "2"), "--block-config.*--depth"),
        (("--compression", "1.5"), "compression"),
        (("--network", "densenet_cifar", "--depth", "41"), "use 40"),
    ],
)
def test_refuses_contradictions(options, message):
    with pytest.raises(UserError, match=message):
        network(*options)


def test_refuses_images_that_do_not_fit():
    with pytest.raises(UserError, match="too small"):
        network("--input-size", "3").check_images(4)
    single_pixel = network("--input-size", "4")
    single_pixel.check_images(2)
    single_pixel.check_images(1, training=False)
    with pytest.raises(UserError, match="more images"):
        single_pixel.check_images(1)
