"""Models of the real libraries compute the same after `make_efficient`, and keep to their structure."""

from __future__ import annotations

import functools

import monai.networks.nets
import pytest
import timm
import torch
import torchvision
import torchxrayvision
from comparison import assert_identical
from others import (
    assert_trains_alike,
    images,
    monai_small,
    pair,
    randomised,
    three_steps,
    timm_small,
    torchvision_small,
    unet,
    xray_small,
)
from timm.layers import BlurPool2d

from efficient_densenet import make_efficient, report, restore
from efficient_densenet.execution import KEEP

every_keep = pytest.mark.parametrize("keep", KEEP)

SMALL = {
    "torchvision": torchvision_small,
    "torchvision, checkpointed": lambda: torchvision_small(memory_efficient=True),
    "torchvision, dropout": lambda: torchvision_small(drop_rate=0.3),
    "timm": timm_small,
    "timm, checkpointed": lambda: timm_small(memory_efficient=True),
    "timm, dropout": lambda: timm_small(proj_drop_rate=0.3, drop_rate=0.2),
    "timm, deep stem": lambda: timm_small(stem_type="deep"),
    "timm, tiered stem": lambda: timm_small(stem_type="deep_tiered"),
    "timm, features": lambda: timm_small(features_only=True),
    "MONAI 2D": monai_small,
    "MONAI 2D, dropout": lambda: monai_small(dropout_prob=0.3),
    "torchxrayvision": xray_small,
    "torchxrayvision, dropout": lambda: xray_small(drop_rate=0.3),
}


def on_the_buffer(model):
    return {e.name for e in report(model).adopted if e.now == "shared buffer" and not e.reason}


@every_keep
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("error")
def test_small_models_train_as_the_ordinary_ones(name, keep, monkeypatch):
    monkeypatch.setattr(torchxrayvision.utils, "fix_resolution", lambda x, *_: x)
    ordinary, efficient = pair(SMALL[name](), keep)
    assert len(on_the_buffer(efficient)) == 3  # two blocks and a transition
    assert_trains_alike(ordinary, efficient, images())


@every_keep
@pytest.mark.parametrize(("dims", "size"), [(1, (41,)), (3, (18, 17, 19))])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.filterwarnings("error")
def test_monai_in_one_and_three_dimensions(dims, size, dropout, keep):
    ordinary, efficient = pair(monai_small(dims, dropout_prob=dropout), keep)
    assert_trains_alike(ordinary, efficient, images(*size))


BIG = {
    "torchvision": torchvision.models.densenet121,
    "timm": lambda: timm.create_model("densenet121"),
    "timm, features": lambda: timm.create_model("densenet121", features_only=True),
    "timm 264, deep stem": lambda: timm.create_model("densenet264d", growth_rate=8),
    "MONAI": lambda: monai.networks.nets.DenseNet121(spatial_dims=2, in_channels=3, out_channels=7, dropout_prob=0.2),
    "segmentation_models_pytorch": unet,
}


@pytest.mark.parametrize("name", BIG)
@pytest.mark.filterwarnings("error")
def test_published_models_train_as_the_ordinary_ones(name):
    ordinary, efficient = pair(BIG[name](), "features")
    assert len(on_the_buffer(efficient)) == 7
    assert_trains_alike(ordinary, efficient, images(64, 64))


def test_torchxrayvision_at_the_size_it_wants():
    model = torchxrayvision.models.DenseNet(block_config=(2, 2, 2, 2), weights=None)
    ordinary, efficient = pair(model, "features")
    with torch.no_grad():
        torch.testing.assert_close(
            efficient(images(224, 224, n=1)[:, :1]), ordinary(images(224, 224, n=1)[:, :1]), rtol=1e-10, atol=1e-10
        )


@every_keep
@pytest.mark.parametrize("blur", ["reflect", "constant"])
@pytest.mark.parametrize("stem", ["", "deep"])
@pytest.mark.filterwarnings("error")
def test_blurred_stems_go_by_pieces_too(stem, blur, keep):
    ordinary, efficient = pair(timm_small(stem_type=stem, aa_layer=functools.partial(BlurPool2d, pad_mode=blur)), keep)
    assert_trains_alike(ordinary, efficient, images())
    assert [e.reason for e in report(efficient).adopted] == [""] * 4


def test_a_stem_with_another_pool_keeps_more_and_the_report_says_so():
    model = torchvision_small()
    model.features.pool0 = torch.nn.AvgPool2d(3, 2, 1)
    ordinary, efficient = pair(model, "features")
    assert_trains_alike(ordinary, efficient, images())
    assert "the stem keeps more: it does not end with the max pool of a DenseNet's stem" in str(report(efficient))


RECOMPUTED = {
    "timm, SiLU": lambda: timm_small(act_layer="silu"),
    "timm, leaky ReLU": lambda: timm_small(act_layer="leaky_relu"),
    "timm, group norm": lambda: timm_small(norm_layer="groupnorm1"),
    "MONAI, PReLU": lambda: monai_small(act="prelu"),
    "MONAI, leaky ReLU": lambda: monai_small(act=("leakyrelu", {"negative_slope": 0.1, "inplace": True})),
    "MONAI, instance norm": lambda: monai_small(norm="instance"),
    "MONAI, group norm": lambda: monai_small(norm=("group", {"num_groups": 1})),
    "MONAI 3D, dropout": lambda: monai_small(3, act="prelu", dropout_prob=0.3),
}


@pytest.mark.parametrize("name", RECOMPUTED)
@pytest.mark.filterwarnings("error")
def test_other_norms_and_activations_recompute(name):
    ordinary, efficient = pair(RECOMPUTED[name](), "features")
    size = (18, 17, 19) if "3D" in name else (33, 35)
    assert {e.now for e in report(efficient).adopted} == {"recompute", "joins stem and transitions"}
    assert_trains_alike(ordinary, efficient, images(*size))


def test_norms_that_are_none_of_pytorchs_recompute():
    """This one computes in single precision, whatever the model does, in an order that depends on the layout."""
    ordinary, efficient = pair(timm_small(norm_layer="evonormb0"))
    assert {e.now for e in report(efficient).adopted} == {"recompute", "joins stem and transitions"}
    torch.testing.assert_close(efficient(images()), ordinary(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["torchvision, checkpointed", "timm, dropout", "MONAI 2D"])
def test_restored_models_are_the_original_ones_bit_for_bit(name):
    model = randomised(SMALL[name]())
    classes = [type(module) for module in model.modules()]
    expected = three_steps(pair(model)[0].train(), images()) if "checkpointed" not in name else None
    restored = restore(make_efficient(model))
    assert restored is model and [type(module) for module in model.modules()] == classes
    assert not any("adoption" in vars(module) for module in model.modules())
    if expected is not None:
        assert_identical(three_steps(restored, images()), expected)
