"""The shared buffer takes what the ordinary network takes: layouts, dimensions, types, mixed precision."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from comparison import assert_close, assert_identical, gradients, training_step, weighted_sum
from torch import nn
from twins import BOTTLENECK, IMAGENET, NETWORKS, PLAIN, images, norms, pair

from efficient_densenet import make_efficient, ops, report
from efficient_densenet.execution import KEEP

every_network = pytest.mark.parametrize("arguments", NETWORKS.values(), ids=NETWORKS.keys())
every_keep = pytest.mark.parametrize("keep", KEEP)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def every_second_pixel(x):
    return x.repeat_interleave(2, 3)[..., ::2]


def transposed(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def expanded(x):
    return x[:1].expand_as(x)


def opposite(x):
    return torch._neg_view(channels_last(-x))


@pytest.mark.parametrize("layout", [channels_last, every_second_pixel, transposed, expanded])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@every_network
def test_memory_layouts(arguments, layout, memory_format):
    ordinary, efficient = pair(arguments, change=lambda network: network.to(memory_format=memory_format))
    x = layout(images())
    assert_close(training_step(efficient, x), training_step(ordinary, x))


@pytest.mark.parametrize("arguments", [BOTTLENECK, IMAGENET], ids=["bottleneck", "imagenet"])
def test_memory_that_holds_the_opposite_numbers(arguments):
    """As that of the imaginary part of a conjugate does, for an input and for a gradient."""

    def results(layout):
        _, efficient = pair(arguments, dtype=torch.float32)
        block = nn.Sequential(efficient.features.denseblock1, efficient.features.transition1)
        x = images(dtype=torch.float32)
        for part, given in ((efficient.features, x), (block, efficient.features[:-4](x).detach())):
            output = part(layout(given))
            output.backward(layout(output.detach().cos()))
            part.eval()
            with torch.no_grad():
                yield from [part(layout(given)) for _ in range(2)]
        yield from gradients(efficient).values()

    found, expected = ([*results(layout)] for layout in (opposite, channels_last))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last, every_second_pixel, transposed])
def test_memory_layouts_of_a_blocks_input_and_of_its_gradient(layout, keep):
    results = []
    for network in pair(BOTTLENECK, keep):
        features = network.features
        x = layout(torch.linspace(-1, 1, 3 * 6 * 8 * 10, dtype=torch.float64).view(3, 6, 8, 10)).requires_grad_()
        for part in (features.denseblock1, nn.Sequential(features.denseblock1, features.transition1)):
            output = part(x)
            output.backward(layout(output.detach().cos()))
        results.append({"input gradient": x.grad, "output": output.detach(), **gradients(network)})
    assert_close(results[1], results[0])


@every_keep
@pytest.mark.parametrize("per_layer", [1, 2])
@pytest.mark.parametrize("pool", [0, 2])
@pytest.mark.parametrize("size", [(11,), (5, 7), (3, 4, 5)], ids=str)
def test_one_two_and_three_dimensions(size, pool, per_layer, keep):
    """A block written out in PyTorch's own modules, in float64."""
    dims = len(size)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    average_pool = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1]
    torch.manual_seed(0)

    def reader(in_channels, out_channels, kernel):
        made = conv(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        return norm(in_channels), nn.ReLU(), made

    def layer(width):
        return nn.Sequential(*(reader(width, 6, 1) + reader(6, 3, 3) if per_layer == 2 else reader(width, 3, 3)))

    block = Concatenating(*(layer(width) for width in (5, 8, 11)))
    ordinary = nn.Sequential(block, nn.Sequential(*reader(14, 7, 1), average_pool(pool)) if pool else nn.Identity())
    efficient = make_efficient(copy.deepcopy(ordinary.double()), keep)
    assert {entry.now for entry in report(efficient).adopted} <= {"shared buffer", "joins stem and transitions"}
    x = torch.randn(2, 5, *size, generator=generator(), dtype=torch.float64)
    assert_close(training_step(efficient, x), training_step(ordinary, x))


class Concatenating(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = torch.cat([x, layer(x)], 1)
        return x


def generator():
    return torch.Generator().manual_seed(5)


@every_keep
def test_an_input_without_gradient(keep):
    results = []
    for network in pair(BOTTLENECK, keep):
        weighted_sum(network(images())).backward()
        results.append(gradients(network))
    assert_close(results[1], results[0])


@every_keep
def test_single_channels(keep):
    arguments = BOTTLENECK | {"num_init_features": 1, "growth_rate": 1, "bn_size": 1, "compression": 1.0}
    for one in (arguments, arguments | {"bn_size": None}):
        ordinary, efficient = pair(one, keep)
        assert_close(training_step(efficient, images()), training_step(ordinary, images()))


@every_network
def test_an_empty_batch_in_evaluation(arguments):
    _, efficient = pair(arguments, training=False)
    with torch.no_grad():
        assert efficient(images(0)).shape == (0, 7)


@every_network
def test_one_pixel_in_evaluation(arguments):
    ordinary, efficient = pair(arguments | {"block_config": (3,)}, training=False)
    x = images(1, 1, 1)
    assert_close(training_step(efficient, x), training_step(ordinary, x))


@every_keep
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 3)], ids=str)
def test_one_value_per_channel_is_refused_as_in_the_ordinary_network(keep, shape):
    """At the first norm that meets it, be it the last one of all."""
    messages = []
    for network in pair(PLAIN | {"block_config": (2, 2)}, keep, change=lambda n: setattr(n, "min_input_size", 1)):
        with pytest.raises((ValueError, RuntimeError)) as raised:
            network(images(*shape))
        messages.append((raised.type, str(raised.value)))
    assert messages[0] == messages[1]


