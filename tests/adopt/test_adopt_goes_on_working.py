"""What people do with a model after, or before, it was made efficient."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import subprocess
import sys
import warnings
from collections import OrderedDict

import monai.networks.nets
import onnxruntime
import pytest
import timm.layers
import torch
from comparison import assert_close, assert_identical, training_step
from look_alikes import BareLayer, VarargsNetwork
from others import (
    assert_trains_alike,
    images,
    loss,
    monai_small,
    pair,
    randomised,
    three_steps,
    timm_small,
    torchvision_small,
    xray_small,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import replicate
from torch.nn.utils import parametrizations, prune
from torchvision.models.feature_extraction import create_feature_extractor

from efficient_densenet import make_efficient, report, restore
from efficient_densenet.errors import UserError
from efficient_densenet.execution import KEEP

every_keep = pytest.mark.parametrize("keep", KEEP)
MODELS = {"torchvision": torchvision_small, "timm": timm_small, "MONAI": monai_small}
every_model = pytest.mark.parametrize("name", MODELS)


def step(network, x=None):
    torch.manual_seed(3)
    return training_step(network, images() if x is None else x, loss)


@every_model
def test_state_dicts_load_strictly_both_ways(name):
    ordinary, efficient = pair(MODELS[name]())
    assert list(efficient.state_dict()) == list(ordinary.state_dict())
    other = randomised(MODELS[name]())
    for tensor in other.parameters():
        nn.init.normal_(tensor)
    ordinary.load_state_dict(other.state_dict(), strict=True)
    efficient.load_state_dict(other.state_dict(), strict=True)
    assert_close(step(efficient), step(ordinary))
    MODELS[name]().load_state_dict(efficient.state_dict(), strict=True)


@every_model
def test_copies_pickles_and_whole_saved_models(name):
    ordinary, efficient = pair(MODELS[name](), "features")
    file = io.BytesIO()
    torch.save(efficient, file)
    file.seek(0)
    copies = [
        copy.deepcopy(efficient),
        copy.copy(copy.deepcopy(efficient)),
        pickle.loads(pickle.dumps(efficient)),
        pickle.loads(pickle.dumps(efficient, protocol=2)),
        torch.load(file, weights_only=False),
    ]
    expected = step(ordinary)
    for other in copies:
        assert str(report(other)) == str(report(efficient))
        assert_close(step(other), expected)
        assert not any("Efficient" in type(m).__name__ for m in restore(other).modules())
    assert "Efficient" in type(efficient.features.denseblock1).__name__  # restoring a copy leaves the original


def test_a_saved_model_loads_in_a_process_that_knows_nothing_of_it(tmp_path):
    _, efficient = pair(torchvision_small(), "inputs")
    torch.save(efficient, tmp_path / "model.pt")
    torch.save(images(), tmp_path / "images.pt")
    program = (
        "import torch\n"
        "model = torch.load('model.pt', weights_only=False)\n"
        "output = model(torch.load('images.pt', weights_only=True))\n"
        "assert 'stage' in type(output.grad_fn).__name__.lower() or 'Addmm' in type(output.grad_fn).__name__\n"
        "print(type(model.features.denseblock1).__name__, model.features.denseblock1.adoption.keep)\n"
        "torch.save(output.detach(), 'output.pt')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Efficient_DenseBlock", "inputs"]
    output = torch.load(tmp_path / "output.pt", weights_only=True)
    torch.testing.assert_close(output, efficient(images()), rtol=1e-10, atol=1e-10)


@every_keep
@pytest.mark.parametrize("build", [*MODELS.values(), lambda: VarargsNetwork(BareLayer)])
@pytest.mark.filterwarnings("error")
def test_replicas_of_data_parallel(build, keep, monkeypatch):
    """As DataParallel makes them on several devices, but all on this one."""

    def copies(tensors, devices, detach=False):
        return [[t if detach else t.view_as(t) for t in tensors] for _ in devices]

    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)
    ordinary, efficient = pair(build(), keep)
    halves = images(33, 35, n=4).split(2)
    results = []
    for network in (ordinary, efficient):
        replicas = replicate(network, [0, 1])
        assert all(not list(replica.parameters()) for replica in replicas)
        outputs = [replica(half) for replica, half in zip(replicas, halves, strict=True)]
        loss(torch.cat(outputs)).backward()
        gradients = {f"gradient of {k}": p.grad for k, p in network.named_parameters()}
        results.append({"output": torch.cat(outputs).detach()} | gradients | dict(network.named_buffers()))
    assert_close(results[1], results[0])


def freeze(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval().requires_grad_(False)
    model.features.conv0.requires_grad_(False)
    model.features.denseblock1.requires_grad_(False)


@every_keep
@every_model
@pytest.mark.filterwarnings("error")
def test_freezing_and_unfreezing_after_conversion(name, keep):
    ordinary, efficient = pair(MODELS[name](), keep, change=freeze)
    assert_trains_alike(ordinary, efficient, images())
    for network in (ordinary, efficient):
        network.train().requires_grad_(True)
    assert_trains_alike(ordinary, efficient, images())
    assert_close(step(efficient.eval()), step(ordinary.eval()))


@pytest.mark.parametrize("where", ["features.denseblock1", "features.transition1"])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_hooks_on_blocks_see_what_grad_cam_needs(where, norm):
    results = []
    for network in pair(monai_small(norm=norm), "features"):
        seen = {}
        part = network.get_submodule(where)
        part.register_forward_hook(lambda _m, _i, output, seen=seen: seen.update(output=output.detach().clone()))
        part.register_full_backward_hook(
            lambda _m, grads, outs, seen=seen: seen.update(grad=outs[0].clone(), grad_input=grads[0])
        )
        results.append(step(network) | {f"seen {k}": t for k, t in seen.items() if t is not None})
    assert len([k for k in results[0] if k.startswith("seen")]) >= 2
    assert_close(results[1], results[0])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_output_of_the_last_norm_that_a_hook_keeps(training):
    """torchvision's relu behind it works in place, and overwrites what Grad-CAM keeps."""
    results = []
    for network in pair(torchvision_small(), "features"):
        kept, grads = [], []

        def keep_it(_module, _inputs, output, kept=kept, grads=grads):
            kept.append(output.detach())
            output.register_hook(grads.append)

        list(network.features)[-1].register_forward_hook(keep_it)
        results.append(step(network.train(training)) | {"map": kept[0], "gradient of map": grads[0]})
    assert results[0]["map"].min() == 0
    assert_close(results[1], results[0])


