"""Whatever a user changes inside a network takes effect on the shared buffer as it does in the ordinary network."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from comparison import assert_close, training_step
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from twins import BOTTLENECK, IMAGENET, PLAIN, images, pair

from efficient_densenet import EfficiencyWarning
from efficient_densenet.models import DenseBlock, DenseLayer, DenseNet, Transition
from efficient_densenet.ops import cpu, eager

RECOMPUTES = "recomputes and does not use the shared buffer"


class OtherLayer(nn.Module):
    """Makes `growth_rate` channels of the features, and is no dense layer."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(conv.in_channels, 5, 1)

    def forward(self, features):
        return self.conv(torch.cat(features, 1)).tanh()


class ScaledLayer(DenseLayer):
    def forward(self, features):
        return super().forward(features) * 3


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), padding=self.padding)


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class ScaledTransition(Transition):
    def forward(self, x):
        return super().forward(x) * 2


class ScaledBlock(DenseBlock):
    def forward(self, x):  # knows of no transition
        return super().forward(x) * 2


def layer(network):
    return network.features.denseblock1.denselayer2


def another_class_of_layer(network):
    network.features.denseblock1.denselayer2 = OtherLayer(layer(network).conv1).double()


def a_layer_with_its_own_forward(network):
    layer(network).__class__ = ScaledLayer


def a_layer_whose_forward_is_patched(network):
    one = layer(network)
    one.forward = types.MethodType(lambda self, features: DenseLayer.forward(self, features) * 2, one)


def a_convolution_with_its_own_forward(network):
    layer(network).conv1.__class__ = StandardisedConv


def a_norm_with_its_own_forward(network):
    layer(network).norm1.__class__ = ScaledNorm


def a_convolution_with_a_bias(network):
    old = layer(network).conv1
    layer(network).conv1 = nn.Conv2d(old.in_channels, old.out_channels, 1).double()


def layers_of_two_forms(network):
    network.features.denseblock1.denselayer2 = DenseLayer(11, 5, None).double()


def another_dropout_in_one_layer(network):
    layer(network).drop_rate = 0.5


def a_backward_hook(network):
    layer(network).conv1.register_full_backward_hook(lambda _module, grads, _out: (grads[0] * 2,))


def pruned(network):
    prune.l1_unstructured(layer(network).conv1, "weight", 0.5)


def max_pool_in_the_transition(network):
    network.features.transition1.pool = nn.MaxPool2d(2)


@pytest.mark.parametrize("keep", ["bottleneck", "inputs"])
@pytest.mark.parametrize(
    "change",
    [
        another_class_of_layer,
        a_layer_with_its_own_forward,
        a_layer_whose_forward_is_patched,
        a_convolution_with_its_own_forward,
        a_norm_with_its_own_forward,
        layers_of_two_forms,
        a_backward_hook,
        pruned,
    ],
)
def test_replaced_parts_take_effect_with_one_warning(change, keep):
    ordinary, efficient = pair(BOTTLENECK, keep, change=change)
    results = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for network in (efficient, ordinary):
            torch.manual_seed(2)  # dropout
            results.append(training_step(network, images()))
    assert_close(*results)
    assert [RECOMPUTES in str(warning.message) for warning in caught] == [True]


def a_transition_with_its_own_forward(network):
    network.features.transition1.__class__ = ScaledTransition


def a_block_with_its_own_forward(network):
    network.features.denseblock1.__class__ = ScaledBlock


def another_module_between(network):
    children = list(network.features.named_children())
    for name, _ in children[2:]:
        delattr(network.features, name)
    network.features.add_module("between", nn.Softplus())
    for name, module in children[2:]:
        network.features.add_module(name, module)


def weights_of_a_norm(network):
    parametrizations.weight_norm(layer(network).conv1)
    parametrizations.spectral_norm(layer(network).conv2)


@pytest.mark.parametrize("keep", ["bottleneck", "inputs"])
@pytest.mark.parametrize(
    "change",
    [
        *(a_transition_with_its_own_forward, a_block_with_its_own_forward, another_module_between, weights_of_a_norm),
        *(a_convolution_with_a_bias, max_pool_in_the_transition, another_dropout_in_one_layer),
    ],
)
@pytest.mark.filterwarnings("error")
def test_changes_around_a_block_and_what_its_buffer_can_do_need_no_warning(change, keep):
    """The blocks stay on their buffers; spectral normalisation moves its vectors once per step."""
    ordinary, efficient = pair(BOTTLENECK, keep, change=change)
    for step in range(2):
        results = []
        for network in (efficient, ordinary):
            torch.manual_seed(step)  # dropout
            results.append(training_step(network, images()))
        assert_close(*results)


def other_stem_pool(network):
    network.features.pool0 = nn.MaxPool2d(3, 2, 1, ceil_mode=True)


def other_stem_activation(network):
    network.features.relu0 = nn.SiLU()


def a_hook_on_the_stem_pool(network):
    network.features.pool0.register_forward_hook(lambda _module, _inputs, output: output * 2)


