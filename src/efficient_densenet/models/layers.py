"""The parts of a DenseNet, with torchvision's names for parameters and buffers.

Source: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", CVPR 2017.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from efficient_densenet.execution import (
    Dropout,
    Efficient,
    Head,
    Layer,
    Reader,
    Tail,
    norm_relu_conv,
    obstacle,
    shared,
    wants_buffer,
)
from efficient_densenet.execution.concatenate import concat
from efficient_densenet.execution.hooks import runs


class DenseLayer(nn.Module):
    """One layer of a dense block: it reads all features made so far and makes `growth_rate` new ones.

    With a bottleneck (`bn_size` given, DenseNet-BC), on ``C`` input channels and ``k = growth_rate``:
    ``conv3x3(relu(norm(conv1x1(relu(norm(x))))))`` with ``C → bn_size·k → k`` channels.
    Without: ``conv3x3(relu(norm(x)))`` with ``C → k``. Dropout with `drop_rate` follows.

    Shapes: a sequence of ``(N, C_i, H, W)`` with ``ΣC_i = C`` → ``(N, k, H, W)``.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None = None,
        drop_rate: float = 0.0,
        efficient: Efficient = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        if bn_size is None:
            self.conv1 = nn.Conv2d(num_input_features, growth_rate, kernel_size=3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(num_input_features, bn_size * growth_rate, kernel_size=1, bias=False)
            self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = drop_rate
        self.efficient = efficient

    def readers(self) -> list[Reader]:
        """The norm–relu–convolutions in their order."""
        first = Reader(self.norm1, self.relu1, self.conv1)
        return [first, Reader(self.norm2, self.relu2, self.conv2)] if hasattr(self, "norm2") else [first]

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        inputs = [features] if isinstance(features, Tensor) else features
        for reader in self.readers():
            inputs = [norm_relu_conv(inputs, *reader[:3], self.efficient)]
        (x,) = inputs
        return F.dropout(x, self.drop_rate, self.training) if self.drop_rate > 0 else x


class DenseBlock(nn.ModuleDict):
    """Dense layers, each of which reads the block's input and what all layers before it made.

    Shapes: ``(N, C, H, W)`` → ``(N, C + num_layers·growth_rate, H, W)``, the input's channels first.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None = None,
        drop_rate: float = 0.0,
        efficient: Efficient = False,
        keep: str = "bottleneck",
    ) -> None:
        super().__init__()
        self.efficient = efficient
        self.keep = keep
        for i in range(num_layers):
            self[f"denselayer{i + 1}"] = DenseLayer(
                num_input_features + i * growth_rate, growth_rate, bn_size, drop_rate, efficient
            )

    def forward(self, x: Tensor, following: Transition | Head | None = None) -> Tensor:
        """The features; or what a transition or a head makes of them, if it is to run on the same buffer."""
        if wants_buffer(x, self.efficient):
            layers = [_as_layer(module) for module in self.values()]
            tail = following.tail() if isinstance(following, Transition) else following
            reason = obstacle(layers, tail)
            if reason is None:
                return shared.dense_block(x, layers, tail, self.keep)
            if isinstance(tail, Head) and obstacle(layers) is None:
                return tail(shared.dense_block(x, layers, None, self.keep))
            warnings.warn(f"a dense block does not run on the shared buffer but layer by layer: {reason}", stacklevel=2)
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        out = concat(features)
        return out if following is None else following(out)


def _as_layer(module: Any) -> Layer:
    """What the engine runs in place of `module`; without readers where it cannot know what `module` does."""
    if not runs(module, DenseLayer):
        return Layer(module, [])
    return Layer(module, module.readers(), Dropout(module.drop_rate if module.training else 0.0))


class Transition(nn.Sequential):
    """Between two dense blocks: ``pool(conv1x1(relu(norm(x))))``, fewer channels and half the resolution.

    Shapes: ``(N, C, H, W)`` → ``(N, C', ⌊H/2⌋, ⌊W/2⌋)``.
    """

    def __init__(self, num_input_features: int, num_output_features: int, efficient: Efficient = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_input_features, num_output_features, kernel_size=1, bias=False)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)
        self.efficient = efficient

    def tail(self) -> Tail:
        """Its parts, to run on the buffer of the block before it."""
        return Tail(self.norm, self.relu, self.conv, self.pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(norm_relu_conv([x], self.norm, self.relu, self.conv, self.efficient))