def test_gradients_of_a_retained_block_output():
    results = []
    for network in pair(torchvision_small(), "inputs"):
        kept = []

        def keep_it(_module, _inputs, output, kept=kept):
            output.retain_grad()
            kept.append(output)

        network.features.denseblock2.register_forward_hook(keep_it)
        results.append(step(network) | {"map": kept[0].detach(), "gradient of map": kept[0].grad})
    assert_close(results[1], results[0])


def test_hooks_inside_a_block_take_effect_with_one_warning():
    def change(network):
        network.features.denseblock1.denselayer2.conv1.register_forward_hook(lambda _m, _i, output: output * 2)

    ordinary, efficient = pair(torchvision_small(), change=change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = step(efficient)
    told = "_DenseBlock recomputes and does not use the shared buffer: there are hooks"
    assert [told in str(w.message) for w in caught] == [True]
    assert_close(actual, step(ordinary))


@every_keep
def test_an_activation_in_place_on_the_output_of_a_block(keep):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = torchvision_small().features.denseblock1

        def forward(self, x):
            return F.relu(self.block(x), inplace=True)

    ordinary, efficient = pair(Network(), keep)
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    assert_close(step(efficient, x), step(ordinary, x))


@every_model
def test_compiled_without_graph_breaks(name):
    torch._dynamo.reset()
    ordinary, efficient = pair(MODELS[name](), "features")
    compiled = torch.compile(efficient, backend="aot_eager", fullgraph=True)
    actual = {k.replace("_orig_mod.", ""): v for k, v in step(compiled).items()}
    assert_close(actual, step(ordinary))


@every_model
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exporters_get_the_ordinary_operations(name):
    ordinary, efficient = pair(MODELS[name](), change=nn.Module.eval)
    x = images()
    expected = ordinary(x)
    traced = torch.jit.trace(efficient, x)
    exported = torch.export.export(efficient, (x,))
    assert "efficient_densenet::" not in str(traced.inlined_graph)
    assert "efficient_densenet." not in str(exported.graph)
    for network in (traced, exported.module()):
        torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx():
    ordinary, efficient = pair(torchvision_small(), change=lambda network: network.float().eval())
    x, file = images(dtype=torch.float32), io.BytesIO()
    program = torch.onnx.export(efficient, (x,), dynamo=True, verbose=False)
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), ordinary(x), rtol=1e-4, atol=1e-4)


def test_symbolic_traces_and_extracted_features():
    ordinary, efficient = pair(torchvision_small(), change=nn.Module.eval)
    x = images()
    torch.testing.assert_close(torch.fx.symbolic_trace(efficient)(x), ordinary(x), rtol=1e-12, atol=1e-12)
    names = ["features.denseblock1", "features.norm5"] if hasattr(efficient.features, "norm5") else []
    names = names or ["features.denseblock1"]
    for name, features in create_feature_extractor(efficient, names)(x).items():
        assert name in names
        torch.testing.assert_close(features, create_feature_extractor(ordinary, names)(x)[name])


