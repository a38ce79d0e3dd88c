"""The DenseNet, as ordinary PyTorch: dense layers, blocks, transitions, and the network of them.

Parameters and buffers have torchvision's names. How the network is to run is no business of this file:
`DenseNet(efficient=...)` builds it and hands it to `adopt`, as `make_efficient` does with any other network.

Source: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", CVPR 2017.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_densenet.adopt import Way, chosen_keep, convert
from efficient_densenet.errors import UserError
from efficient_densenet.execution import Auto, Efficient, Keep, check_efficient

_MAX_CIFAR_SIZE = 32  # larger inputs get the ImageNet stem


class DenseLayer(nn.Module):
    """One layer of a dense block: it reads all features made so far and makes `growth_rate` new ones.

    With a bottleneck (`bn_size` given, DenseNet-BC), on ``C`` input channels and ``k = growth_rate``:
    ``conv3x3(relu(norm(conv1x1(relu(norm(x))))))`` with ``C → bn_size·k → k`` channels.
    Without: ``conv3x3(relu(norm(x)))`` with ``C → k``. Dropout with `drop_rate` follows.

    Shapes: a list of ``(N, C_i, H, W)`` with ``ΣC_i = C`` → ``(N, k, H, W)``.
    """

    def __init__(
        self, num_input_features: int, growth_rate: int, bn_size: int | None = None, drop_rate: float = 0.0
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
        self.has_bottleneck = bn_size is not None
        self.drop_rate = drop_rate

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        if self.has_bottleneck:
            x = self.conv2(self.relu2(self.norm2(x)))
        return F.dropout(x, self.drop_rate, self.training) if self.drop_rate > 0 else x


class DenseBlock(nn.Module):
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
    ) -> None:
        super().__init__()
        for i in range(num_layers):
            layer = DenseLayer(num_input_features + i * growth_rate, growth_rate, bn_size, drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """Between two dense blocks: ``pool(conv1x1(relu(norm(x))))``, fewer channels and half the resolution.

    Shapes: ``(N, C, H, W)`` → ``(N, C', ⌊H/2⌋, ⌊W/2⌋)``.
    """

    def __init__(self, num_input_features: int, num_output_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_input_features, num_output_features, kernel_size=1, bias=False)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)


class DenseNet(nn.Module):
    """A densely connected convolutional network (Huang et al., CVPR 2017), DenseNet or DenseNet-BC.

    The parameters and buffers have torchvision's names, whatever `efficient` is, so that a state dict loads into
    every form with ``strict=True``.

    Shapes: images ``(N, in_channels, H, W)`` → logits ``(N, num_classes)``. Kept for backward: see `efficient`.

    Args:
        in_channels: channels of the images.
        num_init_features: channels that the stem makes.
        growth_rate: channels that each dense layer adds; None: half of `num_init_features`.
        block_config: the number of dense layers in each block.
        compression: the share of channels that a transition passes on, in (0, 1].
        input_size: up to 32, the stem is one 3×3 convolution; above, it is the ImageNet stem (7×7 convolution, norm,
            relu, max pool), which divides the resolution by four. The network takes other sizes than this one too.
        bn_size: bottleneck channels in multiples of the growth rate (4 in the paper's DenseNet-B); None: no bottleneck.
        drop_rate: dropout after each dense layer, in [0, 1).
        num_classes: outputs of the classifier; 0: no classifier, the network returns the pooled features.
        efficient: False keeps all activations. ``"recompute"`` keeps the features and the bottleneck outputs alone and
            is bit-identical to False. True runs each block on one buffer, the smallest and fastest; results agree
            with False up to rounding, and there are no gradients of gradients. `make_efficient` and `restore` change
            this later.
        keep: with ``efficient=True``, what stays in memory for backward: ``"bottleneck"`` the features and the
            bottleneck outputs (fastest), ``"features"`` the features alone (one more 1×1 convolution per layer),
            ``"inputs"`` only the inputs of the blocks, and the last block's features (smallest: runs
            the others forward again; the peak of a step is then in the backward of the first block, which needs its
            features anyway); ``"auto"``: the fastest of them that fits into `memory`, see `make_efficient`.
        memory: with ``keep="auto"``, what a training step may take, such as ``"11GB"``.
        batch: with ``keep="auto"``, the shape ``(N, in_channels, H, W)`` of a step's images.

    Raises:
        UserError: an argument is out of range, or (at the first call) an input does not fit the network.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_init_features: int = 24,
        growth_rate: int | None = None,
        block_config: Sequence[int] = (12, 12, 12),
        compression: float = 1.0,
        input_size: int = 32,
        bn_size: int | None = None,
        drop_rate: float = 0.0,
        num_classes: int = 100,
        efficient: Efficient = False,
        keep: Keep | Auto = "bottleneck",
        memory: int | str | None = None,
        batch: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        check_count("num_init_features", num_init_features)
        if growth_rate is None:
            growth_rate = max(1, num_init_features // 2)
        check_count("growth_rate", growth_rate)
        check_count("input_size", input_size)
        if bn_size is not None:
            check_count("bn_size", bn_size, " or None (no bottleneck)")
        check_count("num_classes", num_classes, minimum=0)
        if not isinstance(block_config, Sequence) or isinstance(block_config, str) or len(block_config) == 0:
            raise UserError(
                "block_config needs at least one block: a sequence with the number of layers of each, "
                f"such as (6, 12, 24, 16), not {block_config!r}"
            )
        for num_layers in block_config:
            check_count("each entry of block_config", num_layers)
        if not (_is_number(compression) and 0 < compression <= 1):
            raise UserError(f"compression must be a number above 0 and at most 1, not {compression!r}")
        if not (_is_number(drop_rate) and 0 <= drop_rate < 1):
            raise UserError(f"drop_rate must be a number at least 0 and below 1, not {drop_rate!r}")
        check_efficient(efficient, keep)

        self.features = nn.Sequential(_stem(in_channels, num_init_features, input_size))
        width = num_init_features
        for i, num_layers in enumerate(block_config, start=1):
            block = DenseBlock(num_layers, width, growth_rate, bn_size, drop_rate)
            self.features.add_module(f"denseblock{i}", block)
            width += num_layers * growth_rate
            if i < len(block_config):
                narrowed = int(width * compression)
                if narrowed == 0:
                    raise UserError(
                        f"compression {compression} leaves no channel of the {width} after block {i}; "
                        "use a larger compression or more features"
                    )
                self.features.add_module(f"transition{i}", Transition(width, narrowed))
                width = narrowed
        self.features.add_module(f"norm{len(block_config) + 1}", nn.BatchNorm2d(width))

        self.efficient = efficient  # as it was asked for; `report` tells what has become of it
        self.in_channels = in_channels
        self.num_features = width
        self.num_classes = num_classes
        # The smallest side that leaves at least one pixel after the stem and every halving transition.
        smallest = 2 ** (len(block_config) - 1)
        self.min_input_size = 4 * (smallest - 1) + 1 if input_size > _MAX_CIFAR_SIZE else smallest
        self.classifier = self._classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        if efficient:
            way: Way = "recompute" if efficient == "recompute" else "shared"
            convert(self, chosen_keep(self, keep, way, memory, batch), way, tried=False)

    def _classifier(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        classifier = nn.Linear(self.num_features, num_classes)
        nn.init.zeros_(classifier.bias)
        return classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``(N, in_channels, H, W)`` → rectified feature maps ``(N, num_features, H', W')``."""
        # A script has its own errors, and of a proxy of torch.fx nothing is known yet.
        if not torch.jit.is_scripting() and isinstance(x, Tensor):
            self._check_input(x)
        return F.relu(self.features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature maps → logits ``(N, num_classes)``; with `pre_logits` the pooled features ``(N, num_features)``."""
        x = torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)
        return x if pre_logits else self.classifier(x)

    def get_classifier(self) -> nn.Module:
        """The last layer: a linear one, or the identity of a network without classes."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a new one for `num_classes` classes; 0: none, so that features come out."""
        check_count("num_classes", num_classes, minimum=0)
        old = next(self.parameters())
        self.classifier = self._classifier(num_classes).to(old.device, old.dtype)
        self.num_classes = num_classes

    @torch.jit.unused
    def _check_input(self, x: Tensor) -> None:
        first = getattr(self.features, "conv0", None)  # which somebody may have replaced
        channels = getattr(first, "in_channels", self.in_channels)
        if x.dim() != 4 or x.shape[1] != channels:
            raise UserError(
                f"this network takes images of shape (N, {channels}, H, W), not {tuple(x.shape)}; for other "
                "images build it with another in_channels"
            )
        if min(x.shape[2:]) < self.min_input_size:
            raise UserError(
                f"images of {x.shape[2]}×{x.shape[3]} pixels are too small for this network, which needs at least "
                f"{self.min_input_size}×{self.min_input_size}: enlarge them, or use fewer blocks or a stem for small "
                "images (input_size up to 32)"
            )


def _stem(in_channels: int, num_init_features: int, input_size: int) -> OrderedDict[str, nn.Module]:
    if input_size <= _MAX_CIFAR_SIZE:
        return OrderedDict(conv0=nn.Conv2d(in_channels, num_init_features, kernel_size=3, padding=1, bias=False))
    return OrderedDict(
        conv0=nn.Conv2d(in_channels, num_init_features, kernel_size=7, stride=2, padding=3, bias=False),
        norm0=nn.BatchNorm2d(num_init_features),
        relu0=nn.ReLU(inplace=True),
        pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_count(name: str, value: object, otherwise: str = "", minimum: int = 1) -> None:
    """Raise `UserError` unless it is a whole number, and large enough."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
        raise UserError(f"{name} must be a whole number of at least {minimum}{otherwise}, not {value!r}")
