"""A call keeps what it found for the next one: what changes after that takes effect, and nothing stays alive."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from twins import BOTTLENECK, IMAGENET, images, norms, pair

from efficient_densenet.adopt.adopted import adoptions
from efficient_densenet.execution import shared


def evaluate(network, x=None):
    with torch.no_grad():
        return network(images(dtype=torch.float32) if x is None else x)


def assert_same(efficient, ordinary, x=None):
    torch.testing.assert_close(evaluate(efficient, x), evaluate(ordinary, x), rtol=1e-4, atol=1e-4)


@pytest.fixture
def networks():
    ordinary, efficient = pair(IMAGENET, training=False, dtype=torch.float32)
    for _ in range(2):
        assert_same(efficient, ordinary)
    return ordinary, efficient


def one_weight(network):
    return network.features.denseblock1.denselayer2.conv2.weight


def a_norm(network):
    return network.features.denseblock1.denselayer2.norm1


def other_weights(network):
    torch.manual_seed(5)
    return {name: t * (0.5 + torch.rand(())) for name, t in network.state_dict().items()}


def in_place(network):
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.mul_(2)


def through_data(network):
    for parameter in network.parameters():
        parameter.data.mul_(0.5)


def data_swapped(network):
    for parameter in network.parameters():
        parameter.data = 2 * parameter.data


def data_of_another_layout(network):
    weight = one_weight(network)
    weight.data = (2 * weight.data).to(memory_format=torch.channels_last)


def through_numpy(network):
    one_weight(network).detach().numpy()[:] *= 3


def set_to_other_memory(network):
    weight = one_weight(network)
    with torch.no_grad():
        weight.set_(weight * 2)


def other_parameter(network):
    conv = network.features.denseblock1.denselayer2.conv2
    conv.weight = nn.Parameter(2 * conv.weight.detach())


def other_module(network):
    torch.manual_seed(2)
    old = a_norm(network)
    new = nn.BatchNorm2d(old.num_features).eval()
    nn.init.uniform_(new.weight)
    network.features.denseblock1.denselayer2.norm1 = new


def trained(network):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network.train()
    network(images(dtype=torch.float32)).square().mean().backward()
    optimizer.step()
    network.eval()


def other_eps(network):
    for norm in norms(network):
        norm.eps = 0.5


def statistics_of_the_batch(network):
    for norm in norms(network):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None


def one_norm_in_training(network):
    a_norm(network).train()


def hooked(network):
    a_norm(network).register_forward_hook(lambda module, given, made: 2 * made)


def parametrized(network):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(network.features.denseblock1.denselayer2.conv2, "weight", Twice())


CHANGES = [
    *(in_place, through_data, data_swapped, data_of_another_layout, through_numpy, set_to_other_memory),
    *(other_parameter, other_module, trained, other_eps, statistics_of_the_batch, one_norm_in_training),
    lambda network: network.load_state_dict(other_weights(network)),
    lambda network: network.load_state_dict(other_weights(network), assign=True),
    pytest.param(hooked, marks=pytest.mark.filterwarnings("ignore:.*there are hooks")),
    parametrized,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_evaluations_takes_effect(change, networks):
    ordinary, efficient = networks
    before = evaluate(ordinary)
    for network in networks:
        change(network)
    assert not torch.allclose(evaluate(copy.deepcopy(ordinary)), before, rtol=1e-3)
    for _ in range(2):
        assert_same(efficient, ordinary)


def test_what_is_evaluated_may_be_of_another_size_or_type(networks):
    ordinary, efficient = networks
    for x in (images(2, 31, 26), images(1, 40, 40), images()[:, :, ::2]):
        assert_same(efficient, ordinary, x.float())
    for network in networks:
        network.double()
    assert_same(efficient, ordinary, images())
    efficient.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert evaluate(efficient, images().float()).dtype == torch.bfloat16


def test_gradients_after_an_evaluation_without_them(networks):
    found = []
    for network in networks:
        network(images(dtype=torch.float32)).square().sum().backward()
        found.append(one_weight(network).grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_modules_are_read_once_for_many_evaluations(networks, monkeypatch):
    read = []
    monkeypatch.setattr(shared, "read", lambda *a, run=shared.read: (read.append(a), run(*a))[1])
    _, efficient = networks
    evaluate(efficient)
    assert not read
    a_norm(efficient).weight = nn.Parameter(a_norm(efficient).weight.detach())
    evaluate(efficient)
    assert len(read) == 1
    evaluate(efficient)
    assert len(read) == 1


def other_momentum(network):
    a_norm(network).momentum = 0.7


def cumulative_averages(network):
    for norm in norms(network):
        norm.momentum = None


def frozen_averages(network):
    a_norm(network).eval()


def frozen_weight(network):
    one_weight(network).requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    [
        None,
        other_momentum,
        cumulative_averages,
        frozen_averages,
        frozen_weight,
        other_eps,
        other_parameter,
        data_swapped,
    ],
)
def test_training_steps_read_modules_again_where_something_changed(change, monkeypatch):
    read = []
    monkeypatch.setattr(shared, "read", lambda *a, run=shared.read: (read.append(a), run(*a))[1])
    networks = pair(IMAGENET)
    found = []
    for network in networks:
        for step in range(6):
            if step == 3 and change is not None:
                change(network)
            if step == 4:
                read.clear()
            for parameter in network.parameters():
                parameter.grad = None
            network(images()).square().sum().backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found.append({**gradients, **dict(network.named_buffers())})
    assert not read  # since the step after the change
    torch.testing.assert_close(found[1], found[0])


def test_gradients_of_norms_do_not_depend_on_each_other():
    """They lie in one tensor."""
    _, efficient = pair(IMAGENET, dtype=torch.float32)
    weights = [p for norm in norms(efficient.features.denseblock1) for p in (norm.weight, norm.bias)]
    first, second, *_ = torch.autograd.grad(efficient(images(dtype=torch.float32)).sum(), weights)
    scale = torch.ones_like(second, requires_grad=True)
    loss = (scale * second).sum()
    first.add_(weights[0], alpha=1e-4)
    first.detach_().zero_()
    loss.backward()  # which would notice that `second` was changed in place
    assert torch.equal(scale.grad, second) and second.any()


def test_nothing_is_kept_alive():
    _, efficient = pair(IMAGENET, training=False, dtype=torch.float32)
    evaluate(efficient)
    assert any(adoption.last for adoption in adoptions(efficient))
    parts = (efficient, efficient.features, efficient.features.denseblock1, a_norm(efficient), one_weight(efficient))
    alive = [weakref.ref(part) for part in parts]
    gc.collect()
    gc.disable()
    try:
        del parts, efficient
        assert [ref() for ref in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_threads_that_evaluate_one_network():
    _, efficient = pair(BOTTLENECK, training=False, dtype=torch.float32)
    batches = [images(n, 14, 14, dtype=torch.float32) for n in (1, 2, 3)]
    expected = [evaluate(efficient, x) for x in batches]
    wrong = []

    def run(x, result):
        wrong.extend(1 for _ in range(10) if not torch.equal(evaluate(efficient, x), result))

    threads = [threading.Thread(target=run, args=both) for both in zip(batches, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