@every_model
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_needs_the_original_classes_and_says_so(name):
    ordinary, efficient = pair(MODELS[name](), change=nn.Module.eval)
    with pytest.raises(UserError, match=r"use torch.jit.trace, or script restore\(model\)"):
        torch.jit.script(efficient)
    scripted = torch.jit.script(restore(efficient))
    assert torch.equal(scripted(images()), ordinary(images()))


@every_model
def test_synchronised_norms_by_one_process(name):
    """SyncBatchNorm is a plain batch norm in evaluation, and in a process by itself."""
    convert = timm.layers.convert_sync_batchnorm if name == "timm" else nn.SyncBatchNorm.convert_sync_batchnorm
    ordinary, efficient = pair(MODELS[name](), "features")
    after = convert(copy.deepcopy(efficient))
    before = make_efficient(convert(copy.deepcopy(ordinary)), "features")
    for network in (before, after):
        assert any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
        assert report(network).adopted[0].now == "shared buffer"
        assert_trains_alike(copy.deepcopy(ordinary), network, images())


def test_pytorchs_own_converter_drops_the_activations_of_timm():
    """Nothing this library could mend: the block then computes what the converted model computes."""
    ordinary, efficient = pair(timm_small(), change=nn.Module.eval)
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    with pytest.warns(UserWarning, match="recomputes .*: there is no rectifier between a norm"):
        actual = convert(efficient)(images())
    assert not torch.allclose(actual, ordinary(images()))
    torch.testing.assert_close(actual, convert(ordinary)(images()))


def weight_norm(network):
    parametrizations.weight_norm(network.features.denseblock1.denselayer2.conv1)
    parametrizations.spectral_norm(network.features.transition1.conv)


@pytest.mark.filterwarnings("error")
def test_parametrizations_after_conversion_stay_on_the_buffer():
    ordinary, efficient = pair(torchvision_small(), change=weight_norm)
    assert_trains_alike(ordinary, efficient, images())


def test_pruning_after_conversion_takes_effect():
    def change(network):
        prune.l1_unstructured(network.features.denseblock1.denselayer2.conv1, "weight", amount=0.5)

    ordinary, efficient = pair(torchvision_small(), change=change)
    with pytest.warns(UserWarning, match="recomputes .*: there are hooks on modules inside it"):
        assert_trains_alike(ordinary, efficient, images())


def test_evaluation_without_gradients():
    for build in MODELS.values():
        ordinary, efficient = pair(build(), change=nn.Module.eval)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                torch.testing.assert_close(efficient(images()), ordinary(images()), rtol=1e-10, atol=1e-10)


def test_optimisers_made_before_go_on_with_the_same_parameters():
    model = randomised(torchvision_small())
    ordinary = copy.deepcopy(model)
    results = []
    for network, adopt in ((ordinary, lambda network: network), (model, make_efficient)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        adopt(network)
        step(network)
        optimizer.step()
        results.append(step(network))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("build", [torchvision_small, xray_small, monai_small], ids=["torchvision", "xray", "MONAI"])
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dropout_draws_the_same_masks_whatever_the_layout_of_weights(build, weights, monkeypatch):
    import torchxrayvision

    monkeypatch.setattr(torchxrayvision.utils, "fix_resolution", lambda x, *_: x)
    rate = {"dropout_prob" if build is monai_small else "drop_rate": 0.3}
    ordinary, efficient = pair(build(**rate), change=lambda network: network.to(memory_format=weights))
    x = images().contiguous(memory_format=weights)
    assert_close(three_steps(efficient, x), three_steps(ordinary, x))


def test_a_large_model_is_converted_without_a_copy_of_its_weights():
    with torch.device("meta"):
        model = monai.networks.nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=2)
    tensors = [*model.parameters(), *model.buffers()]
    after = make_efficient(model)
    assert all(a is b for a, b in zip(tensors, [*after.parameters(), *after.buffers()], strict=True))


def test_restored_models_go_on_from_where_they_were():
    ordinary, efficient = pair(torchvision_small(drop_rate=0.2))
    assert_close(step(efficient), step(ordinary))
    ordinary.load_state_dict(efficient.state_dict())
    assert_identical(step(restore(efficient)), step(ordinary))


@pytest.mark.parametrize("name", ["torchvision", "MONAI"])
def test_slices_of_sequences_are_ordinary_sequences_of_efficient_blocks(name):
    ordinary, efficient = pair(MODELS[name](), "features")
    part = efficient.features[:6]
    assert type(part) is nn.Sequential and part[4] is efficient.features.denseblock1
    assert_close(step(part), step(ordinary.features[:6]))


def test_blocks_in_a_network_of_ones_own():
    block = torchvision_small().features.denseblock1
    parts = OrderedDict(stem=nn.Conv2d(3, 6, 3), block=block, head=nn.Conv2d(14, 2, 1))
    ordinary, efficient = pair(nn.Sequential(parts), "features")
    assert_trains_alike(ordinary, efficient, images())
