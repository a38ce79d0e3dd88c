"""The recomputing way equals the ordinary one in every bit, keeps less, and changes nothing behind the scenes."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
import twins
from comparison import assert_close, assert_identical, buffers, training_step, weighted_sum
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from twins import (
    BOTTLENECK,
    NETWORKS,
    PLAIN,
    frozen_convolutions,
    frozen_first_block,
    frozen_norms,
    momentum_none,
    norms,
    without_affine,
    without_running_statistics,
)

from efficient_densenet import DenseNet, recomputing
from efficient_densenet.execution import recompute
from efficient_densenet.measure.memory import peak_bytes
from efficient_densenet.models import DenseLayer

every_network = pytest.mark.parametrize("arguments", NETWORKS.values(), ids=NETWORKS.keys())
every_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def pair(arguments, training=True, change=lambda network: None):
    """An ordinary and a recomputing network with the same weights and mode, in single precision."""
    return twins.pair(arguments, training=training, change=change, dtype=torch.float32, efficient="recompute")


def images(n=3, height=19, width=22, dtype=torch.float32):
    return twins.images(n, height, width, dtype)


def assert_same_steps(ordinary, efficient, x, steps=2):
    for step in range(steps):
        results = []
        for network in (ordinary, efficient):
            torch.manual_seed(step)  # dropout
            results.append(training_step(network, x))
        assert_identical(results[1], results[0])


@every_network
@every_mode
def test_bit_identical(arguments, training):
    assert_same_steps(*pair(arguments, training), images())


@every_network
def test_dropout_draws_the_same_masks(arguments):
    assert_same_steps(*pair(arguments | {"drop_rate": 0.3}), images())


@every_network
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(arguments, dtype):
    assert_same_steps(*pair(arguments, change=lambda n: n.to(dtype)), images(dtype=dtype))


@every_network
@every_mode
def test_autocast(arguments, training):
    results = []
    for network in pair(arguments, training):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(images())
        weighted_sum(output.float()).backward()  # outside of autocast, as training loops do it
        results.append({k: p.grad for k, p in network.named_parameters()} | buffers(network) | {"output": output})
    assert results[0]["output"].dtype == torch.bfloat16
    assert_identical(results[1], results[0])


@every_network
def test_channels_last(arguments):
    to_channels_last = {"change": lambda n: n.to(memory_format=torch.channels_last)}
    assert_same_steps(*pair(arguments, **to_channels_last), images().to(memory_format=torch.channels_last))


@pytest.mark.parametrize("shape", [(1, 17, 23), (2, 8, 5)], ids=str)
def test_odd_shapes(shape):
    assert_same_steps(*pair(BOTTLENECK), images(*shape))


@every_network
@pytest.mark.parametrize(
    "change",
    [momentum_none, without_running_statistics, without_affine, frozen_norms, frozen_first_block, frozen_convolutions],
)
def test_norms_and_frozen_parts(arguments, change):
    assert_same_steps(*pair(arguments, change=change), images())


def test_input_without_gradient():
    results = []
    for network in pair(BOTTLENECK, change=frozen_first_block):
        weighted_sum(network(images())).backward()
        results.append({k: p.grad for k, p in network.named_parameters() if p.grad is not None})
    assert_identical(results[1], results[0])


@every_network
def test_retained_graph(arguments):
    results = []
    for network in pair(arguments):
        loss = weighted_sum(network(images()))
        loss.backward(retain_graph=True)
        after_forward = buffers(network)
        loss.backward(retain_graph=True)
        loss.backward()
        assert_identical(buffers(network), after_forward)
        results.append({k: p.grad for k, p in network.named_parameters()} | after_forward)
    assert_identical(results[1], results[0])


@every_network
@every_mode
def test_gradients_of_gradients(arguments, training):
    results = []
    for network in pair(arguments, training, change=lambda n: n.double()):
        x = images(dtype=torch.float64).requires_grad_()
        parameters = dict(network.named_parameters())
        first = torch.autograd.grad(weighted_sum(network(x)), [x, *parameters.values()], create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(penalty, [x, *parameters.values()], allow_unused=True)
        names = ["input", *parameters]
        results.append(
            {f"first {k}": g for k, g in zip(names, first, strict=True)}
            | {f"second {k}": g for k, g in zip(names, second, strict=True) if g is not None}
        )
    assert any(name.startswith("second features.denseblock1") for name in results[0])
    assert_identical(results[1], results[0])


@every_network
def test_running_statistics_move_once_per_step(arguments):
    _, network = pair(arguments)
    before = [norm.num_batches_tracked.item() for norm in norms(network)]
    loss = weighted_sum(network(images()))
    loss.backward(retain_graph=True)
    loss.backward()
    assert [norm.num_batches_tracked.item() for norm in norms(network)] == [count + 1 for count in before]


def test_two_forwards_before_backward():
    results = []
    for network in pair(BOTTLENECK):
        first, second = network(images()), network(images(2))
        (weighted_sum(first) + weighted_sum(second)).backward()
        results.append({k: p.grad for k, p in network.named_parameters()} | buffers(network))
    assert_identical(results[1], results[0])


@pytest.mark.parametrize("training", [True, False], ids=["to evaluation", "to training"])
def test_mode_changed_between_forward_and_backward(training):
    results = []
    for network in pair(PLAIN, training):
        loss = weighted_sum(network(images()))
        network.train(not training)
        loss.backward()
        assert all(norm.training is not training for norm in norms(network))
        results.append({k: p.grad for k, p in network.named_parameters()})
    assert_identical(results[1], results[0])


def test_a_changed_parameter_is_noticed():
    _, network = pair(PLAIN)
    loss = weighted_sum(network(images()))
    with torch.no_grad():
        network.features.denseblock1.denselayer1.norm1.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_changed_activation_is_noticed():
    _, network = pair(PLAIN)
    block = network.features.denseblock1
    x = images().requires_grad_()
    features = network.features.conv0(x)
    output = block(features)
    features.data.add_(0)  # .data hides the change from autograd, as it does in the ordinary network
    features.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighted_sum(output).backward()


@pytest.mark.parametrize(
    "overwrite",
    [
        lambda s, new: s.copy_(new),
        lambda s, new: s[:, 1:].copy_(new[:, 1:]),
        lambda s, new: torch.mul(new, 2, out=s),
        lambda s, new: torch.clamp(new, 0, out=s),
        lambda s, new: torch.abs(new, out=s.view(-1)[: new.numel()].view_as(new)),
        lambda s, new: torch._foreach_mul_([s, s.detach()], 3.0),
    ],
)
def test_what_was_overwritten_is_not_computed_again(overwrite):
    x, new = images(), images().cos()
    gradients = []
    for context in (nullcontext, recomputing):
        weight = torch.ones(3, 1, 1, dtype=torch.float64, requires_grad=True)
        with context():
            s = torch.relu(x)
            overwrite(s, new)
            product = weight * s
        product.square().sum().backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


def test_sparse_tensors_may_be_changed_in_place():
    with recomputing():
        sparse = torch.eye(3).to_sparse().mul_(2)
    assert torch.equal(sparse.to_dense(), 2 * torch.eye(3))


def test_hooks_inside_a_layer_see_each_activation_once():
    ordinary, efficient = pair(PLAIN)
    seen = []
    for network in (ordinary, efficient):
        layer = network.features.denseblock1.denselayer1
        layer.norm1.register_forward_hook(lambda _module, _inputs, output: seen.append(1) or output * 2)
    assert_same_steps(ordinary, efficient, images(), steps=1)
    assert len(seen) == 2


def test_no_warning():
    _, network = pair(PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training_step(network, images())


@pytest.mark.parametrize("bn_size", [None, 4])
def test_a_dense_layer_keeps_its_inputs_alone(bn_size):
    """By exact byte counts: what hangs on the graph after forward, beyond the features themselves."""
    layer = DenseLayer(24, 8, bn_size)
    features = [torch.randn(2, 8, 16, 16, requires_grad=True) for _ in range(3)]
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile, recompute.recomputing():
        output = layer(features)
    events = profile.profiler.kineto_results.events()
    alive = sum(event.nbytes() for event in events if event.name() == "[memory]")
    pixels = 2 * 16 * 16 * 4  # bytes of one channel
    bottleneck = 0 if bn_size is None else 32
    statistics = 2 * 4 * (24 + bottleneck)  # mean and inverse deviation of every normalised channel
    assert alive == pixels * (8 + bottleneck) + statistics
    weighted_sum(output).backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_random_rectifier_keeps_what_it_has_drawn_alone(inplace):
    """Not what it made, which the convolution needs."""
    layer = nn.Sequential(nn.BatchNorm2d(8), nn.RReLU(inplace=inplace), nn.Conv2d(8, 4, 1, bias=False))

    def step(context):
        layer.zero_grad()
        torch.manual_seed(0)
        x, activities = images_of(8), [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile, context:
            output = layer(x)
        weighted_sum(output).backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        alive = sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
        return alive, gradients | {"x": x.grad, "output": output.detach()}

    _, expected = step(nullcontext())
    alive, actual = step(recompute.recomputing())
    pixels, statistics = 2 * 16 * 16 * 4, 2 * 4 * 8
    assert alive == pixels * (8 + 4) + statistics
    assert_identical(actual, expected)


def images_of(channels):
    return torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()


def part_of_it(offset):
    offset[:, 1:] = 7


OVERWRITTEN = {
    "in place": lambda offset: offset.mul_(3),
    "by a result": lambda offset: torch.mul(offset.clone(), 3, out=offset),
    "a part of it": part_of_it,
    "several": lambda offset: torch._foreach_mul_([offset, torch.ones(2)], 3),
}


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_what_is_overwritten_before_backward(name):
    """Autograd does not need these values: what was made of them is computed again from a copy."""
    results = []
    for context in (nullcontext(), recompute.recomputing()):
        x, offset, weight = images_of(4), torch.full((1, 4, 1, 1), 0.5), torch.ones(3, 4, 1, 1)
        with context:
            output = torch.conv2d(torch.relu(x + offset), weight)
            OVERWRITTEN[name](offset)
            output = output + torch.conv2d(torch.relu(x + offset), weight)
        weighted_sum(output).backward()
        results.append({"output": output.detach(), "x": x.grad})
    assert_identical(results[1], results[0])


def both_ways(function):
    """What the function makes of an image with four channels, and the gradient of that, ordinary and recomputing."""
    results = []
    for context in (nullcontext(), recompute.recomputing()):
        x = images_of(4)
        with context:
            output = function(x)
        weighted_sum(output.float()).backward()
        results.append({"output": output.detach(), "x": x.grad})
    return results


@pytest.mark.parametrize(
    "view", [lambda s: s[:, :2], lambda s: s[:, 1:3, ::2], lambda s: s[:, :1].expand(-1, 2, -1, -1)]
)
def test_a_view_is_overwritten_before_backward(view):
    """What has gaps, or shows a value several times, is copied as it is laid out."""

    def function(x):
        features = torch.conv2d(x, torch.ones(4, 4, 1, 1))
        output = torch.conv2d(torch.sigmoid(view(features)), torch.ones(3, 2, 1, 1))
        features.mul_(3)
        return output + torch.conv2d(torch.sigmoid(view(features)), torch.ones(3, 2, 1, 1))

    ordinary, recomputed = both_ways(function)
    assert_identical(recomputed, ordinary)


@pytest.mark.parametrize("implementation", ["module", "legacy", "legit"])
def test_running_statistics_move_before_backward(implementation):
    """A batch norm writes to them, though PyTorch's schema of it does not say so."""

    def function(x):
        norm = nn.BatchNorm2d(4)
        norm.running_mean.fill_(0.25)
        centred = x - norm.running_mean.view(1, 4, 1, 1)
        output = torch.conv2d(centred * centred, torch.ones(4, 4, 1, 1))
        tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
        if implementation == "module":
            return output + norm(x)
        if implementation == "legacy":
            return output + torch.native_batch_norm(x, *tensors, True, 0.1, 1e-5)[0]
        return output + torch._native_batch_norm_legit(x, *tensors, True, 0.1, 1e-5)[0]

    ordinary, recomputed = both_ways(function)
    assert_identical(recomputed, ordinary)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_added_in_place_may_have_another_type(dtype):
    """Out of place, the sum would have a type with more digits, which no convolution takes."""

    def function(x):
        features = nn.functional.batch_norm(x.to(dtype), None, None, training=True)
        features += torch.linspace(0, 1, 4, dtype=torch.float64).view(4, 1, 1)
        return torch.conv2d(features, torch.ones(3, 4, 1, 1, dtype=dtype))

    ordinary, recomputed = both_ways(function)
    assert_identical(recomputed, ordinary)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_random_rectifier_in_each_type(dtype):
    """In half precision it multiplies by more digits than it keeps."""

    def function(x):
        torch.manual_seed(0)
        features = nn.functional.batch_norm(x.to(dtype), None, None, training=True)
        features = nn.functional.rrelu(features, training=True)
        return (features * features).sum(1, keepdim=True)

    ordinary, recomputed = both_ways(function)
    assert_identical(recomputed, ordinary)


