"""DenseNets in the styles in which people write them by hand, each with other habits than the libraries'."""

from __future__ import annotations

import copy

import pytest
import torch
from comparison import assert_close, training_step
from look_alikes import Loop
from others import loss, randomised
from torch import nn
from torch.nn import functional as F

from efficient_densenet import make_efficient, report


def conv3(reads, makes, **arguments):
    return nn.Conv2d(reads, makes, 3, padding=1, bias=False, **arguments)


class Bottleneck(nn.Module):
    """Functions for activations, new channels first."""

    def __init__(self, reads):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(reads), nn.Conv2d(reads, 8, kernel_size=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), conv3(8, 4)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return torch.cat([out, x], 1)


class Functional(nn.Module):
    """All in `forward`, one rectifier for all, a rate of dropout, pools with a window, and `view` before the end."""

    def __init__(self):
        super().__init__()
        self.conv1 = conv3(3, 6)
        self.dense1, self.dense2 = (nn.Sequential(*[Bottleneck(n + 4 * i) for i in range(2)]) for n in (6, 7))
        self.bn1, self.squeeze, self.bn2 = nn.BatchNorm2d(14), nn.Conv2d(14, 7, 1), nn.BatchNorm2d(15)
        self.relu, self.rate, self.fc = nn.ReLU(inplace=True), 0.2, nn.Linear(15 * 4, 5)

    def forward(self, x):
        out = self.dense1(self.conv1(x))
        out = F.dropout(self.squeeze(self.relu(self.bn1(out))), p=self.rate, training=self.training)
        out = self.dense2(F.avg_pool2d(out, 2))
        out = F.avg_pool2d(self.relu(self.bn2(out)), 2)
        return self.fc(out.view(-1, 15 * 4))


class Dictionary(nn.ModuleDict):
    """A block that is a dictionary of layers that are dictionaries of parts."""

    def __init__(self, reads=3):
        super().__init__()
        for i in range(3):
            n = reads + 4 * i
            self[f"layer{i}"] = nn.ModuleDict({"norm": nn.BatchNorm2d(n), "act": nn.ReLU(), "conv": conv3(n, 4)})

    def forward(self, x):
        features = [x]
        for parts in self.values():
            out = torch.cat(features, dim=1)
            for key in ("norm", "act", "conv"):
                out = parts[key](out)
            features.append(out)
        return torch.cat(features, dim=-3)


class ByName(nn.Module):
    """Parts by names that are put together, growth from a list."""

    def __init__(self, reads=3, growth=(2, 3, 4)):
        super().__init__()
        self.growth = growth
        for i, k in enumerate(growth):
            setattr(self, f"bn{i}", nn.BatchNorm2d(reads))
            setattr(self, f"conv{i}", conv3(reads, k))
            reads += k

    def forward(self, x):
        for i in range(len(self.growth)):
            out = F.relu_(getattr(self, f"bn{i}")(x))
            x = torch.concat((x, getattr(self, f"conv{i}")(out)), 1)
        return x


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, 2), nn.ReLU(inplace=True), nn.Linear(2, channels), nn.Sigmoid())

    def forward(self, x):
        n, c, _, _ = x.size()
        return x * self.fc(F.adaptive_avg_pool2d(x, 1).view(n, c)).view(n, c, 1, 1).expand_as(x)


class Layer(nn.Module):
    """Norm, activation, convolution, and what `behind` and `between` say."""

    def __init__(self, reads, behind=nn.Identity, between=nn.Identity, norm=nn.BatchNorm2d):
        super().__init__()
        self.body = nn.Sequential(norm(reads), nn.ReLU(True), between(), conv3(reads, 4), behind())

    def forward(self, x):
        return torch.cat((x, self.body(x)), 1)


def layers(**arguments):
    return lambda: nn.Sequential(*[Layer(3 + 4 * i, **arguments) for i in range(3)])


