"""What a dense network consists of, as the engine sees it, and why given modules cannot be such parts.

The modules are `Any`: what they must be is checked when they are used, by `obstacle` and `stem_obstacle`, so that
whatever was changed, replaced or hooked since the last call takes effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from efficient_densenet.execution.fused import only_rectifies
from efficient_densenet.execution.hooks import has_hooks, runs

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


class Reader(NamedTuple):
    """A norm–relu–convolution that reads features.

    With `fused`, the norm applies the relu by itself.
    """

    norm: Any
    relu: Any
    conv: Any
    fused: bool = False


class Dropout(NamedTuple):
    """Dropout as it is at this call: no rate in evaluation. Of single values, or of whole channels."""

    rate: float = 0.0
    whole_channels: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        if not self.rate:
            return x
        return torch.feature_dropout(x, self.rate, True) if self.whole_channels else F.dropout(x, self.rate)


class Layer(NamedTuple):
    """A dense layer: its module; its one reader, or two where it has a bottleneck; and dropout behind them."""

    module: Any
    readers: Sequence[Reader]
    dropout: Dropout = Dropout()


class Tail(NamedTuple):
    """What a transition consists of; `fused` as in `Reader`."""

    norm: Any
    relu: Any
    conv: Any
    pool: Any
    fused: bool = False

    @property
    def reader(self) -> Reader:
        return Reader(self.norm, self.relu, self.conv, self.fused)


class Head(NamedTuple):
    """What a network ends with before its classifier: a norm, and behind it relu and the mean over all pixels."""

    norm: Any

    def __call__(self, x: Tensor) -> Tensor:
        """``(N, C, *spatial)`` → ``(N, C)``, the ordinary way."""
        return F.relu(self.norm(x)).mean(tuple(range(2, x.dim())))


class Stem(NamedTuple):
    """What the stem of an ImageNet network ends with; `fused` as in `Reader`."""

    conv: Any
    norm: Any
    relu: Any
    pool: Any
    fused: bool = False


def all_readers(layers: Sequence[Layer], tail: Tail | Head | None) -> list[Reader]:
    """In their order, the transition's last."""
    readers = [reader for layer in layers for reader in layer.readers]
    return [*readers, tail.reader] if isinstance(tail, Tail) else readers


def all_norms(layers: Sequence[Layer], tail: Tail | Head | None) -> list[Any]:
    """In their order, the transition's or the head's last."""
    norms = [reader.norm for reader in all_readers(layers, tail)]
    return [*norms, tail.norm] if isinstance(tail, Head) else norms


def obstacle(layers: Sequence[Layer], tail: Tail | Head | None = None) -> str | None:
    """Why these modules, as they are now, cannot run on the shared buffer; None if they can."""
    for layer in layers:
        if not layer.readers:
            return f"{type(layer.module).__name__} is a layer of another kind"
    if any((len(m.readers), m.dropout) != (len(layers[0].readers), layers[0].dropout) for m in layers):
        return "its layers are not all of one form"
    readers = all_readers(layers, tail)
    inner = [m for reader in readers for m in reader[:3]]
    if tail:
        inner.append(tail.pool if isinstance(tail, Tail) else tail.norm)
    if has_hooks((layer.module for layer in layers), inside=True) or has_hooks(inner):
        return "there are hooks on modules inside it, which must take effect"
    if isinstance(tail, Tail) and (not runs(tail.pool, *AVERAGE_POOLS) or not window(tail.pool)):
        return f"{_in_words(tail.pool)} is not an average pool whose window is its stride"
    for reader in readers:
        reason = _conv_obstacle(reader.conv) or _norm_obstacle(reader.norm, reader.fused) or _relu_obstacle(reader)
        if reason:
            return reason
    reason = _norm_obstacle(tail.norm, False) if isinstance(tail, Head) else None
    return reason or _norms_obstacle(all_norms(layers, tail))


def stem_obstacle(stem: Stem) -> str | None:
    """As `obstacle`, for the stem's norm, relu and max pool; its convolution may be any module."""
    _, norm, relu, pool, fused = stem
    if has_hooks([norm, relu, pool]):
        return "there are hooks on its modules, which must take effect"
    plain = runs(pool, *MAX_POOLS) and not pool.ceil_mode and not pool.return_indices
    if not plain or [_all(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)] != [3, 2, 1, 1]:
        return f"{_in_words(pool)} is not the max pool of a DenseNet's stem"
    return _norm_obstacle(norm, fused) or _relu_obstacle(stem) or _norms_obstacle([norm])


def window(pool: Any) -> int:
    """The window and stride of an average pool without peculiarities, else 0."""
    size = _all(pool.kernel_size)
    divisor = getattr(pool, "divisor_override", None)  # one dimension has none
    plain = _all(pool.stride) == size and _all(pool.padding) == 0 and not pool.ceil_mode and divisor is None
    return size if plain else 0


def _all(sizes: int | Iterable[int]) -> int:
    """The size along every dimension; -1 where they differ."""
    different = {sizes} if isinstance(sizes, int) else set(sizes)
    return different.pop() if len(different) == 1 else -1


def _in_words(module: Any) -> str:
    """On one line."""
    return type(module).__name__ if any(True for _ in module.children()) else str(module)


def _conv_obstacle(conv: Any) -> str | None:
    if not runs(conv, *CONVOLUTIONS):
        return f"{type(conv).__name__} is not a convolution of PyTorch's own"
    same_size = all(k % 2 == 1 and p == k // 2 for p, k in zip(conv.padding, conv.kernel_size, strict=False))
    plain = conv.bias is None and conv.groups == 1 and conv.padding_mode == "zeros"
    if not (plain and same_size and {*conv.stride, *conv.dilation} == {1}):
        return f"{_in_words(conv)} is not a plain convolution that keeps the resolution"
    return None


def _norm_obstacle(norm: Any, fused: bool) -> str | None:
    if fused and not only_rectifies(norm):
        return f"{type(norm).__name__} does not do what a batch norm with ReLU does"
    if not fused and not runs(norm, _BatchNorm, nn.SyncBatchNorm):
        return f"{type(norm).__name__} is not a batch norm of PyTorch's own"
    return None


def _relu_obstacle(part: Reader | Stem) -> str | None:
    return None if runs(part.relu, nn.ReLU) else f"{type(part.relu).__name__} is not ReLU"


def _norms_obstacle(norms: Sequence[Any]) -> str | None:
    groups = {norm.process_group if isinstance(norm, nn.SyncBatchNorm) else None for norm in norms if norm.training}
    kinds = {isinstance(norm, nn.SyncBatchNorm) for norm in norms if norm.training}
    return "some of its norms are synchronised and others are not" if len(kinds) > 1 or len(groups) > 1 else None
