"""The DenseNet: stem, dense blocks with transitions between them, final norm, classifier."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from efficient_densenet.errors import UserError
from efficient_densenet.execution import Efficient, Head, Stem, check_efficient, norm_relu_conv, obstacle, wants_buffer
from efficient_densenet.execution.hooks import has_hooks, runs
from efficient_densenet.execution.joining import run_in_order
from efficient_densenet.models.layers import DenseBlock, Transition

_MAX_CIFAR_SIZE = 32  # larger inputs get the ImageNet stem


class _Features(nn.Sequential):
    """Everything before the classifier, under torchvision's names.

    It runs its children in order, but the stem's norm, activation and pool as one, and a transition together with the
    block before it, so that the efficient network need not keep what lies between them.
    """

    @property
    def efficient(self) -> Efficient:
        """As the blocks are."""
        return next((m.efficient for m in self if isinstance(m, DenseBlock)), False)

    @property
    def keep(self) -> str:
        """As the blocks do."""
        return next((m.keep for m in self if isinstance(m, DenseBlock)), "bottleneck")

    def forward(self, x: Tensor) -> Tensor:
        modules = list(self)
        if wants_buffer(x, self.efficient):
            return run_in_order(x, modules, self._read_stem, _can_join, self.keep)
        found = self._read_stem(modules)
        if found is not None:
            stem, taken = found
            x = norm_relu_conv([stem.conv(x)], *stem[1:4], self.efficient)
            del modules[:taken]
        for module in modules:
            x = module(x)
        return x

    def pooled(self, x: Tensor) -> Tensor | None:
        """The head's ``(N, C)`` on the buffer of the last block, or None where its parts must run one by one."""
        *modules, last = self
        head = Head(last)
        if not wants_buffer(x, self.efficient) or has_hooks([self]) or obstacle([], head) is not None:
            return None
        if not modules or not runs(modules[-1], DenseBlock) or has_hooks(modules[-1:]):
            return None
        return run_in_order(x, modules, self._read_stem, _can_join, self.keep, head)

    def _read_stem(self, modules: Sequence[nn.Module]) -> tuple[Stem, int] | None:
        is_stem = list(self._modules)[:4] == ["conv0", "norm0", "relu0", "pool0"] and modules[0] is self[0]
        return (Stem(modules[0], modules[1], modules[2], modules[3]), 4) if is_stem else None


