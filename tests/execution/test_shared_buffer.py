"""The shared buffer computes what the ordinary network does, in every mode, and keeps what it says."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise
from math import prod

import pytest
import torch
from comparison import assert_close, buffers, training_step, weighted_sum
from torch import nn

from efficient_densenet import DenseNet, densenet_cifar

PLAIN = {"num_init_features": 6, "growth_rate": 5, "block_config": (3, 2), "num_classes": 7}
BOTTLENECK = PLAIN | {"bn_size": 2, "compression": 0.5}
IMAGENET = BOTTLENECK | {"input_size": 64}
NETWORKS = {"plain": PLAIN, "bottleneck": BOTTLENECK, "imagenet stem": IMAGENET}
KEEP = ["bottleneck", "features", "inputs"]

every_network = pytest.mark.parametrize("arguments", NETWORKS.values(), ids=NETWORKS.keys())
every_keep = pytest.mark.parametrize("keep", KEEP)


def pair(arguments, keep="bottleneck", training=True, change=lambda network: None, dtype=torch.float64):
    """An ordinary network and one on the shared buffer, with the same weights, both passed through `change`."""
    torch.manual_seed(0)
    ordinary = DenseNet(**arguments)
    for norm in norms(ordinary):
        for tensor in (norm.weight, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            nn.init.uniform_(tensor, -0.5, 0.5)
    efficient = DenseNet(**arguments, efficient=True, keep=keep)
    efficient.load_state_dict(ordinary.state_dict(), strict=True)
    for network in (ordinary, efficient):
        change(network.train(training).to(dtype))
    return ordinary, efficient


def norms(network):
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


def images(n=3, height=19, width=22, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(n, 3, height, width, dtype=dtype)


def assert_same_steps(ordinary, efficient, x, steps=2):
    for step in range(steps):
        results = []
        for network in (efficient, ordinary):
            torch.manual_seed(step)  # dropout
            results.append(training_step(network, x))
        assert_close(*results)


@every_network
@every_keep
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.filterwarnings("error")
def test_equals_the_ordinary_network(arguments, keep, training):
    assert_same_steps(*pair(arguments, keep, training), images())


def momentum_none(network):
    for norm in norms(network):
        norm.momentum = None


def without_running_statistics(network):
    for norm in norms(network):
        norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = (
            False,
            None,
            None,
            None,
        )


def without_affine(network):
    for norm in norms(network):
        norm.weight = norm.bias = None


def frozen_norms(network):
    for norm in norms(network):
        norm.eval().requires_grad_(False)


def every_other_norm_frozen(network):
    for norm in norms(network)[::2]:
        norm.eval()


def frozen_first_block(network):
    network.features.conv0.requires_grad_(False)
    network.features.denseblock1.requires_grad_(False)


def frozen_convolutions(network):
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)


def channels_last(network):
    network.to(memory_format=torch.channels_last)


@every_network
@every_keep
@pytest.mark.parametrize(
    "change",
    [
        momentum_none,
        without_running_statistics,
        without_affine,
        frozen_norms,
        every_other_norm_frozen,
        frozen_first_block,
        frozen_convolutions,
        channels_last,
    ],
)
def test_norms_and_frozen_parts(arguments, keep, change):
    assert_same_steps(*pair(arguments, keep, change=change), images())


@every_network
@every_keep
def test_dropout_draws_the_same_masks(arguments, keep):
    assert_same_steps(*pair(arguments | {"drop_rate": 0.3}, keep), images())


def test_dropout_of_a_channels_last_network():
    ordinary, efficient = pair(BOTTLENECK | {"drop_rate": 0.3}, change=channels_last)
    assert_same_steps(ordinary, efficient, images().to(memory_format=torch.channels_last))


@every_keep
@pytest.mark.parametrize("shape", [(1, 17, 23), (2, 8, 5), (5, 32, 32)], ids=str)
def test_odd_shapes(shape, keep):
    assert_same_steps(*pair(BOTTLENECK, keep), images(*shape))


@every_network
@every_keep
def test_retained_graph_moves_the_statistics_once(arguments, keep):
    results = []
    for network in pair(arguments, keep):
        loss = weighted_sum(network(images()))
        loss.backward(retain_graph=True)
        loss.backward()
        results.append({f"gradient {k}": p.grad for k, p in network.named_parameters()} | buffers(network))
    assert all(norm.num_batches_tracked == 1 for norm in norms(network))
    assert_close(results[1], results[0])


@every_keep
def test_two_forwards_before_backward(keep):
    results = []
    for network in pair(BOTTLENECK, keep):
        first, second = network(images()), network(images(2))
        (weighted_sum(first) + weighted_sum(second)).backward()
        results.append({f"gradient {k}": p.grad for k, p in network.named_parameters()} | buffers(network))
    assert_close(results[1], results[0])


@every_keep
@pytest.mark.parametrize("training", [True, False], ids=["to evaluation", "to training"])
def test_mode_changed_between_forward_and_backward(keep, training):
    results = []
    for network in pair(BOTTLENECK, keep, training):
        loss = weighted_sum(network(images()))
        network.train(not training)
        loss.backward()
        results.append({f"gradient {k}": p.grad for k, p in network.named_parameters()})
    assert_close(results[1], results[0])


def relative_error(actual, expected):
    names = [name for name in expected if name.startswith("gradient")]
    difference = sum((actual[n].double() - expected[n].double()).square().sum() for n in names)
    return (difference / sum(expected[n].double().square().sum() for n in names)).sqrt().item()


@every_network
@every_keep
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_errors_are_like_the_ordinary_networks(arguments, keep, mode):
    """Against float64: no more than twice the ordinary network's error for the whole gradient."""
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    x = images(8, 24, 24)
    reference, _ = pair(arguments, keep)
    expected = training_step(reference, x)
    errors = []
    for network in pair(arguments, keep, dtype=dtype):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            errors.append(relative_error(training_step(network, x.to(dtype)), expected))
    assert errors[1] <= 2 * errors[0]


