"""Blocks that concatenate what other layers make: they recompute, and training equals the ordinary one in every bit."""

from __future__ import annotations

import copy

import pytest
import torch
from comparison import assert_close, assert_identical, training_step
from look_alikes import Loop, parts
from others import OneOutput, randomised
from torch import nn
from torch.nn import functional as F

from efficient_densenet import make_efficient, report
from efficient_densenet.errors import UserError


def conv(reads, makes=4, window=3):
    return nn.Conv2d(reads, makes, window, padding=window // 2)


class Block(nn.Module):
    """Layers of any kind; `new` is what is concatenated of each."""

    def __init__(self, layer, reads=6, new=lambda made: made):
        super().__init__()
        self.layers, self.new = nn.ModuleList(layer(reads + 4 * i) for i in range(3)), new

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, self.new(layer(x))], 1)
        return x


def sequence(*kinds):
    return lambda reads: nn.Sequential(*(kind(reads) for kind in kinds))


CONVOLUTION_FIRST = sequence(conv, lambda reads: nn.BatchNorm2d(4), lambda reads: nn.ReLU(inplace=True))
ACTIVATION_FIRST = sequence(lambda reads: nn.LeakyReLU(), conv)


def of_kind(kind):
    return sequence(nn.BatchNorm2d, lambda reads: kind(), conv)


def behind(kind):
    return sequence(nn.BatchNorm2d, lambda reads: nn.ReLU(), conv, lambda reads: kind())


class SuperResolution(nn.Module):
    """A residual dense block, as networks for super-resolution have it: without norms, and with a sum at the end."""

    def __init__(self):
        super().__init__()
        self.layers, self.fuse = nn.ModuleList(conv(6 + 4 * i) for i in range(3)), conv(18, 6)
        self.act = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(self.act(layer(torch.cat(features, 1))))
        return self.fuse(torch.cat(features, 1)) * 0.2 + x


class OneShot(nn.Module):
    """Layers that read only the one before; concatenated once."""

    def __init__(self):
        super().__init__()
        self.layers, self.fuse = nn.ModuleList([conv(6), conv(4), conv(4)]), conv(18, 6, 1)

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(F.relu(layer(features[-1])))
        return self.fuse(torch.cat(features, 1))


class Pair(Loop):
    def forward(self, x):
        return super().forward(x), x


class Wasteful(Loop):
    """The last layer has gradients of zero; its norm has no averages that would move."""

    def __init__(self):
        super().__init__()
        self.net[2][0] = nn.BatchNorm2d(14, track_running_stats=False)

    def forward(self, x):
        return super().forward(x)[:, :14]


class Branches(nn.Module):
    """A layer with two branches, which returns more than a tensor."""

    def __init__(self, reads=6):
        super().__init__()
        self.a, self.b = CONVOLUTION_FIRST(reads), nn.Sequential(conv(reads, 5, 1), conv(5))

    def forward(self, x):
        made = torch.cat((self.a(x), self.b(x)), 1)
        return torch.cat((x, made), 1), made


class Attention(nn.Module):
    """Functions for the attention, of channels and of pixels, where its convolution reads a concatenation."""

    def __init__(self):
        super().__init__()
        self.conv = conv(2, 1)

    def forward(self, x):
        x = x * x.mean((2, 3), keepdim=True).sigmoid()
        return x * self.conv(torch.cat([x.mean(1, True), x.amax(1, True)], 1)).sigmoid()


class Skipping(nn.Module):
    """A layer that is left out by chance, in training."""

    def __init__(self, reads):
        super().__init__()
        self.layer = parts(reads)

    def forward(self, x):
        made = self.layer(x)
        return torch.zeros_like(made) if self.training and torch.rand(1).item() < 0.5 else made


class Counting(nn.Module):
    """It adds a buffer, which it changes afterwards."""

    def __init__(self, reads):
        super().__init__()
        self.layer = parts(reads)
        self.register_buffer("offset", torch.ones(1, 4, 1, 1))

    def forward(self, x):
        made = F.relu(self.layer(x)) + self.offset
        self.offset.mul_(0.9).add_(made.detach().mean((0, 2, 3), keepdim=True))
        return made