class Attended(nn.Sequential):
    """A whole block with attention at its end."""

    def __init__(self):
        super().__init__(*layers()(), SqueezeExcite(15))


class Segmentation(nn.Module):
    """An encoder that returns a list, and a decoder that upsamples what its middle block made."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = Dictionary(3), Loop("new"), ByName(12 + 15)
        self.down = nn.Sequential(
            nn.BatchNorm2d(15), nn.ReLU(), nn.Conv2d(15, 6, 1), nn.Dropout2d(0.2), nn.MaxPool2d(2)
        )
        self.up = nn.ConvTranspose2d(12, 12, 2, stride=2)

    def encode(self, x) -> list[torch.Tensor]:
        skip = self.first(x)
        return [skip, self.down(skip)]

    def forward(self, x):
        skip, x = self.encode(x)
        return self.last(torch.cat([self.up(self.middle(x)), skip], 1))


class Lines(nn.Module):
    """One dimension, with a wide window and `view` before the classifier."""

    def __init__(self):
        super().__init__()
        parts = []
        for reads in (3, 7):
            parts.append(
                nn.Sequential(nn.BatchNorm1d(reads), nn.ReLU(), nn.Conv1d(reads, 4, 7, padding=3), nn.Dropout(0.1))
            )
        self.parts, self.fc = nn.ModuleList(parts), nn.Linear(11 * 8, 2)

    def features(self, x):
        return x

    def forward(self, x):
        for part in self.parts:
            x = torch.cat([x, part(x)], 1)
        return x


class Ecg(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.fc = Lines(), nn.Linear(11 * 8, 2)

    def forward(self, x):
        return self.fc(self.block(x.flatten(2)[..., :8]).view(len(x), -1))


def taking(take):
    """What a block hands out, by other ways than a concatenation."""

    class Taking(Loop):
        def forward(self, x):
            made = super().forward(x)
            return take(made)

    return lambda: nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), Taking())


STYLES = {
    "functions": (Functional, "shared buffer"),
    "dictionaries": (Dictionary, "shared buffer"),
    "parts by name": (ByName, "shared buffer"),
    "a segmentation network": (Segmentation, "shared buffer"),
    "lines": (Ecg, "shared buffer"),
    "attention behind a block": (Attended, "shared buffer"),
    "no running statistics": (layers(norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False)), "shared buffer"),
    "split": (taking(lambda x: torch.split(x, [6, 12], 1)[1]), "shared buffer"),
    "split at places": (taking(lambda x: torch.cat(torch.tensor_split(x, [6, 10], 1)[::-1], 1)), "shared buffer"),
    "chunks of layers": (taking(lambda x: torch.chunk(x, 3, 1)[0]), "recompute"),
    "narrow": (taking(lambda x: x.narrow(1, 10, 8)), "shared buffer"),
    "a slice": (taking(lambda x: x[:, 10:14]), "recompute"),
    "attention behind layers": (layers(behind=lambda: SqueezeExcite(4)), "recompute"),
    "norms behind convolutions": (layers(behind=lambda: nn.BatchNorm2d(4)), "recompute"),
    "activations behind convolutions": (layers(behind=nn.ReLU), "recompute"),
    "dropout in front of convolutions": (layers(between=lambda: nn.Dropout(0.2)), "recompute"),
    "standardised by hand": (layers(norm=lambda c: nn.GroupNorm(1, c)), "recompute"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", STYLES)
@pytest.mark.filterwarnings("error")
def test_the_styles_of_people(name, dtype):
    build, way = STYLES[name]
    torch.manual_seed(0)
    ordinary = randomised(build()).to(dtype)
    efficient = make_efficient(copy.deepcopy(ordinary), "features")
    assert {entry.now for entry in report(efficient).adopted} - {"joins stem and transitions"} == {way}
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    for training in (True, False):
        results = []
        for network in (ordinary.train(training), efficient.train(training)):
            torch.manual_seed(2)
            results.append(training_step(network, x, loss))
        assert_close(results[1], results[0])
