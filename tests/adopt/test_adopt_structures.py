"""What is recognised by its structure, whatever its name; what is tried and left alone; and what the report says."""

from __future__ import annotations

import copy

import pytest
import timm.layers
import torch
from comparison import assert_close, assert_identical, training_step
from look_alikes import BareLayer, PlainLayer, VarargsBlock, VarargsLayer, VarargsNetwork, bottleneck_parts, transition
from others import assert_trains_alike, images, loss, monai_small, pair, randomised, timm_small, torchvision_small
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from efficient_densenet import EfficiencyWarning, make_efficient, report, restore
from efficient_densenet.adopt import decide
from efficient_densenet.adopt.look import look
from efficient_densenet.adopt.survey import networks, survey
from efficient_densenet.adopt.trial import Tensors
from efficient_densenet.errors import UserError
from efficient_densenet.execution import KEEP

every_keep = pytest.mark.parametrize("keep", KEEP)


def features_of(*parts):
    """A network of these parts between a convolution and a pool."""
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def ways(model):
    return {e.now for e in report(model).adopted} - {"joins stem and transitions"}


def plain_block(layers=3, **conv):
    return nn.Sequential(*(PlainLayer(6 + 4 * i, 4, **conv) for i in range(layers)))


LOOK_ALIKES = {
    "varargs": VarargsNetwork,
    "varargs, dropout": lambda: VarargsNetwork(drop_rate=0.3),
    "bare bottleneck": lambda: VarargsNetwork(BareLayer),
    "bare bottleneck, dropout": lambda: VarargsNetwork(BareLayer, drop_rate=0.3),
    "plain sequential": lambda: features_of(plain_block(), transition(18, 9), nn.Sequential(PlainLayer(9, 4))),
}


@every_keep
@pytest.mark.parametrize("name", LOOK_ALIKES)
@pytest.mark.filterwarnings("error")
def test_structures_of_other_repositories_train_as_before(name, keep):
    ordinary, efficient = pair(LOOK_ALIKES[name](), keep)
    assert ways(efficient) == {"shared buffer"} and len(report(efficient).adopted) == 4
    assert_trains_alike(ordinary, efficient, images(9, 11))


class Residual(VarargsLayer):
    """Another function of the same parts: the name and the structure say nothing about it."""

    def forward(self, *features):
        new = super().forward(*features)
        return new + features[0][:, : new.shape[1]]


Residual.__name__ = "_DenseLayer"


class Scaled(VarargsLayer):
    def forward(self, *features):
        return super().forward(*features) * 1.1