class Whole(nn.Module):
    """A network with its blocks in its own forward, and a transition, which stays on the buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.Linear(14, 3)
        self.blocks = nn.ModuleList(nn.ModuleList(parts(n + 4 * i) for i in range(2)) for n in (4, 6))
        self.tail = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 1, bias=False), nn.AvgPool2d(2))

    def forward(self, x):
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            for layer in block:
                x = torch.cat((x, layer(x)), 1)
            x = x if number else self.tail(x)
        return self.head(x.mean((2, 3)))


class Scales(nn.Module):
    """A network that hands lists of two resolutions from layer to layer."""

    class Layer(nn.Module):
        def __init__(self, fine, coarse):
            super().__init__()
            self.fine, self.down, self.coarse = conv(fine), nn.Conv2d(fine, 4, 3, 2, 1), conv(coarse)

        def forward(self, features):
            fine, coarse = features
            return [torch.cat([fine, self.fine(fine)], 1), torch.cat([coarse, self.down(fine), self.coarse(coarse)], 1)]

    def __init__(self):
        super().__init__()
        self.down, self.layers = nn.Conv2d(6, 6, 3, 2, 1), nn.ModuleList([self.Layer(6, 6), self.Layer(10, 14)])

    def forward(self, x):
        features = [x, self.down(x)]
        for layer in self.layers:
            features = layer(features)
        return features


JOINED = "a convolution reads features without a norm and an activation in front of it"
KINDS = {
    "convolution first": (lambda: Block(CONVOLUTION_FIRST), JOINED),
    "activation first": (lambda: Block(ACTIVATION_FIRST), "its forward uses LeakyReLU where a dense block has nothing"),
    "RReLU": (lambda: Block(of_kind(nn.RReLU)), "RReLU is not ReLU"),
    "RReLU in place": (lambda: Block(of_kind(lambda: nn.RReLU(inplace=True))), "RReLU is not ReLU"),
    "AlphaDropout": (lambda: Block(behind(nn.AlphaDropout)), "there is AlphaDropout behind the last convolution"),
    "FeatureAlphaDropout": (lambda: Block(behind(nn.FeatureAlphaDropout)), "there is FeatureAlphaDropout behind"),
    "attention behind layers": (lambda: Block(behind(Attention)), "there is Attention behind the last convolution"),
    "attention by functions": (
        lambda: Block(parts, new=lambda made: made * made.mean((2, 3), True)),
        "its forward uses",
    ),
    "attention behind a block": (lambda: nn.Sequential(Block(parts), Attention()), None),
    "attention in a block": (
        lambda: Block(lambda reads: nn.Sequential(parts(reads)), new=torch.tanh),
        "its forward uses",
    ),
    "super-resolution": (SuperResolution, JOINED),
    "one shot": (OneShot, "its forward uses relu"),
    "branches": (Branches, JOINED),
    "two outputs": (Pair, "it returns tuple, not a tensor of features"),
    "left out by chance": (lambda: Block(Skipping), "its forward uses zeros_like"),
    "a buffer that changes": (lambda: Block(Counting), "its forward uses relu"),
    "everything in one forward": (Whole, "it concatenates something else than its input"),
    "lists of features": (Scales, JOINED),
    "features in place": (lambda: nn.Sequential(conv(6, 6), Block(conv, new=F.relu_)), "its forward uses relu"),
    "features that are not handed out": (Wasteful, "it makes features that it does not hand out"),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("error")
def test_recomputed_in_every_bit_with_a_true_reason(name):
    build, reason = KINDS[name]
    torch.manual_seed(0)
    ordinary = randomised(build()).float()
    efficient = make_efficient(copy.deepcopy(ordinary))
    adopted = report(efficient).adopted
    recomputed = [entry.reason for entry in adopted if entry.now == "recompute"]
    assert [given.startswith(reason) for given in recomputed] == [True] if reason else recomputed == []
    x = torch.randn(2, 6, 9, 8)
    for training in (True, True, False):
        results = []
        for network in (ordinary.train(training), efficient.train(training)):
            torch.manual_seed(3)
            results.append(training_step(OneOutput(network), x) | {"random state": torch.get_rng_state()})
        # In evaluation, and around what recomputes, some run on the shared buffer.
        same = assert_identical if training and len(recomputed) == len(adopted) else assert_close
        same(results[1], results[0])


def test_blocks_are_preferred_to_the_network_around_them():
    """Each as large as it can be; and what runs on the shared buffer is not given up for what only recomputes."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = conv(6, 6), Loop(), conv(24)
            self.other = nn.Sequential(SuperResolution(), SuperResolution())

        def forward(self, x):
            return torch.cat([x, self.last(torch.cat([self.inner(self.first(x)), self.other(x)], 1))], 1)

    found = {entry.name: entry.now for entry in report(make_efficient(Around())).entries}
    assert found == {"inner": "shared buffer", "other": "recompute"}


class Unet(nn.Module):
    """Each tensor is concatenated once, and not with what was made of the concatenation."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(6), conv(4), conv(8, 2)

    def forward(self, x):
        fine = F.relu(self.a(x))
        coarse = F.relu(self.b(F.max_pool2d(fine, 2)))
        return self.c(torch.cat([F.interpolate(coarse, size=fine.shape[2:]), fine], 1))


class Coordinates(nn.Module):
    """What is concatenated with the input is made by no convolution."""

    def __init__(self):
        super().__init__()
        self.conv = conv(7)

    def forward(self, x):
        return self.conv(torch.cat([x, x[:, :1] * 0 + 1], 1))


@pytest.mark.parametrize("network", [Unet, Coordinates])
def test_other_concatenations_are_no_dense_block(network):
    with pytest.raises(UserError, match="no dense block"):
        make_efficient(network())