def test_views_as_complex_numbers():
    def pairs(x):
        numbers = torch.view_as_complex(torch.sigmoid(x).unflatten(-1, (-1, 2)))
        return torch.view_as_real(numbers * numbers)

    def conjugates(x):
        numbers = torch.complex(x, x.cos()) * 2
        return torch.view_as_real(numbers.conj() * numbers.conj().sin())

    for function in (pairs, conjugates):
        ordinary, recomputed = both_ways(function)
        assert_identical(recomputed, ordinary)


def test_what_several_results_were_made_of_is_copied_once():
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            copies.extend([function] * (function is torch.ops.aten.clone.default))
            return function(*args, **kwargs or {})

    offset = torch.ones(1, 4, 1, 1)
    with Copies(), recompute.recomputing():
        made = [f(images_of(4) + offset) for f in (torch.relu, torch.sigmoid, torch.tanh)]
        offset.mul_(2)
    assert len(made) == 3 and len(copies) == 1


@every_network
def test_convolutions_run_once(arguments):
    counts = []
    for network in pair(arguments):
        with FlopCounterMode(display=False) as counter:
            weighted_sum(network(images())).backward()
        counts.append(counter.get_total_flops())
    assert counts[1] == counts[0] > 0


@pytest.fixture
def results(monkeypatch):
    """Weak references to every result that was forgotten during the test."""
    references = []

    class Recorded(recompute._Result):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            references.append(weakref.ref(self))

    monkeypatch.setattr(recompute, "_Result", Recorded)
    return references