@pytest.mark.parametrize("change", [other_stem_pool, other_stem_activation, a_hook_on_the_stem_pool])
@pytest.mark.parametrize("size", [(19, 22), (24, 21)], ids=str)
def test_replaced_parts_of_the_stem_take_effect(change, size):
    ordinary, efficient = pair(IMAGENET, change=change)
    with pytest.warns(EfficiencyWarning, match="the stem recomputes and does not use the shared buffer"):
        actual = training_step(efficient, images(3, *size))
    assert_close(actual, training_step(ordinary, images(3, *size)))


def other_head_norm(network):
    network.features.norm3 = nn.GroupNorm(1, network.num_features).to(torch.float64)


def a_module_behind_the_head_norm(network):
    network.features.add_module("behind", nn.Tanh())


def no_head_norm(network):
    del network.features.norm3


def a_hook_on_the_head_norm(network):
    network.features.norm3.register_forward_hook(lambda _module, _inputs, output: output * 2)


def a_hook_on_the_last_block(network):
    network.features.denseblock2.register_forward_hook(lambda _module, _inputs, output: output * 2)


class Squared(DenseNet):
    def forward_features(self, x):
        return super().forward_features(x).square()


class Doubled(DenseNet):
    def forward_head(self, x, pre_logits=False):
        return 2 * super().forward_head(x, pre_logits)


def other_features(network):
    network.__class__ = Squared


def other_head(network):
    network.__class__ = Doubled


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def wrapped_features(network):
    network.features = Wrapped(network.features)


def features_of_this_network(network):
    network.forward_features = lambda x: type(network).forward_features(network, x).square()


def head_of_this_network(network):
    network.forward_head = lambda x: 2 * type(network).forward_head(network, x)


class SquashedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).sigmoid()


def a_norm_with_its_own_forward(network):
    network.features.norm3.__class__ = SquashedNorm


@pytest.mark.parametrize(
    "change",
    [
        *(other_head_norm, a_module_behind_the_head_norm, no_head_norm, a_hook_on_the_head_norm),
        *(a_hook_on_the_last_block, other_features, other_head, features_of_this_network, head_of_this_network),
        *(a_norm_with_its_own_forward, wrapped_features),
    ],
)
@pytest.mark.filterwarnings("error")
def test_changes_of_the_head_take_effect(change, monkeypatch):
    """Its parts then run one by one, which needs no warning: the block is on its buffer all the same."""
    ordinary, efficient = pair(BOTTLENECK, change=change)
    monkeypatch.setattr(cpu, "norm_relu_mean", None)
    monkeypatch.setattr(eager, "norm_relu_mean", None)
    assert_close(training_step(efficient, images()), training_step(ordinary, images()))


def a_synchronised_head_norm(network):
    network.features.norm3 = nn.SyncBatchNorm.convert_sync_batchnorm(network.features.norm3)


@pytest.mark.filterwarnings("error")
def test_a_head_that_does_not_fit_leaves_the_block_on_its_buffer():
    """A synchronised norm behind others, as which it runs where there is but one process."""
    ordinary, efficient = pair(BOTTLENECK, change=a_synchronised_head_norm)
    assert_close(training_step(efficient, images()), training_step(ordinary, images()))


def one_norm_for_all_layers(network):
    first = network.features.denseblock1.denselayer1.norm2
    for layer in network.features.denseblock1.children():
        layer.norm2 = first


def one_cumulative_norm_for_all_layers(network):
    one_norm_for_all_layers(network)
    network.features.denseblock1.denselayer1.norm2.momentum = None


@pytest.mark.parametrize("change", [one_norm_for_all_layers, one_cumulative_norm_for_all_layers])
def test_a_norm_in_several_places_moves_once_for_each(change):
    ordinary, efficient = pair(BOTTLENECK, change=change)
    for _ in range(2):
        assert_close(training_step(efficient, images()), training_step(ordinary, images()))
    compiled = torch.compile(efficient, backend="aot_eager", fullgraph=True)
    found = {k.replace("_orig_mod.", ""): v for k, v in training_step(compiled, images()).items()}
    assert_close(found, training_step(ordinary, images()))


@pytest.mark.parametrize("where", ["features.denseblock1", "features.transition1", "features.norm3", "features"])
@pytest.mark.parametrize("arguments", [PLAIN, IMAGENET], ids=["plain", "imagenet stem"])
@pytest.mark.filterwarnings("error")
def test_hooks_of_every_kind_on_whole_parts_see_what_they_should(where, arguments):
    results = []
    for network in pair(arguments):
        seen = {}

        def note(name, tensors, seen=seen):
            assert name not in seen
            seen[name] = tensors[0].detach().clone()

        part = network.get_submodule(where)
        part.register_forward_pre_hook(lambda _m, inputs, note=note: note("input", inputs))
        part.register_forward_hook(lambda _m, _i, output, note=note: note("output", [output]))
        part.register_full_backward_pre_hook(lambda _m, grads, note=note: note("gradient of output", grads))
        part.register_full_backward_hook(lambda _m, grads, _o, note=note: note("gradient of input", grads))
        results.append(training_step(network, images()) | {f"seen {name}": t for name, t in seen.items()})
    assert len([name for name in results[0] if name.startswith("seen")]) == 4
    assert_close(results[1], results[0])