@every_keep
def test_results_repeat_bit_for_bit(keep):
    _, network = pair(IMAGENET, keep, dtype=torch.float32)
    results = [training_step(copy.deepcopy(network), images(dtype=torch.float32)) for _ in range(2)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_gradients_of_gradients_are_refused():
    for arguments in (BOTTLENECK, IMAGENET):
        _, network = pair(arguments)
        x = images().requires_grad_()
        (gradient,) = torch.autograd.grad(weighted_sum(network(x)), x, create_graph=True)
        with pytest.raises(RuntimeError, match="efficient='recompute'"):
            gradient.square().sum().backward()


def test_one_value_per_channel_is_refused():
    _, network = pair(PLAIN)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network.features.denseblock1(torch.randn(1, 6, 1, 1, dtype=torch.float64))


def test_a_blocks_output_owns_its_memory_and_is_guarded():
    ordinary, efficient = pair(BOTTLENECK)
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64, requires_grad=True)
    first, second = efficient.features.denseblock1(x), efficient.features.denseblock1(x)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    torch.testing.assert_close(second, ordinary.features.denseblock1(x))
    first.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighted_sum(first).backward()


@pytest.mark.parametrize("where", ["features.denseblock1", "features.transition1", "features.norm0", "features.conv0"])
@pytest.mark.filterwarnings("ignore:the stem keeps")
def test_hooks_outside_layers_see_what_the_ordinary_network_has(where):
    seen = []
    for network in pair(IMAGENET):
        outputs = []
        network.get_submodule(where).register_forward_hook(lambda *a, outputs=outputs: outputs.append(a[2].clone()))
        training_step(network, images())
        seen.append(outputs)
    assert len(seen[0]) == len(seen[1]) == 1
    torch.testing.assert_close(seen[1][0], seen[0][0])


def hook_a_norm(network):
    network.features.denseblock1.denselayer2.norm1.register_forward_hook(lambda _m, _i, output: output * 2)


def prehook_a_layer(network):
    network.features.denseblock1.denselayer2.register_forward_pre_hook(lambda _m, i: ([f * 2 for f in i[0]],))


