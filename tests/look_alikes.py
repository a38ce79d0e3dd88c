"""Structures of other DenseNets that are not packages, and some that only look like one, written anew and small."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F


def bottleneck_parts(reads: int, growth: int, width: int = 8, **conv) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        norm1=nn.BatchNorm2d(reads),
        relu1=nn.ReLU(inplace=True),
        conv1=nn.Conv2d(reads, width, 1, bias=False),
        norm2=nn.BatchNorm2d(width),
        relu2=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(width, growth, **{"kernel_size": 3, "padding": 1, "bias": False} | conv),
    )


class VarargsLayer(nn.Module):
    """As in gpleiss/efficient_densenet_pytorch: takes all features as arguments, returns the new ones."""

    def __init__(self, reads: int, growth: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        for name, module in bottleneck_parts(reads, growth).items():
            self.add_module(name, module)
        self.drop_rate = drop_rate

    def forward(self, *features):
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        x = self.conv2(self.relu2(self.norm2(x)))
        return F.dropout(x, p=self.drop_rate, training=self.training) if self.drop_rate > 0 else x


class VarargsBlock(nn.Module):
    def __init__(self, layers: int, reads: int, growth: int, layer: type[nn.Module] = VarargsLayer, **kwargs) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", layer(reads + i * growth, growth, **kwargs))

    def forward(self, init_features):
        features = [init_features]
        for layer in self.children():
            features.append(layer(*features))
        return torch.cat(features, 1)


class Bottleneck(nn.Module):
    """As in wandering007/efficient-densenet-pytorch: norm, relu and 1×1 convolution whose tensors are its own."""

    def __init__(self, reads: int, makes: int) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(reads))
        self.norm_bias = nn.Parameter(torch.zeros(reads))
        self.register_buffer("norm_running_mean", torch.zeros(reads))
        self.register_buffer("norm_running_var", torch.ones(reads))
        self.conv_weight = nn.Parameter(torch.randn(makes, reads, 1, 1))

    def forward(self, features):
        x = torch.cat(features, 1)
        norm = (self.norm_running_mean, self.norm_running_var, self.norm_weight, self.norm_bias)
        return F.conv2d(F.relu(F.batch_norm(x, *norm, training=self.training)), self.conv_weight)


class BareLayer(nn.Sequential):
    def __init__(self, reads: int, growth: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.add_module("bottleneck", Bottleneck(reads, 8))
        for name, module in list(bottleneck_parts(reads, growth).items())[3:]:
            self.add_module(name, module)
        self.drop_rate = drop_rate

    def forward(self, *features):
        x = super().forward(features)
        return F.dropout(x, p=self.drop_rate, training=self.training) if self.drop_rate > 0 else x


class PlainLayer(nn.Sequential):
    """Without a bottleneck; returns its input and the new features."""

    def __init__(self, reads: int, growth: int, **conv) -> None:
        conv = {"kernel_size": 3, "padding": 1, "bias": False} | conv
        super().__init__(nn.BatchNorm2d(reads), nn.ReLU(), nn.Conv2d(reads, growth, **conv))

    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)


def network(*parts: nn.Module, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(classes))


def transition(reads: int, makes: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(reads),
            relu=nn.ReLU(inplace=True),
            conv=nn.Conv2d(reads, makes, 1, bias=False),
            pool=nn.AvgPool2d(2, 2),
        )
    )


class VarargsNetwork(nn.Module):
    def __init__(self, layer: type[nn.Module] = VarargsLayer, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(OrderedDict([("conv0", nn.Conv2d(3, 6, 3, padding=1, bias=False))]))
        self.features.add_module("denseblock1", VarargsBlock(3, 6, 4, layer, drop_rate=drop_rate))
        self.features.add_module("transition1", transition(18, 9))
        self.features.add_module("denseblock2", VarargsBlock(2, 9, 4, layer, drop_rate=drop_rate))
        self.features.add_module("norm_final", nn.BatchNorm2d(17))
        self.classifier = nn.Linear(17, 5)

    def forward(self, x):
        x = F.relu(self.features(x), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


def parts(reads, growth=4, **conv):
    conv = {"kernel_size": 3, "padding": 1, "bias": False} | conv
    return nn.Sequential(nn.BatchNorm2d(reads), nn.ReLU(inplace=True), nn.Conv2d(reads, growth, **conv))


class Loop(nn.Module):
    """Layers in a `Sequential` that a loop walks; `output` says what comes out."""

    def __init__(self, output="all", **conv):
        super().__init__()
        self.net, self.output = nn.Sequential(*(parts(6 + 4 * i, **conv) for i in range(3))), output

    def forward(self, x):
        made = []
        for part in self.net:
            made.append(part(x))
            x = torch.cat((x, made[-1]), dim=1)
        return {"all": x, "new": torch.cat(made, 1), "slice": x[:, 6:]}[self.output]
