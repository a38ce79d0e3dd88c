"""Dense blocks as people write them: recognised by what they compute, equal in everything, and smaller."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from comparison import assert_close, training_step
from look_alikes import Loop, parts
from others import randomised
from torch import nn
from torch.nn import functional as F

from efficient_densenet import make_efficient, report, restore
from efficient_densenet.adopt.look import look
from efficient_densenet.adopt.meanings import NotDenseError
from efficient_densenet.adopt.trial import Tensors
from efficient_densenet.execution import KEEP

BUFFER = {"shared buffer", "joins stem and transitions"}


class Functional(nn.Module):
    """Functions for rectifiers, parts registered in another order, `order` of the concatenation, dropout in it."""

    def __init__(self, reads, order="old first", drop_rate=0.0, drop=None, **conv):
        super().__init__()
        conv = {"kernel_size": 3, "padding": 1, "bias": False} | conv
        self.conv2 = nn.Conv2d(8, 4, **conv)
        self.conv1 = nn.Conv2d(reads, 8, 1, bias=conv["bias"])
        self.bn2, self.bn1 = nn.BatchNorm2d(8), nn.BatchNorm2d(reads)
        self.order, self.drop_rate, self.drop = order, drop_rate, drop or nn.Identity()

    def forward(self, x):
        y = self.conv2(F.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))
        y = F.dropout(self.drop(y), self.drop_rate, self.training)
        return torch.cat([x, y] if self.order == "old first" else [y, x], 1)


def chain(layers=3, **arguments):
    return nn.Sequential(*(Functional(6 + 4 * i, **arguments) for i in range(layers)))


class Pooling(nn.Module):
    """A transition with functions for rectifier and pool."""

    def __init__(self, reads, pool, kernel_size=1, **conv):
        super().__init__()
        self.bn, self.pool = nn.BatchNorm2d(reads), pool
        self.conv = nn.Conv2d(reads, reads // 2, kernel_size, padding=kernel_size // 2, **conv)

    def forward(self, x):
        return self.pool(self.conv(F.relu(self.bn(x))))


def average(x):
    return F.avg_pool2d(x, 2)


def largest(x):
    return F.max_pool2d(x, 2)


def as_it_is(x):
    return x


class WithHead(nn.Module):
    def __init__(self, layers, **arguments):
        super().__init__()
        channels = 6 + 4 * layers
        self.features = nn.Sequential(nn.Conv2d(6, 6, 3), *chain(layers, **arguments), nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, 3)

    def forward(self, x):
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))


ON_THE_BUFFER = {
    "functions for rectifiers": lambda: chain(),
    "new channels first": lambda: chain(order="new first"),
    "a layer and a head, new channels first": lambda: WithHead(1, order="new first"),
    "layers and a head, new channels first": lambda: WithHead(3, order="new first"),
    "biases": lambda: chain(bias=True),
    "dilated windows": lambda: chain(dilation=2, padding=2),
    "two kinds of dropout": lambda: chain(drop_rate=0.2, drop=nn.Dropout2d(0.1)),
    "everything dropped": lambda: chain(drop_rate=1.0),
    "layers that a loop walks": Loop,
    "only what was made": lambda: Loop("new", bias=True),
    "only what was made, by a slice": lambda: Loop("slice"),
    "a transition behind the layers": lambda: nn.Sequential(*chain(), Pooling(18, average)),
    "the same, new channels first": lambda: nn.Sequential(*chain(order="new first"), Pooling(18, average, bias=True)),
    "inside a longer sequence": lambda: nn.Sequential(nn.Tanh(), *chain(), parts(18), nn.MaxPool2d(2), nn.Tanh()),
    "a max pool": lambda: nn.Sequential(chain(), Pooling(18, largest)),
    "no pool": lambda: nn.Sequential(chain(), Pooling(18, as_it_is)),
    "a wider convolution": lambda: nn.Sequential(chain(), Pooling(18, average, 3)),
}


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ON_THE_BUFFER)
@pytest.mark.filterwarnings("error")
def test_on_the_buffer(name, dtype, keep):
    torch.manual_seed(0)
    ordinary = randomised(ON_THE_BUFFER[name]()).to(dtype)
    efficient = make_efficient(copy.deepcopy(ordinary), keep)
    assert {entry.now for entry in report(efficient).adopted} <= BUFFER
    for training in (True, False):
        compare(ordinary.train(training), efficient.train(training))


def compare(ordinary, efficient, size=(9, 8)):
    """After two steps. A bias in front of a norm has no gradient: what is found there is rounding, in both networks."""
    x = torch.randn(2, 6, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(ordinary).double()
    results = []
    for network in (exact, ordinary, efficient):
        for step in range(2):
            torch.manual_seed(step)  # dropout
            found = training_step(network, x.to(next(network.parameters()).dtype))
        results.append(found)
    gradients = {name: g.abs().max().item() for name, g in results[0].items() if name.startswith("gradient")}
    largest = max(gradients.values())
    for name, value in gradients.items():
        if value < 1e-9 * largest:
            assert all(result.pop(name).abs().max() <= 1e-6 * largest for result in results)
    assert_close(results[2], results[1])


class Adapter(nn.Module):
    """As adapters for fine-tuning wrap a convolution."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a = base, nn.Conv2d(base.in_channels, 2, base.kernel_size, padding=base.padding, bias=False)
        self.b = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.b(self.a(x))