def another_activation(network):
    network.features.denseblock1.denselayer2.relu1 = nn.GELU()


def another_norm(network):
    layer = network.features.denseblock1.denselayer2
    layer.norm1 = nn.GroupNorm(1, layer.norm1.num_features).double()


@every_keep
@pytest.mark.parametrize("change", [hook_a_norm, prehook_a_layer, another_activation, another_norm])
@pytest.mark.filterwarnings("ignore:hooks on the norm")
def test_changes_inside_a_block_take_effect_with_a_warning(keep, change):
    ordinary, efficient = pair(BOTTLENECK, keep, change=change)
    with pytest.warns(UserWarning, match="does not run on the shared buffer but layer by layer"):
        assert_same_steps(ordinary, efficient, images(), steps=1)


@pytest.mark.filterwarnings("error")
def test_parametrizations_take_effect_on_the_buffer():
    def change(network):
        torch.manual_seed(3)
        conv = network.features.denseblock1.denselayer2.conv1
        nn.utils.parametrizations.weight_norm(conv)
        nn.init.uniform_(conv.parametrizations.weight.original0, 1, 2)

    assert_same_steps(*pair(BOTTLENECK, change=change), images(), steps=1)


def alive_after_forward(network, x):
    """Exact bytes that a forward pass leaves alive, its output included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = network(x)
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]"), output


@pytest.mark.parametrize(("keep", "middles", "features"), [("bottleneck", 1, 1), ("features", 0, 1), ("inputs", 0, 0)])
@pytest.mark.parametrize("layers", [3, 6])
def test_bytes_kept_by_a_block_and_its_transition(keep, middles, features, layers):
    """X, the bottleneck outputs, and the statistics: linear in depth, and nothing else."""
    init, growth, width, pixels = 24, 8, 32, 2 * 16 * 16
    network = DenseNet(3, init, growth, (layers, 1), 0.5, bn_size=4, efficient=True, keep=keep)
    block, transition = network.features.denseblock1, network.features.transition1
    x = torch.randn(2, init, 16, 16, requires_grad=True)
    alive, output = alive_after_forward(lambda x: block(x, transition), x)
    channels = init + layers * growth
    kept = pixels * (features * channels + middles * layers * width)
    statistics = 2 * channels + 1 + 2 * layers * width
    assert alive == 4 * (kept + statistics + output.numel())


@pytest.mark.parametrize("keep", KEEP)
def test_memory_is_linear_in_depth(keep):
    alive = []
    for depth in (22, 40, 58):
        network = densenet_cifar(depth, 8, efficient=True, keep=keep)
        alive.append(alive_after_forward(network, torch.randn(2, 3, 32, 32))[0])
    growth = [b - a for a, b in pairwise(alive)]
    assert abs(growth[1] - growth[0]) <= 0.01 * growth[0]


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


def test_copies_and_pickles():
    _, network = pair(BOTTLENECK)
    expected = training_step(copy.deepcopy(network), images())
    assert_close(training_step(pickle.loads(pickle.dumps(network)), images()), expected)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other = DenseNet(**BOTTLENECK, efficient="recompute").double()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_close(training_step(other, images()), expected)


@pytest.mark.parametrize("arguments", [BOTTLENECK, IMAGENET], ids=["bottleneck", "imagenet stem"])
def test_compiles_without_graph_breaks(arguments):
    ordinary, efficient = pair(arguments)
    compiled = torch.compile(efficient, backend="aot_eager", fullgraph=True)
    actual = {k.replace("_orig_mod.", ""): v for k, v in training_step(compiled, images()).items()}
    assert_close(actual, training_step(ordinary, images()))


def test_exporters_get_the_ordinary_operations():
    ordinary, efficient = pair(IMAGENET, training=False)
    x = images()
    expected = ordinary(x)
    exported = torch.export.export(efficient, (x,)).module()
    traced = torch.jit.trace(efficient, x)
    for module in (exported, traced):
        torch.testing.assert_close(module(x), expected)
    assert "efficient_densenet::" not in str(traced.inlined_graph)
    assert "efficient_densenet." not in str(exported.graph)