def test_recomputed_activations_do_not_outlive_backward(results):
    """Even where only some of the nodes that could use them run."""
    _, network = pair(BOTTLENECK)
    loss = weighted_sum(network(images()))
    first_layer = network.features.denseblock1.denselayer1
    torch.autograd.grad(loss, [first_layer.conv1.weight], retain_graph=True)
    there = [result() for result in results if result() is not None]
    assert len(there) > 5 and all(result.again is None for result in there)
    loss.backward(retain_graph=True)
    assert all(result.again is None for result in there)


def test_the_graph_is_freed_without_the_garbage_collector(results):
    _, network = pair(BOTTLENECK)
    gc.disable()
    try:
        weighted_sum(network(images())).backward()
        network(images())  # and where backward never comes
        assert len(results) > 10
        assert all(result() is None for result in results)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "function", [torch.exp, lambda x: x.softmax(1), lambda x: x.mean((2, 3)).sigmoid()], ids=["exp", "softmax", "gate"]
)
def test_an_output_that_stays_is_freed_with_the_graph(function):
    """Where backward never comes: an output that kept itself would stay as long as the process."""
    with recompute.recomputing():
        output = function(images_of(4))
        product = output * output
    reference = weakref.ref(output)
    gc.disable()
    try:
        del output, product
        assert reference() is None
    finally:
        gc.enable()


