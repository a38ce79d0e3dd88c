"""The shared buffer computes what the ordinary network does, in every mode."""

from __future__ import annotations

import copy
import io
import pickle
import statistics
from contextlib import nullcontext

import pytest
import torch
from comparison import assert_close, buffers, training_step, weighted_sum
from torch import nn
from twins import (
    BOTTLENECK,
    IMAGENET,
    NETWORKS,
    PLAIN,
    frozen_convolutions,
    frozen_first_block,
    frozen_norms,
    images,
    momentum_none,
    norms,
    pair,
    without_affine,
    without_running_statistics,
)

from efficient_densenet import DenseNet, EfficiencyWarning, ops
from efficient_densenet.execution import KEEP
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.kinks import move_zeros_into_gaps

every_network = pytest.mark.parametrize("arguments", NETWORKS.values(), ids=NETWORKS.keys())
every_keep = pytest.mark.parametrize("keep", KEEP)


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


def every_other_norm_frozen(network):
    for norm in norms(network)[::2]:
        norm.eval()


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


def output_error(actual, expected):
    return (actual["output"].double() - expected["output"]).norm().item()


@every_network
@every_keep
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_errors_are_like_the_ordinary_networks(arguments, keep, mode):
    """Against float64: no more than twice the ordinary network's error for the whole gradient."""
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    x = images(8, 24, 24)
    reference, _ = pair(arguments, keep)
    move_zeros_into_gaps(reference, x, Place("cpu"))
    state = copy.deepcopy(reference.state_dict())
    expected = training_step(reference, x)
    errors = []
    for network in pair(arguments, keep, dtype=dtype):
        network.load_state_dict(state)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            errors.append(relative_error(training_step(network, x.to(dtype)), expected))
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("backend", [nullcontext, ops.plain_pytorch], ids=["this processor's", "plain PyTorch"])
def test_errors_of_few_values_in_bfloat16_are_like_the_ordinary_networks(backend):
    """Against float64: on average over networks, outputs and gradients are no further from it than the ordinary ones.

    Of a handful of values per channel a batch norm leaves little, and all of that is rounded: single networks differ
    by several times, in either direction.
    """
    ratios, networks = [], [network.features[1:3].bfloat16() for network in pair(BOTTLENECK)]
    for n, height, width in 8 * [(2, 2, 2), (1, 2, 4), (8, 2, 2), (3, 4, 2)]:
        x = torch.randn(n, 6, height, width, dtype=torch.bfloat16)
        for p, same in zip(*(network.parameters() for network in networks), strict=True):
            same.data.copy_(nn.init.normal_(p))
        expected = training_step(copy.deepcopy(networks[0]).double(), x.double())
        with backend():
            steps = [training_step(network, x, lambda output: weighted_sum(output.double())) for network in networks]
        ordinary, ours = ([relative_error(step, expected), output_error(step, expected)] for step in steps)
        ratios += [b / a for a, b in zip(ordinary, ours, strict=True)]
    assert statistics.geometric_mean(ratios) <= 1


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
        with pytest.raises(RuntimeError, match=r"call make_efficient\(model, way='recompute'\)"):
            gradient.square().sum().backward()


def test_gradients_of_gradients_of_weights_alone_are_refused_under_autocast():
    _, network = pair(IMAGENET, dtype=torch.float32, training=False)
    weights = []
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("denseblock" in name and "conv" in name)
        weights += [parameter] if parameter.requires_grad else []
    with torch.autocast("cpu", torch.bfloat16):
        output = network(images(dtype=torch.float32))
    gradients = torch.autograd.grad(output.float().sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match=r"call make_efficient\(model, way='recompute'\)"):
        sum(gradient.square().sum() for gradient in gradients).backward()


def test_one_value_per_channel_is_refused():
    _, network = pair(PLAIN)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network.features.denseblock1(torch.randn(1, 6, 1, 1, dtype=torch.float64))


def test_a_blocks_output_owns_its_memory_and_may_be_changed():
    _, efficient = pair(BOTTLENECK)
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64, requires_grad=True)
    first, second = efficient.features.denseblock1(x), efficient.features.denseblock1(x)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    results = []
    for network in pair(BOTTLENECK):
        block = network.features.denseblock1
        results.append(training_step(block, x, lambda output: weighted_sum(output.add_(1))))
    assert_close(results[1], results[0])


@pytest.mark.parametrize(
    "where", [f"features.{part}" for part in ("denseblock1", "transition1", "norm0", "conv0", "norm3")]
)
@pytest.mark.filterwarnings("ignore:BatchNorm2d recomputes")
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
def test_changes_inside_a_block_take_effect_with_a_warning(keep, change):
    ordinary, efficient = pair(BOTTLENECK, keep, change=change)
    with pytest.warns(EfficiencyWarning, match="DenseBlock recomputes and does not use the shared buffer"):
        assert_same_steps(ordinary, efficient, images(), steps=1)


@pytest.mark.filterwarnings("error")
def test_parametrizations_take_effect_on_the_buffer():
    def change(network):
        torch.manual_seed(3)
        conv = network.features.denseblock1.denselayer2.conv1
        nn.utils.parametrizations.weight_norm(conv)
        nn.init.uniform_(conv.parametrizations.weight.original0, 1, 2)

    assert_same_steps(*pair(BOTTLENECK, change=change), images(), steps=1)


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