def _can_join(block: nn.Module, following: nn.Module) -> bool:
    return runs(block, DenseBlock) and runs(following, Transition)


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
            with False up to rounding, and there are no gradients of gradients.
        keep: with ``efficient=True``, what stays in memory for backward: ``"bottleneck"`` the features and the
            bottleneck outputs (fastest), ``"features"`` the features alone (one more 1×1 convolution per layer),
            ``"inputs"`` only the inputs of the blocks and of the stem, and the last block's features (smallest: runs
            the others forward again; the peak of a step is then in the backward of the first block, which needs its
            features anyway).

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
        keep: str = "bottleneck",
    ) -> None:
        super().__init__()
        _check_count("in_channels", in_channels)
        _check_count("num_init_features", num_init_features)
        if growth_rate is None:
            growth_rate = max(1, num_init_features // 2)
        _check_count("growth_rate", growth_rate)
        _check_count("input_size", input_size)
        if bn_size is not None:
            _check_count("bn_size", bn_size, " or None (no bottleneck)")
        _check_count("num_classes", num_classes, minimum=0)
        if not isinstance(block_config, Sequence) or isinstance(block_config, str) or len(block_config) == 0:
            raise UserError(
                "block_config needs at least one block: a sequence with the number of layers of each, "
                f"such as (6, 12, 24, 16), not {block_config!r}"
            )
        for num_layers in block_config:
            _check_count("each entry of block_config", num_layers)
        _check_number("compression", compression, 0 < _as_number(compression) <= 1, "above 0 and at most 1")
        _check_number("drop_rate", drop_rate, 0 <= _as_number(drop_rate) < 1, "at least 0 and below 1")
        check_efficient(efficient, keep)
        self.efficient = efficient

        self.features = _Features()
        if input_size > _MAX_CIFAR_SIZE:
            self.features.add_module(
                "conv0",
                nn.Conv2d(in_channels, num_init_features, kernel_size=7, stride=2, padding=3, bias=False),
            )
            self.features.add_module("norm0", nn.BatchNorm2d(num_init_features))
            self.features.add_module("relu0", nn.ReLU(inplace=True))
            self.features.add_module("pool0", nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
        else:
            self.features.add_module(
                "conv0", nn.Conv2d(in_channels, num_init_features, kernel_size=3, padding=1, bias=False)
            )

        width = num_init_features
        for i, num_layers in enumerate(block_config, start=1):
            self.features.add_module(
                f"denseblock{i}", DenseBlock(num_layers, width, growth_rate, bn_size, drop_rate, efficient, keep)
            )
            width += num_layers * growth_rate
            if i < len(block_config):
                narrowed = int(width * compression)
                if narrowed == 0:
                    raise UserError(
                        f"compression {compression} leaves no channel of the {width} after block {i}; "
                        "use a larger compression or more features"
                    )
                self.features.add_module(f"transition{i}", Transition(width, narrowed, efficient))
                width = narrowed
        self.features.add_module(f"norm{len(block_config) + 1}", nn.BatchNorm2d(width))

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

    def _classifier(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        classifier = nn.Linear(self.num_features, num_classes)
        nn.init.zeros_(classifier.bias)
        return classifier

    def forward(self, x: Tensor) -> Tensor:
        if self._is_plain() and isinstance(x, Tensor):
            self._check_input(x)
            pooled = self.features.pooled(x)
            if pooled is not None:
                return self.classifier(pooled)
        return self.forward_head(self.forward_features(x))

    def _is_plain(self) -> bool:
        """Whether nobody has put something in the place of what `forward` calls."""
        own = (type(self).forward_features, type(self).forward_head)
        if own != (DenseNet.forward_features, DenseNet.forward_head) or not runs(self.features, _Features):
            return False
        here = {"forward_features", "forward_head"} & self.__dict__.keys()
        return not here and self.features._compiled_call_impl is None

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``(N, in_channels, H, W)`` → rectified feature maps ``(N, num_features, H', W')``."""
        if isinstance(x, Tensor):  # not a proxy of torch.fx, of which nothing is known yet
            self._check_input(x)
        # In place only what a norm made, which does not need it again, and nobody looks at.
        last = [self.features, *self.features.children()][-1]
        own = runs(self.features, _Features) and runs(last, _BatchNorm, nn.SyncBatchNorm)
        return F.relu(self.features(x), inplace=own and not has_hooks([self.features, last]))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature maps → logits ``(N, num_classes)``; with `pre_logits` the pooled features ``(N, num_features)``."""
        x = torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)
        return x if pre_logits else self.classifier(x)

    def get_classifier(self) -> nn.Module:
        """The last layer: a linear one, or the identity of a network without classes."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a new one for `num_classes` classes; 0: none, so that features come out."""
        _check_count("num_classes", num_classes, minimum=0)
        old = next(self.parameters())
        self.classifier = self._classifier(num_classes).to(old.device, old.dtype)
        self.num_classes = num_classes

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise UserError(
                f"this network takes images of shape (N, {self.in_channels}, H, W), not {tuple(x.shape)}; for other "
                "images build it with another in_channels"
            )
        if min(x.shape[2:]) < self.min_input_size:
            raise UserError(
                f"images of {x.shape[2]}×{x.shape[3]} pixels are too small for this network, which needs at least "
                f"{self.min_input_size}×{self.min_input_size}: enlarge them, or use fewer blocks or a stem for small "
                "images (input_size up to 32)"
            )


def _as_number(value: object) -> float:
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else float("nan")


def _check_number(name: str, value: object, ok: bool, range_: str) -> None:
    if not ok:
        raise UserError(f"{name} must be a number {range_}, not {value!r}")


def _check_count(name: str, value: object, otherwise: str = "", minimum: int = 1) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
        raise UserError(f"{name} must be a whole number of at least {minimum}{otherwise}, not {value!r}")
