"""One buffer for a whole dense block: what modules hold, handed to the engine in `stage`.

The semantics of batch norm live here: which statistics a norm uses at this call, and how its running averages move.
Everything is read from the modules at the time of the call, so that freezing, converting to SyncBatchNorm or replacing
a part later takes effect.

Source: the buffer and the recomputed norm are from Pleiss et al., "Memory-Efficient Implementation of DenseNets", 2017;
statistics once per channel, the correction applied once, and pooling first are derived in docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.utils import _pair

from efficient_densenet.execution.hooks import has_hooks, runs
from efficient_densenet.execution.library import norm_relu_max_pool_forward, stage_forward
from efficient_densenet.execution.recompute import forgotten
from efficient_densenet.ops.reference import Statistics

KEEP = ("bottleneck", "features", "inputs")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


# The modules are `Any`: what they must be is checked when they are used, by `obstacle`.


class Reader(NamedTuple):
    """A norm–relu–convolution that reads features."""

    norm: Any
    relu: Any
    conv: Any


class Layer(NamedTuple):
    """A dense layer: its module; its one reader, or two where it has a bottleneck; its dropout, 0 in evaluation."""

    module: Any
    readers: Sequence[Reader]
    drop_rate: float = 0.0


class Tail(NamedTuple):
    """What a transition consists of."""

    norm: Any
    relu: Any
    conv: Any
    pool: Any


def dense_block(x: Tensor, layers: Sequence[Layer], transition: Tail | None, keep: str) -> Tensor:
    """Run a dense block, and the transition behind it if there is one, on one buffer.

    Shapes: ``(N, C_0, *spatial)`` → ``(N, C_0 + Σk, *spatial)``, the block's features; or, with a transition,
    ``(N, C, *(spatial // pool))``. The result is channels-last in memory.

    Kept for backward, besides the small statistics: ``keep="bottleneck"`` the features and the bottleneck outputs,
    ``"features"`` the features alone, ``"inputs"`` only `x`. Gradients of gradients are refused.

    Args:
        x: the block's input.
        layers: without obstacles, see `obstacle`.
        transition: norm, relu, 1×1 convolution and average pool behind the block.
        keep: one of `KEEP`.
    """
    readers = _all_readers(layers, transition)
    norms = [reader.norm for reader in readers]
    x, weights = _autocast(x, [reader.conv.weight for reader in readers])
    uses_batch = [_uses_batch(norm) for norm in norms]
    group = _sync_group(norms)
    if any(uses_batch):
        _check_values_per_channel(x, group)
    drop_rate, per_layer = layers[0].drop_rate, len(layers[0].readers)
    made = per_layer * len(layers)
    output, mean, variance, count, *rest = stage_forward(
        x,
        [_affine(norm.weight, norm, x, 1.0) for norm in norms],
        [_affine(norm.bias, norm, x, 0.0) for norm in norms],
        _constants(norms, uses_batch),
        uses_batch,
        [norm.eps for norm in norms],
        weights,
        [_dropout_mask(x, weight, drop_rate) for weight in weights[per_layer - 1 : made : per_layer]]
        if drop_rate
        else [],
        1 / (1 - drop_rate),
        per_layer,
        _window(transition.pool) if transition else 0,
        keep if torch.is_grad_enabled() else "inputs",
        "" if group is None else group.group_name,
    )
    middles = list(zip(rest[::2], rest[1::2], strict=False))
    for i, norm in enumerate(norms):
        layer, position = divmod(i, per_layer)
        batch = (mean[: norm.num_features], variance[: norm.num_features]) if position == 0 else middles[layer]
        _move_running_averages(norm, batch, count)
    return output


def stem(x: Tensor, conv: Any, norm: Any, keep: str) -> Tensor:
    """The stem of an ImageNet network: `conv`, and `norm_relu_max_pool` of what it makes.

    Kept for backward: the convolution's input and output; with ``keep="inputs"`` the input alone.
    """
    # A compiler decides by itself what to compute again.
    if keep != "inputs" or not torch.is_grad_enabled() or torch.compiler.is_compiling() or has_hooks([conv]):
        return norm_relu_max_pool(conv(x), norm)
    with forgotten(conv, x) as made:
        return norm_relu_max_pool(made, norm)


def norm_relu_max_pool(x: Tensor, norm: Any) -> Tensor:
    """The stem's norm, relu and max pool (window 3, stride 2, padding 1), keeping `x` alone for backward.

    Shapes: ``(N, C, H, W)`` → ``(N, C, ⌈H/2⌉, ⌈W/2⌉)``, channels-last in memory.
    """
    group = _sync_group([norm])
    uses_batch = _uses_batch(norm)
    if uses_batch:
        _check_values_per_channel(x, group)
    output, mean, variance, count = norm_relu_max_pool_forward(
        x,
        _affine(norm.weight, norm, x, 1.0),
        _affine(norm.bias, norm, x, 0.0),
        _constants([norm], [uses_batch]),
        norm.eps,
        "" if group is None else group.group_name,
    )
    _move_running_averages(norm, (mean, variance), count)
    return output


def obstacle(layers: Sequence[Layer], transition: Tail | None = None) -> str | None:
    """Why these modules, as they are now, cannot run on the shared buffer; None if they can."""
    for layer in layers:
        if not layer.readers:
            return f"{type(layer.module).__name__} is a layer of another kind"
    if any((len(m.readers), m.drop_rate) != (len(layers[0].readers), layers[0].drop_rate) for m in layers):
        return "its layers are not all of one form"
    readers = _all_readers(layers, transition)
    inner = [m for reader in readers for m in reader]
    outer = [layer.module for layer in layers] + ([transition.pool] if transition else [])
    if has_hooks([*outer, *inner]):
        return "there are hooks on modules inside it, which must take effect"
    if transition is not None and (not runs(transition.pool, *_AVERAGE_POOLS) or not _window(transition.pool)):
        return f"{transition.pool} is not an average pool whose window is its stride"
    for reader in readers:
        reason = _conv_obstacle(reader.conv) or _pair_obstacle(reader.norm, reader.relu)
        if reason:
            return reason
    return _norms_obstacle([reader.norm for reader in readers])


def stem_obstacle(norm: Any, relu: Any, pool: Any) -> str | None:
    """As `obstacle`, for the stem's norm, relu and max pool."""
    if has_hooks([norm, relu, pool]):
        return "there are hooks on its modules, which must take effect"
    window = (pool.kernel_size, pool.stride, pool.padding, pool.dilation) if runs(pool, nn.MaxPool2d) else None
    if window != (3, 2, 1, 1) or pool.ceil_mode or pool.return_indices:
        return f"{pool} is not the max pool of a DenseNet's stem"
    return _pair_obstacle(norm, relu) or _norms_obstacle([norm])


def _all_readers(layers: Sequence[Layer], transition: Tail | None) -> list[Reader]:
    readers = [reader for layer in layers for reader in layer.readers]
    return readers if transition is None else [*readers, Reader(*transition[:3])]


def _window(pool: Any) -> int:
    """The window and stride of an average pool without peculiarities, else 0."""
    sizes = {*_pair(pool.kernel_size), *_pair(pool.stride)}
    divisor = getattr(pool, "divisor_override", None)  # one dimension has none
    plain = len(sizes) == 1 and {*_pair(pool.padding)} == {0} and not pool.ceil_mode and divisor is None
    return sizes.pop() if plain else 0


def _conv_obstacle(conv: Any) -> str | None:
    if not runs(conv, *_CONVOLUTIONS):
        return f"{type(conv).__name__} is not a convolution of PyTorch's own"
    same_size = all(k % 2 == 1 and p == k // 2 for p, k in zip(conv.padding, conv.kernel_size, strict=False))
    plain = conv.bias is None and conv.groups == 1 and conv.padding_mode == "zeros"
    if not (plain and same_size and {*conv.stride, *conv.dilation} == {1}):
        return f"{conv} is not a plain convolution that keeps the resolution"
    return None


def _pair_obstacle(norm: Any, relu: Any) -> str | None:
    if not runs(norm, _BatchNorm, nn.SyncBatchNorm):
        return f"{type(norm).__name__} is not a batch norm of PyTorch's own"
    if not runs(relu, nn.ReLU):
        return f"{type(relu).__name__} is not ReLU"
    return None


def _norms_obstacle(norms: Sequence[Any]) -> str | None:
    groups = {norm.process_group if isinstance(norm, nn.SyncBatchNorm) else None for norm in norms if norm.training}
    kinds = {isinstance(norm, nn.SyncBatchNorm) for norm in norms if norm.training}
    return "some of its norms are synchronised and others are not" if len(kinds) > 1 or len(groups) > 1 else None


def _uses_batch(norm: Any) -> bool:
    return norm.training or norm.running_mean is None


def _check_values_per_channel(x: Tensor, group: torch.distributed.ProcessGroup | None) -> None:
    if group is None and x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def _autocast(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """In the type that autocast asks for, as it would cast a convolution's arguments."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weights
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), [w.to(dtype) for w in weights]


def _affine(parameter: Tensor | None, norm: Any, x: Tensor, otherwise: float) -> Tensor:
    if parameter is not None:
        return parameter
    return torch.full((norm.num_features,), otherwise, dtype=x.dtype, device=x.device)


def _constants(norms: Sequence[Any], uses_batch: Sequence[bool]) -> list[Tensor]:
    """Running means and variances where they are used; copies, for a later training step may move the originals."""
    pairs = [(n.running_mean, n.running_var) for n, batch in zip(norms, uses_batch, strict=True) if not batch]
    return [t.clone() if torch.is_grad_enabled() else t for pair in pairs for t in pair]


def _dropout_mask(x: Tensor, weight: Tensor, drop_rate: float) -> Tensor:
    """True where a value stays, drawn as ``F.dropout`` draws it for the output of the convolution with this weight.

    It draws in the order of the memory. Features are always channels-last here; in the ordinary network they are as
    the weights are, which ``network.to(memory_format=...)`` decides.
    """
    ones = torch.ones((x.shape[0], weight.shape[0], *x.shape[2:]), dtype=x.dtype, device=x.device)
    if weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        ones = ones.contiguous(memory_format=torch.channels_last)
    return F.dropout(ones, drop_rate) != 0


def _sync_group(norms: Sequence[Any]) -> torch.distributed.ProcessGroup | None:
    """The processes that share their statistics, if any do."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    for norm in norms:
        if isinstance(norm, nn.SyncBatchNorm) and norm.training:
            group = norm.process_group or torch.distributed.distributed_c10d._get_default_group()
            return group if group.size() > 1 else None
    return None


@torch.no_grad()
def _move_running_averages(norm: Any, batch: Statistics, count: Tensor) -> None:
    """As a batch norm does it: by the mean and the unbiased variance of the batch, once per call in training."""
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None:
        return
    norm.num_batches_tracked.add_(1)
    mean, variance = batch[0], batch[1] * (count / (count - 1))
    weight = norm.momentum
    if weight is None:  # a cumulative average
        weight = 1.0 / norm.num_batches_tracked.to(norm.running_mean.dtype)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), weight)