@every_keep
def test_a_changed_input_is_noticed_where_it_is_needed(keep):
    """With keep="inputs" alone: the others hold a copy of the block's input among the features."""
    ordinary, _ = pair(BOTTLENECK)
    efficient = make_efficient(copy.deepcopy(ordinary.features[1:3]), keep)
    x = torch.linspace(-1, 1, 3 * 6 * 8 * 10, dtype=torch.float64).view(3, 6, 8, 10)
    expected = ordinary.features.transition1(ordinary.features.denseblock1(x))
    weighted_sum(expected).backward()
    x = x.clone()
    output = efficient(x)
    x.zero_()
    if keep == "inputs":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            weighted_sum(output).backward()
    else:
        weighted_sum(output).backward()
        assert_close(gradients(efficient), gradients(ordinary.features[1:3]))


@every_keep
def test_a_changed_parameter_is_noticed(keep):
    for name in ("norm1.weight", "conv1.weight", "norm2.bias", "conv2.weight"):
        _, network = pair(BOTTLENECK, keep)
        loss = weighted_sum(network(images()))
        with torch.no_grad():
            network.features.denseblock1.denselayer2.get_parameter(name).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_network
@every_keep
def test_running_averages_may_move_between_evaluation_and_backward(arguments, keep):
    """Frozen norms are constants of their own time, in the ordinary network through what autograd saved."""
    results = []
    ordinary, efficient = pair(arguments, keep, training=False)
    for network in (ordinary, efficient):
        loss = weighted_sum(network(images()))
        if network is efficient:  # which PyTorch's batch norm would refuse
            with torch.no_grad():
                for norm in norms(network):
                    if norm is not network.features[-1]:
                        norm.running_mean.add_(1)
        loss.backward()
        results.append(gradients(network))
    assert_close(results[1], results[0])


@every_keep
def test_autocast_leaves_double_precision_alone(keep):
    results = []
    for network in pair(IMAGENET, keep):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network.features(images())
        assert output.dtype == torch.float64
        weighted_sum(output).backward()
        results.append({"output": output.detach(), **gradients(network)})
    assert_close(results[1], results[0])


@every_network
@every_keep
@pytest.mark.parametrize("backend", [nullcontext, ops.plain_pytorch], ids=["this processor's", "plain PyTorch"])
def test_backward_in_a_context_of_autocast_has_the_types_of_forward(arguments, keep, backend):
    _, network = pair(arguments, keep, dtype=torch.float32)
    with backend():
        loss = weighted_sum(network.features(images(dtype=torch.float32)))
        loss.backward(retain_graph=True)
        expected = gradients(network)
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
    assert_identical(gradients(network), expected)


def mixed_precision_step(network, x, scaler):
    with torch.autocast("cpu", dtype=torch.float16):
        output = network(x)
    scaler.scale(weighted_sum(output.float())).backward()


@every_network
@every_keep
def test_single_half_precision_with_a_gradient_scaler(arguments, keep):
    """Errors against float64 are like the ordinary network's, and an overflow skips the step."""
    x = images(8, 24, 24)
    expected = training_step(pair(arguments)[0], x)
    errors = []
    for network in pair(arguments, keep, dtype=torch.float32):
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
        mixed_precision_step(network, x.float(), scaler)
        scaler.unscale_(optimizer)
        found = gradients(network)
        difference = sum((found[k].double() - expected[k]).square().sum() for k in found)
        errors.append((difference / sum(expected[k].square().sum() for k in found)).sqrt().item())

        before = {k: p.detach().clone() for k, p in network.named_parameters()}
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        mixed_precision_step(network, x.float(), scaler)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**39
        assert all(torch.equal(p, before[k]) for k, p in network.named_parameters())
    assert errors[1] <= 2 * errors[0]