def wrapped():
    block = Loop()
    block.net[1][2] = Adapter(block.net[1][2])
    return block


class Observed(nn.Conv2d):
    """As quantisation scales a weight, by a buffer that has its size from the first call on."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.register_buffer("largest", torch.empty(0))

    def forward(self, x):
        self.largest.resize_(self.out_channels).copy_(self.weight.detach().abs().amax((1, 2, 3)))
        return self._conv_forward(x, self.weight / self.largest.view(-1, 1, 1, 1), self.bias)


def observed():
    block = Loop()
    block.net[1][2] = Observed(block.net[1][2].in_channels, block.net[1][2].out_channels, 3, padding=1, bias=False)
    return block


def wrapped_without_more_channels():
    block = Loop()
    block.net[1] = nn.Sequential(nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 10, 1), *block.net[1])
    block.net[1][2] = Adapter(block.net[1][2])
    return block


def other_activation(activation):
    def build():
        block = Loop()
        block.net[1][1] = activation
        return block

    return build


RECOMPUTED = {
    "wrapped convolutions": (wrapped, "Adapter is not a convolution of PyTorch's own"),
    "wrapped convolutions that keep the channels": (
        wrapped_without_more_channels,
        "Adapter is not a convolution of PyTorch's own",
    ),
    "observed convolutions": (observed, "the weight of Observed is computed"),
    "leaky rectifiers": (other_activation(nn.LeakyReLU(0.1)), "LeakyReLU is not ReLU"),
    "rectifiers with a slope that is learned": (other_activation(nn.PReLU()), "PReLU is not ReLU"),
    "rectifiers with a lid": (other_activation(nn.ReLU6(inplace=True)), "ReLU6 is not ReLU"),
    "smooth rectifiers": (other_activation(nn.SiLU()), "SiLU is not ReLU"),
    "smoother rectifiers": (other_activation(nn.GELU()), "GELU is not ReLU"),
}


@pytest.mark.parametrize("name", RECOMPUTED)
@pytest.mark.filterwarnings("error")
def test_recomputed_exactly_for_a_true_reason(name):
    build, reason = RECOMPUTED[name]
    ordinary = randomised(build())
    efficient = make_efficient(copy.deepcopy(ordinary))
    (entry,) = report(efficient).adopted
    assert (entry.now, entry.reason) == ("recompute", reason)
    compare(ordinary, efficient)
    assert kept(efficient) < 0.8 * kept(ordinary)


def kept(network):
    """Bytes that autograd keeps, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.randn(2, 6, 9, 8, dtype=torch.float64))
    return sum(storages.values())


class Scaled(Loop):
    scale = 1.0

    def forward(self, x, mask=None):
        out = super().forward(x) * self.scale
        return out if mask is None else out * mask


class Looking(Loop):
    def forward(self, x):
        out = super().forward(x)
        return out if x.shape[-1] < 32 else 2 * out


class Storing(Loop):
    def forward(self, x):
        self.seen = super().forward(x)
        return self.seen


