"""Layers that the native code runs in one call give what they give one by one, and leave to PyTorch what it must do."""

from __future__ import annotations

import pytest
import torch
from comparison import gradients, training_step
from look_alikes import bottleneck_parts
from operands import CONVOLVING
from torch import nn
from twins import BOTTLENECK, PLAIN, efficient_network

from efficient_densenet import DenseNet, dense_block, ops
from efficient_densenet.execution import KEEP
from efficient_densenet.ops import cpu
from efficient_densenet.ops.cpu import library
from efficient_densenet.ops.layers import LayersBackward

pytestmark = [
    pytest.mark.skipif(not CONVOLVING, reason="this processor has no kernels for whole convolutions"),
    pytest.mark.usefixtures("own_convolutions"),
]
every_kind = pytest.mark.parametrize("arguments", [PLAIN, BOTTLENECK], ids=["plain", "bottleneck"])


def network(arguments, keep, dtype=torch.float32):
    return efficient_network(arguments, keep).to(dtype)


def images(dtype=torch.float32):
    return torch.randn(3, 3, 16, 18, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture
def done(monkeypatch):
    """How many of how many layers each call has run."""
    counts = []

    def counted(run):
        def counting(layers, *rest):
            start = rest[0].start if isinstance(rest[0], LayersBackward) else 0
            counts.append((run(layers, *rest), len(layers.readers) // layers.per_layer - start))
            return counts[-1][0]

        return counting

    for name in ("run_layers", "run_layers_backward"):
        monkeypatch.setattr(cpu, name, counted(getattr(cpu, name)))
    return counts


def one_by_one(monkeypatch):
    monkeypatch.setattr(ops, "runs_layers", lambda x, readers, memo: False)


def same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        f = found[name]
        assert torch.equal(f.isfinite(), e.isfinite()), name
        error = (f - e).nan_to_num(0, 0, 0).abs().max()
        assert error <= tolerance * e.nan_to_num(0, 0, 0).abs().max(), name


def frozen_norms(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def every_second_norm_frozen(net):
    for module in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)][::2]:
        module.eval()


def without_gradients(net):
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("conv1" not in name and "denselayer2" not in name)


def channels_last(net):
    net.to(memory_format=torch.channels_last)


@every_kind
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [nn.Module.train, nn.Module.eval, frozen_norms, every_second_norm_frozen, without_gradients, channels_last],
)
def test_results_are_those_of_one_layer_after_the_other(monkeypatch, done, arguments, keep, dtype, change):
    if dtype not in library.load().convolves:
        pytest.skip("PyTorch runs these convolutions")
    results = []
    for _ in range(2):
        net = network(arguments, keep, dtype)
        change(net)
        results.append(training_step(net, images(dtype)))
        calls = len(done)
        one_by_one(monkeypatch)
    assert calls == len(done) > 0 and all(some == all_ for some, all_ in done)
    # The sums of a norm's gradient are the same; what is made of them is rounded once more or less.
    same(*results, 1e-5 if dtype == torch.float32 else 1e-2)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("change", [nn.Module.train, nn.Module.eval])
def test_what_backward_makes_again_has_the_bits_of_forward(arguments, dtype, change):
    """So that it does not matter to the gradients what is kept."""
    results = []
    for keep in KEEP:
        net = network(arguments | {"num_init_features": 70, "growth_rate": 20, "bn_size": 4}, keep, dtype)
        change(net)
        results.append(training_step(net, images(dtype)))
    for other in results[1:]:
        same(other, results[0], 0)


def test_bottleneck_outputs_are_freed_before_others_are_made_again(done):
    """The first layer's, which has few channels to read, is not kept: a second call makes it again."""
    torch.manual_seed(0)
    arguments = BOTTLENECK | {"num_init_features": 5, "bn_size": 4}
    training_step(DenseNet(**arguments, efficient=True), images())
    assert done == [(3, 3), (2, 2), (2, 2), (2, 2), (1, 1)]


@pytest.mark.parametrize("makes", [(8, 32), (32, 8, 32), (8, 32, 8, 32, 4)], ids=str)
def test_layers_that_make_different_numbers_of_channels(monkeypatch, done, makes):
    """Some bottleneck outputs are kept, and others between them are not."""
    torch.manual_seed(0)
    widths = [24 + sum(makes[:i]) for i in range(len(makes))]
    layers = nn.ModuleList(
        nn.Sequential(bottleneck_parts(width, made, 16)) for width, made in zip(widths, makes, strict=True)
    )
    results = []
    for _ in range(2):
        layers.zero_grad()
        x = torch.randn(2, 24, 12, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
        dense_block(x, layers, "bottleneck").cos().sum().backward()
        results.append({"input gradient": x.grad, **gradients(layers)})
        calls = len(done)
        one_by_one(monkeypatch)
    assert calls == len(done) > 2
    same(*results, 1e-5)


@pytest.mark.parametrize("level", CONVOLVING)
def test_every_level_of_instructions(monkeypatch, done, level):
    with library.held_to(level, ours=True):
        found = training_step(network(BOTTLENECK, "features"), images())
        assert done
        one_by_one(monkeypatch)
        same(found, training_step(network(BOTTLENECK, "features"), images()), 1e-5)


@every_kind
@pytest.mark.parametrize("keep", KEEP)
def test_a_layer_with_values_that_are_not_finite_is_left_to_pytorch(monkeypatch, done, arguments, keep):
    results = []
    for _ in range(2):
        net = network(arguments, keep)
        net.eval()  # or the statistics would spread it at once
        layer = net.features.denseblock1.denselayer2
        with torch.no_grad():
            layer.get_submodule("conv2" if arguments is BOTTLENECK else "conv1").weight[0, 0, 1, 1] = torch.inf
        results.append(training_step(net, images()))
        calls = len(done)
        one_by_one(monkeypatch)
    assert calls == len(done) and done[0][0] == 1 < done[0][1]
    same(*results, 1e-5)


@every_kind
def test_a_gradient_that_is_not_finite_is_left_to_pytorch(monkeypatch, done, arguments):
    def infinite(output):
        return (output * torch.tensor([torch.inf] + [1.0] * (output.shape[1] - 1))).sum()

    results = []
    for _ in range(2):
        net = network(arguments, "bottleneck").eval()
        results.append(training_step(net, images(), infinite))
        one_by_one(monkeypatch)
    assert any(some < all_ for some, all_ in done)
    same(*results, 1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_gradient_of_a_weight_whose_input_is_not_finite(memory_format):
    x, weight = torch.randn(2, 8, 9, 5), torch.randn(4, 5, 3, 3).contiguous(memory_format=memory_format)
    x[0, 3, 4, 2], x[1, 0, 0, 4], x[1, 7, 8, 0] = torch.inf, torch.inf, torch.nan
    norm = ops.protocol.Affine(*(torch.full((5,), value) for value in (0.0, 1.0, 1.0, 0.0)))
    grad = torch.randn(2, 8, 9, 4)
    found = ops.cpu.norm_relu_conv_backward(
        ops.protocol.BackwardOperands(grad, x, norm, weight, torch.zeros_like(x), False, None)
    )[0]
    expected = ops.reference.norm_relu_conv_backward(
        ops.protocol.BackwardOperands(
            grad.double(), x.double(), ops.protocol.Affine(*(v.double() for v in norm)), weight.double(),
            torch.zeros_like(x).double(), False, None,
        )
    )[0]  # fmt: skip
    assert torch.equal(found.isnan(), expected.isnan()) and found.isinf().any()
    assert torch.equal(found.nan_to_num(0, 1, -1).isfinite(), torch.ones_like(found, dtype=torch.bool))
    finite = expected.isfinite()
    assert (found - expected)[finite].abs().max() <= 1e-5 * expected[finite].abs().max()
    assert torch.equal(found[~finite].nan_to_num(0, 1, -1), expected[~finite].nan_to_num(0, 1, -1).float())
