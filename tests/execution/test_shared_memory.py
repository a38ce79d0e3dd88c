"""What the shared buffer keeps and what it computes again, by exact counts."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
from comparison import weighted_sum
from twins import IMAGENET, images, pair

from efficient_densenet import DenseNet, densenet_cifar, make_efficient
from efficient_densenet.execution import KEEP
from efficient_densenet.measure.memory import peak_bytes
from efficient_densenet.ops import layout, plain_pytorch

every_keep = pytest.mark.parametrize("keep", KEEP)


def alive_after_forward(network, x):
    """Exact bytes that a forward pass leaves alive, its output included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = network(x)
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]"), output


@pytest.mark.parametrize(
    ("keep", "bottlenecks", "features"), [("bottleneck", 1, 1), ("features", 0, 1), ("inputs", 0, 0)]
)
@pytest.mark.parametrize("layers", [3, 6])
def test_bytes_kept_by_a_block_and_its_transition(keep, bottlenecks, features, layers):
    """X, the bottleneck outputs, the statistics, and a few numbers for each number of a norm: nothing else."""
    init, growth, width, pixels = 24, 8, 32, 2 * 16 * 16
    parts = make_efficient(DenseNet(3, init, growth, (layers, 1), 0.5, bn_size=4).features[1:3], keep)
    x = torch.randn(2, init, 16, 16, requires_grad=True)
    alive, output = alive_after_forward(parts, x)
    channels = init + layers * growth
    kept = pixels * (features * channels + bottlenecks * layers * width)
    read = sum(init + layer * growth for layer in range(layers + 1)) + layers * width
    statistics = 2 * channels + 1 + 2 * layers * width + 3 * read
    assert alive == 4 * (kept + statistics + output.numel())


@pytest.mark.parametrize(("keep", "buffers"), [("features", 1), ("inputs", 2)])
def test_bytes_that_backward_through_a_block_adds(keep, buffers, monkeypatch):
    """Of each image D, with `"inputs"` X too, and one bottleneck output with its gradient: nothing else at any time."""
    monkeypatch.setitem(layout.SCRATCH, "cpu", 1)  # of one image
    init, growth, width, layers, pixels = 24, 8, 32, 3, 16 * 16
    parts, peaks = make_efficient(DenseNet(3, init, growth, (layers, 1), 0.5, bn_size=4).features[1:3], keep), []
    for n in (8, 16):
        output = parts(torch.randn(n, init, 16, 16, requires_grad=True))
        grad = torch.ones_like(output)
        peaks.append(peak_bytes(lambda output=output, grad=grad: output.backward(grad)))
    values = buffers * (init + layers * growth) + 2 * width
    assert (peaks[1] - peaks[0]) == 8 * 4 * pixels * values


@every_keep
def test_bytes_kept_by_the_stem(keep):
    """Of what is large, the image alone, which is there anyway."""
    features = DenseNet(3, 8, 4, (1, 1), input_size=64, efficient=True, keep=keep).features
    x, pooled = torch.randn(2, 3, 64, 64), []
    features.denseblock1.register_forward_pre_hook(lambda _module, inputs: pooled.append(inputs[0]) or 1 / 0)

    def stem(x):
        with pytest.raises(ZeroDivisionError):
            features(x)
        return pooled[0]

    alive, output = alive_after_forward(stem, x)
    statistics = 2 * 8 + 1 + 3 * 8
    assert output.numel() == 2 * 8 * 16 * 16
    assert alive == 4 * (statistics + output.numel())


@every_keep
def test_memory_is_linear_in_depth(keep):
    alive = []
    for depth in (22, 40, 58):
        network = densenet_cifar(depth, 8, efficient=True, keep=keep)
        # Whatever the batch, three numbers for each channel that a norm reads: quadratic in depth, as norms are.
        vectors = 4 * 3 * sum(m.num_features for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
        alive.append(alive_after_forward(network, torch.randn(2, 3, 32, 32))[0] - vectors)
    growth = [b - a for a, b in pairwise(alive)]
    assert abs(growth[1] - growth[0]) <= 0.01 * growth[0]


def growth_of_the_peak(**arguments):
    """Of the peak bytes of a training step, from each depth to the next."""
    peaks = []
    for depth in (22, 40, 58):
        network, x = densenet_cifar(depth, 8, **arguments), torch.randn(2, 3, 32, 32)
        for parameter in network.parameters():
            # The gradients of the weights are quadratic in depth, as the weights are: not in the shared buffer's test.
            parameter.requires_grad_(parameter.dim() < 4 or not arguments)
            parameter.grad = torch.zeros_like(parameter)
        peaks.append(peak_bytes(lambda network=network, x=x: weighted_sum(network(x)).backward()))
    return [b - a for a, b in pairwise(peaks)]


@every_keep
def test_peak_of_a_training_step_is_linear_in_depth(keep):
    first, second = growth_of_the_peak(efficient=True, keep=keep)
    assert abs(second - first) <= 0.02 * first


def test_peak_of_the_ordinary_network_is_not():
    first, second = growth_of_the_peak()
    assert second > 1.4 * first


def multiplications(network, x):
    """Of all convolutions: in forward, in forward operations during backward, and in backward operations."""
    counts = []
    profile = {"activities": [torch.profiler.ProfilerActivity.CPU], "record_shapes": True}
    with torch.profiler.profile(**profile) as forward:
        loss = weighted_sum(network(x))
    with torch.profiler.profile(**profile) as backward:
        loss.backward()
    for profiled, name in ((forward, "convolution"), (backward, "convolution"), (backward, "convolution_backward")):
        shapes = [event.input_shapes for event in profiled.events() if event.name == f"aten::{name}"]
        # (input or output gradient) N·pixels, and everything a weight has; convolutions here keep the resolution
        counts.append(sum(prod((s[0][0], *s[0][2:])) * prod(s[1 + (name != "convolution")]) for s in shapes))
    return counts


def test_what_is_computed_again_by_exact_counts():
    arguments = {"num_init_features": 8, "growth_rate": 4, "block_config": (3, 2), "bn_size": 2, "compression": 0.5}
    x, pixels = torch.randn(2, 3, 16, 16), 2 * 16 * 16
    ordinary = multiplications(DenseNet(**arguments), x)
    transition = 20 * 10 * pixels  # pooled first: a quarter of it remains
    layers = 8 * sum((8, 12, 16)) * pixels + 8 * sum((10, 14)) * pixels // 4  # the 1×1 convolutions
    block = layers + 9 * 8 * 4 * (3 * pixels + 2 * pixels // 4)
    last_block = 8 * sum((10, 14)) * pixels // 4 + 2 * 9 * 8 * 4 * pixels // 4
    again = {"bottleneck": 0, "features": layers, "inputs": layers + (block - last_block)}
    for keep, expected in again.items():
        with plain_pytorch():  # whose convolutions can be counted
            forward, repeated, backward = multiplications(DenseNet(**arguments, efficient=True, keep=keep), x)
        assert forward == ordinary[0] - transition * 3 // 4
        assert repeated == expected
        assert backward == ordinary[2] - transition * 3 // 4


def test_nothing_is_kept_without_gradients():
    ordinary, efficient = pair(IMAGENET, training=False)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            output = efficient(images())
            torch.testing.assert_close(output, ordinary(images()))
            assert output.grad_fn is None
            alive, output = alive_after_forward(efficient, images())
            assert alive == output.numel() * 8
