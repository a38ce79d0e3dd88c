"""Random networks, sizes, types and ways to run, each beside the ordinary network in float64.

`EFFICIENT_DENSENET_EXAMPLES=1000 pytest tests/test_random_networks.py` is the long form.
"""

from __future__ import annotations

import copy
import os

import torch
from comparison import TOLERANCE, assert_close, assert_identical, training_step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from efficient_densenet import DenseNet, make_efficient
from efficient_densenet.execution import KEEP
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.kinks import move_zeros_into_gaps

EXAMPLES = int(os.environ.get("EFFICIENT_DENSENET_EXAMPLES", "24"))
LONG = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES < 100
)

architectures = st.fixed_dictionaries(
    {
        "in_channels": st.integers(1, 4),
        "num_init_features": st.integers(1, 9),
        "growth_rate": st.integers(1, 7),
        "block_config": st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
        "compression": st.sampled_from([1.0, 0.5, 0.7]),
        "bn_size": st.sampled_from([None, 1, 2, 4]),
        "input_size": st.sampled_from([32, 64]),
        "num_classes": st.integers(1, 5),
    }
)
ways = st.sampled_from([*KEEP, "recompute"])


def ordinary_network(arguments: dict, training: bool, frozen: bool, seed: int) -> nn.Module:
    """In float64, with nothing trivial in its norms."""
    torch.manual_seed(seed)
    network = DenseNet(**arguments).double().train(training)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.5, 0.5)
            if frozen:
                module.eval()
    network.features.conv0.requires_grad_(not frozen)
    return network


def run_as(network: nn.Module, way: str) -> nn.Module:
    """A copy that runs this way."""
    twin = copy.deepcopy(network)
    return make_efficient(twin, way="recompute") if way == "recompute" else make_efficient(twin, way)


@given(
    arguments=architectures,
    way=ways,
    batch=st.integers(2, 4),
    size=st.tuples(st.integers(9, 21), st.integers(9, 21)),
    training=st.booleans(),
    frozen=st.booleans(),
    channels_last=st.booleans(),
    single=st.booleans(),
    seed=st.integers(0, 10**6),
)
@LONG
def test_every_network_computes_what_the_ordinary_one_does(
    arguments, way, batch, size, training, frozen, channels_last, single, seed
):
    # A norm needs more than one pixel; the blocks see the images smaller by these factors.
    smallest = 2 ** (len(arguments["block_config"]) - 1) * (4 if arguments["input_size"] > 32 else 1)
    size = [max(n, 2 * smallest) for n in size]
    ordinary = ordinary_network(arguments, training, frozen, seed)
    x = torch.randn(batch, arguments["in_channels"], *size, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    if single:  # an activation within rounding error of zero passes in one computation, and not in another
        x = x.float().double()
        move_zeros_into_gaps(ordinary, x, Place("cpu"))
    other = run_as(ordinary, way)
    if single:
        plain = training_step(copy.deepcopy(ordinary).float(), x.float())
        found = training_step(other.float(), x.float())
        assert_nearly_as_exact(found, plain, training_step(ordinary, x))
    else:
        compare = assert_identical if way == "recompute" else assert_close
        compare(training_step(other, x), training_step(ordinary, x))


def assert_nearly_as_exact(found, plain, exact):
    """In float32: as near to float64 as four times the ordinary network in float32, and the tolerance."""
    assert found.keys() == plain.keys() == exact.keys()
    largest = max(value.abs().max().item() for name, value in exact.items() if "gradient" in name)
    for name, value in exact.items():
        scale = max(value.abs().max().item(), 1e-3 * largest if "gradient" in name else 0)
        errors = [(some[name].double() - value.double()).abs().max().item() for some in (plain, found)]
        assert errors[1] <= 4 * errors[0] + TOLERANCE[torch.float32] * scale, name


@given(arguments=architectures, way=ways, seed=st.integers(0, 10**6))
@settings(LONG, max_examples=max(6, EXAMPLES // 10))
def test_two_steps_move_the_running_statistics_alike(arguments, way, seed):
    ordinary = ordinary_network(arguments, True, False, seed)
    other = run_as(ordinary, way)
    for _ in range(2):
        x = torch.randn(3, arguments["in_channels"], 32, 32, dtype=torch.float64)
        expected, actual = training_step(ordinary, x), training_step(other, x)
    assert_close(actual, expected)