def test_attributes_that_change_afterwards_take_effect():
    ordinary = randomised(Scaled())
    efficient = make_efficient(copy.deepcopy(ordinary))
    compare(ordinary, efficient)
    ordinary.scale = efficient.scale = 0.5
    with pytest.warns(UserWarning, match="its forward uses mul"):
        compare(ordinary, efficient)
    ordinary.scale = efficient.scale = 1.0
    compare(ordinary, efficient)
    assert report(efficient).adopted[0].now == "shared buffer"


def test_arguments_by_name_and_others():
    ordinary = randomised(Scaled())
    efficient = make_efficient(copy.deepcopy(ordinary))
    x, mask = torch.randn(2, 6, 9, 8, dtype=torch.float64), torch.rand(2, 1, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(efficient(x=x), ordinary(x=x))
    with pytest.warns(UserWarning, match="called with other arguments than one tensor"):
        torch.testing.assert_close(efficient(x, mask=mask), ordinary(x, mask=mask))


def test_a_forward_that_looks_at_sizes_is_looked_at_for_each():
    ordinary = randomised(Looking())
    efficient = make_efficient(copy.deepcopy(ordinary))
    compare(ordinary, efficient)
    assert report(efficient).adopted[0].now == "shared buffer"
    with pytest.warns(UserWarning, match="its forward uses mul"):
        compare(ordinary, efficient, (9, 40))


def test_what_a_block_stores_is_stored():
    ordinary = randomised(Storing())
    efficient = make_efficient(copy.deepcopy(ordinary))
    assert "seen" not in vars(efficient)
    compare(ordinary, efficient)
    torch.testing.assert_close(efficient.seen, ordinary.seen)
    assert report(efficient).adopted[0].reason == "its forward stores 'seen' in a module"


def test_shared_modules_and_tied_tensors_stay_what_they_are():
    block = Loop()
    block.net[1][2].weight = nn.Parameter(torch.randn(4, 10, 3, 3))
    block.other = block.net[0]
    block.list = [block.net[0]]
    before = {id(module): dict(vars(module)) for module in block.modules()}
    tensors = [*block.parameters(), *block.buffers()]
    make_efficient(block)
    report(block, image=(6, 16, 16))
    restore(block)
    assert {id(module): dict(vars(module)) for module in block.modules()} == before
    assert all(a is b for a, b in zip(tensors, [*block.parameters(), *block.buffers()], strict=True))


class Sparse(nn.Module):
    """Two layers, the second of which does not read the input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = parts(6), parts(4)

    def forward(self, x):
        a = self.first(x)
        return torch.cat([x, a, self.second(a)], 1)


def stem(*norms):
    convolutions = [nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1, bias=False) for i in range(len(norms))]
    parts = [part for pair in zip(convolutions, norms, strict=True) for part in (*pair, nn.ReLU())]
    return nn.Sequential(*parts, nn.MaxPool2d(3, 2, 1))


def test_a_stem_with_an_activation_in_place_of_its_norm_is_left_with_the_reason():
    convolutions = [nn.Conv2d(3, 6, 3, padding=1), nn.GELU(), nn.Conv2d(6, 6, 3, padding=1)]
    found, *_ = look(
        [nn.Sequential(*convolutions, nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1))], Tensors("cpu")
    )
    assert found.reason == "there is GELU behind its first convolution, where a batch norm should be"


def test_a_stem_needs_a_batch_norm_behind_each_of_its_convolutions():
    assert all(one.reason is None for one in look([stem(nn.BatchNorm2d(6), nn.BatchNorm2d(6))], Tensors("cpu")))
    assert all(one.chain.plan is None for one in look([stem(nn.GroupNorm(2, 6), nn.BatchNorm2d(6))], Tensors("cpu")))


def looks_at_values(block):
    class Looks(Loop):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    block.__class__ = Looks


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Sparse, "its layer 2 does not read all features"),
        (lambda: (block := Loop(), looks_at_values(block))[0], "its forward (looks at the values|uses sum)"),
        (lambda: stem(nn.GroupNorm(2, 6)), "no batch norm follows its first convolution"),
        (
            lambda: nn.Sequential(*parts(6), nn.AvgPool2d(2), nn.Dropout(0.3), nn.Conv2d(4, 4, 1)),
            "a convolution reads features without a norm and an activation in front of it",
        ),
    ],
    ids=["not all features", "values", "a stem without batch norm", "a convolution behind pool and dropout"],
)
def test_what_is_not_dense_is_left(build, reason):
    with pytest.raises(NotDenseError, match=reason):
        look([build()], Tensors("cpu"))


def test_recomputing_is_exact_and_has_gradients_of_gradients():
    ordinary = randomised(nn.Sequential(chain(), Pooling(18, average)))
    efficient = make_efficient(copy.deepcopy(ordinary), way="recompute")
    results = []
    for network in (ordinary, efficient):
        x = torch.randn(2, 6, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        results.append([x.grad, *(p.grad for p in network.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    make_efficient(efficient, "features")
    assert {entry.now for entry in report(efficient).adopted} <= BUFFER
    with pytest.raises(ValueError, match="way must be one of 'shared', 'recompute', not 'magic'"):
        make_efficient(ordinary, way="magic")


class Hiding(Loop):
    """A norm in a plain list, which does not register it, and containers that the forward changes."""

    def __init__(self):
        super().__init__()
        self.hidden, self.log, self.counts = [nn.BatchNorm2d(6)], [], Counter()

    def forward(self, x):
        self.log.append(x.shape)
        self.counts["calls"] += 1
        self.hidden[0](x)
        return super().forward(x)


def followed(block):
    """With another block behind it, so that something is found."""
    return nn.Sequential(block, nn.Conv2d(18, 6, 1), Loop()).double()


def test_the_trial_leaves_alone_what_no_module_registers():
    ordinary = Hiding().double()
    ordinary.hidden[0].double()
    efficient = make_efficient(copy.deepcopy(followed(ordinary)))[0]
    assert efficient.log == [] and not efficient.counts
    assert_equal = torch.testing.assert_close
    assert_equal(efficient.hidden[0].state_dict(), ordinary.hidden[0].state_dict(), rtol=0, atol=0)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    ordinary(x), efficient(x)
    assert efficient.counts == ordinary.counts and efficient.log == ordinary.log
    assert_equal(efficient.hidden[0].state_dict(), ordinary.hidden[0].state_dict())


class Switched(Loop):
    """What it computes hangs on the value of a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("doubled", torch.tensor(True))

    def forward(self, x):
        made = super().forward(x)
        return 2 * made if self.doubled else made


def test_a_forward_that_looks_at_the_value_of_a_buffer_runs_itself():
    ordinary = Switched().double()
    efficient = make_efficient(copy.deepcopy(followed(ordinary)))[0]
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(efficient(x), ordinary(x))
        ordinary.doubled.fill_(False)
        efficient.doubled.fill_(False)


def test_a_model_is_recognised_in_inference_mode_and_trains_afterwards():
    ordinary = Loop().double()
    efficient = copy.deepcopy(ordinary)
    with torch.inference_mode():
        make_efficient(efficient)
    assert {entry.now for entry in report(efficient).adopted} <= BUFFER
    compare(ordinary, efficient)


class Standardised(nn.Conv2d):
    """A convolution that does something to its weight where only a method of PyTorch's own shows it."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


@pytest.mark.parametrize("kind", ["dropout before the pool", "standardised weights"])
def test_parts_that_do_more_than_they_seem(kind):
    if kind == "dropout before the pool":
        tail = nn.Sequential(
            nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 9, 1, bias=False), nn.Dropout(0.0), nn.AvgPool2d(2)
        )
        ordinary = nn.Sequential(Loop(), tail)
    else:
        ordinary = nn.Sequential(Loop())
        for part in ordinary[0].net:
            part[2] = Standardised(part[2].in_channels, 4, 3, padding=1, bias=False)
    compare(ordinary.double(), make_efficient(copy.deepcopy(ordinary.double())))


def test_a_scripted_module_inside_is_left_alone():
    ordinary = nn.Sequential(Loop(), torch.jit.script(nn.Tanh())).double()
    compare(ordinary, make_efficient(copy.deepcopy(ordinary)))