def test_backward_frees_what_it_has_used():
    """The last layers' features are gone when the first layers' gradients are made."""
    network = DenseNet(3, 12, 12, (8, 8), 0.5, bn_size=4, efficient="recompute")
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(16, 3, 32, 32)
    kept = []
    forward = peak_bytes(lambda: kept.append(network(x)))
    assert (
        peak_bytes(lambda: network(x).sum().backward()) < 1.25 * forward
    )  # with gradients, and one layer computed again


def test_nothing_is_kept_without_gradients():
    ordinary, efficient = pair(BOTTLENECK, training=False)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            output = efficient(images())
            assert torch.equal(output, ordinary(images()))
            assert output.grad_fn is None


def test_deep_copies_are_independent():
    _, network = pair(BOTTLENECK)
    expected = training_step(copy.deepcopy(network), images())
    twin = copy.deepcopy(network)
    training_step(network, images(2))
    assert_identical(training_step(twin, images()), expected)


def test_compiles_without_graph_breaks():
    ordinary, efficient = pair(BOTTLENECK, change=lambda n: n.double())
    compiled = torch.compile(efficient, backend="aot_eager", fullgraph=True)
    x = images(dtype=torch.float64)
    expected, actual = training_step(ordinary, x), training_step(compiled, x)
    assert_close({k.replace("_orig_mod.", ""): v for k, v in actual.items()}, expected)