class ReluFirst(VarargsLayer):
    def forward(self, *features):
        x = self.conv1(self.norm1(self.relu1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class Strided(VarargsLayer):
    def __init__(self, reads, growth):
        super().__init__(reads, growth)
        self.conv2 = nn.Conv2d(8, growth, 3, padding=1, stride=2, bias=False)


class Alpha(VarargsLayer):
    def __init__(self, reads, growth):
        super().__init__(reads, growth)
        self.drop = nn.AlphaDropout(0.2)

    def forward(self, *features):
        return self.drop(super().forward(*features))


class Randomised(VarargsLayer):
    def __init__(self, reads, growth):
        super().__init__(reads, growth)
        self.relu2 = nn.RReLU()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Residual, "its forward takes a part of what a layer made"),
        (Scaled, "its forward uses mul where a dense block has nothing like it"),
        (ReluFirst, "its forward uses ReLU where a dense block has nothing like it"),
        (Alpha, "there is AlphaDropout behind the last convolution of a layer"),
        (Randomised, "RReLU is not ReLU"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_only_looks_like_a_dense_layer_recomputes_with_the_reason(layer, reason):
    model = features_of(VarargsBlock(3, 6, 4), nn.Conv2d(18, 6, 1), VarargsBlock(2, 6, 4, layer))
    planned = {e.name: (e.now, e.reason) for e in report(model).entries}
    ordinary, efficient = pair(model)
    assert {e.name: (e.now, e.reason) for e in report(efficient).entries} == planned
    assert planned["1"] == ("shared buffer", "") and planned["3"] == ("recompute", reason)
    assert_trains_alike(ordinary, efficient, images(9, 11))


def test_what_cannot_be_tried_is_left_alone_with_the_reason():
    model = features_of(VarargsBlock(3, 6, 4), nn.Conv2d(18, 6, 1), VarargsBlock(2, 6, 4, Strided))
    found = {e.name: e for e in report(make_efficient(model)).entries}
    assert type(model[3]) is VarargsBlock and type(model[1]) is not VarargsBlock
    reason = "it could not be tried: RuntimeError: Sizes of tensors must match"
    assert found["3"].now == "" and found["3"].reason.startswith(reason)
    assert reason in str(report(model))


@pytest.mark.parametrize("conv", [{"groups": 2}, {"padding_mode": "circular"}], ids=str)
@pytest.mark.filterwarnings("error")
def test_other_convolutions_recompute(conv):
    ordinary, efficient = pair(features_of(plain_block(**conv)), "features")
    found = {e.name: e for e in report(efficient).entries}
    assert found["1"].now == "recompute" and "is not a plain convolution" in found["1"].reason
    assert_trains_alike(ordinary, efficient, images(9, 11))


def freeze(model):
    """As torchvision's detectors do it."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features, child.eps).to(child.weight.dtype)
                frozen.load_state_dict(child.state_dict())
                setattr(parent, name, frozen)


@every_keep
@pytest.mark.filterwarnings("error")
def test_norms_that_are_only_a_scale_and_a_shift_are_on_the_buffer(keep):
    """Before and after the conversion, of torchvision and of timm: also the stem's and the head's."""
    model = randomised(torchvision_small())
    freeze(model)
    before = pair(model, keep)
    assert ways(before[1]) == {"shared buffer"}
    for ordinary, efficient in (
        before,
        pair(torchvision_small(), keep, change=freeze),
        pair(timm_small(), keep, change=timm.layers.freeze_batch_norm_2d),
    ):
        assert_close(training_step(efficient, images(), loss), training_step(ordinary, images(), loss))
        assert ways(efficient) == {"shared buffer"}


class ScaledNormAct(timm.layers.BatchNormAct2d):
    def forward(self, x):
        return super().forward(x) * 1.5


def test_norms_that_do_more_than_normalise_and_rectify_recompute():
    model = timm_small()
    for module in model.modules():
        if isinstance(module, timm.layers.BatchNormAct2d):
            module.__class__ = ScaledNormAct
    ordinary, efficient = pair(model, "features")
    assert ways(efficient) == {"recompute"}
    assert_trains_alike(ordinary, efficient, images())


def test_norms_with_dropout_inside_recompute():
    model = timm_small()
    for module in model.modules():
        if isinstance(module, timm.layers.BatchNormAct2d):
            module.drop = nn.Dropout(0.2)
    ordinary, efficient = pair(model)
    assert ways(efficient) == {"recompute"}
    assert_trains_alike(ordinary, efficient, images())


def test_nothing_matched_is_an_error_that_says_what_was_looked_for():
    with pytest.raises(UserError, match=r"no dense block .* layers of norm, activation and convolution") as caught:
        make_efficient(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert "close to that came" not in str(caught.value)
    with pytest.raises(UserError, match=r"close to that came:\n  the model \(VarargsBlock\): it could not be tried"):
        make_efficient(VarargsBlock(2, 6, 4, Strided))
    with pytest.raises(UserError, match="keep must be one of"):
        make_efficient(torchvision_small(), keep="everything")


def test_widths_that_do_not_add_up_are_a_near_miss():
    block = nn.Sequential(PlainLayer(6, 4), PlainLayer(11, 4))
    with pytest.raises(UserError, match="it could not be tried: RuntimeError: running_mean should contain 10 elements"):
        make_efficient(block)


def test_a_block_by_itself_and_one_inside_another_module():
    block = VarargsBlock(3, 6, 4).double()
    efficient = make_efficient(copy.deepcopy(block))
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    assert_close(training_step(efficient, x), training_step(block, x))
    holder = make_efficient(nn.ModuleDict({"inner": nn.ModuleList([copy.deepcopy(block)])}))
    assert_close(training_step(holder["inner"][0], x), training_step(block, x))


def test_the_trial_leaves_no_trace(monkeypatch):
    model = torchvision_small(drop_rate=0.3, memory_efficient=True)
    model.features.denseblock1.eval()
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append("forward"))
        module.register_forward_pre_hook(lambda *_: calls.append("before"))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: t.clone() for name, t in tensors.items()}
    modes = [module.training for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    keys, random = list(model.state_dict()), torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: calls.append("every GPU's random state"))

    assert make_efficient(model) is model
    str(report(model, image=(3, 32, 32)))

    assert calls == [] and torch.equal(random, torch.get_rng_state())
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensors[name] and torch.equal(after[name], before[name]) for name in tensors)
    assert [module.training for module in model.modules()] == modes and list(model.state_dict()) == keys
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_calling_it_again_only_changes_keep():
    model = make_efficient(torchvision_small())
    classes, text = [type(m) for m in model.modules()], str(report(model))
    make_efficient(model)
    assert [type(m) for m in model.modules()] == classes and str(report(model)) == text
    make_efficient(model, "inputs")
    assert [type(m) for m in model.modules()] == classes
    assert {e.keep for e in report(model).adopted if e.channels and "block" in e.name} == {"inputs"}
    assert not any("Efficient" in type(m).__name__ for m in restore(model).modules())
    assert restore(model) is model


def test_restored_blocks_run_the_original_forward():
    model = VarargsNetwork(drop_rate=0.3).double()
    efficient = make_efficient(copy.deepcopy(model), "inputs")
    torch.manual_seed(3)
    expected = training_step(model, images(9, 11), loss)
    torch.manual_seed(3)
    assert_identical(training_step(restore(efficient), images(9, 11), loss), expected)


def test_models_on_the_meta_device():
    with torch.device("meta"):
        model = make_efficient(torchvision_small())
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    real = torchvision_small()
    model.load_state_dict(real.state_dict(), strict=True, assign=True)
    torch.testing.assert_close(model.eval()(images(dtype=torch.float32)), real.eval()(images(dtype=torch.float32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_precision(dtype):
    torch.manual_seed(0)
    ordinary = torchvision_small().to(dtype)
    efficient = make_efficient(copy.deepcopy(ordinary))
    x = images(dtype=dtype)
    output = efficient(x)
    loss(output).backward()
    assert output.dtype == dtype and all(p.grad.dtype == dtype for p in efficient.parameters())
    tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(output, ordinary(x), rtol=tolerance, atol=tolerance)


def test_mixed_precision():
    ordinary, efficient = pair(torchvision_small())
    results = []
    for network in (ordinary.float(), efficient.float()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(network(images(dtype=torch.float32)))
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


def test_a_block_whose_parts_are_replaced_afterwards_is_tried_again():
    ordinary, efficient = pair(VarargsNetwork())
    for network in (ordinary, efficient):
        network.features.denseblock1.denselayer2.__class__ = Scaled
    with pytest.warns(EfficiencyWarning, match="VarargsBlock recomputes .*: its forward uses mul"):
        actual = training_step(efficient, images(9, 11), loss)
    assert_close(actual, training_step(ordinary, images(9, 11), loss))


def test_a_block_is_tried_once(monkeypatch):
    model = make_efficient(torchvision_small().double())
    monkeypatch.setattr(decide, "look", None)
    model(images()).sum().backward()
    assert ways(make_efficient(copy.deepcopy(model), "inputs")) == {"shared buffer"}


@pytest.mark.parametrize("build", [torchvision_small, monai_small], ids=["torchvision", "MONAI"])
def test_what_is_joined_is_what_a_record_of_both_finds(build):
    """A block with its transition, and with the head, is not looked at again once each part was."""
    model = build()
    findings = survey(model)
    joined = [f for f in findings if f.segment is not None and f.chain.made]
    assert [list(f.looks) for f in joined] == [look(f.roots, Tensors("cpu"), tried=False) for f in joined] != []
    ((network, name, looks),) = networks(model, findings)
    assert looks == look(list(network.get_submodule(name))[-2:], Tensors("cpu"), head=True, tried=False)


def test_parts_in_a_dictionary_inside_the_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(bottleneck_parts(6 + 4 * i, 4)) for i in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = torch.cat([x, layer(x)], 1)
            return x

    ordinary, efficient = pair(features_of(Block()), "features")
    assert report(efficient).adopted[0].now == "shared buffer"
    assert_trains_alike(ordinary, efficient, images(9, 11))
