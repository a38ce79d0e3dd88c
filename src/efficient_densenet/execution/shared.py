"""One buffer for a whole dense block: what modules hold, handed to the engine in `stage`.

The semantics of batch norm live here: which statistics a norm uses at this call, and how its running averages move.
Everything is read from the modules at the time of the call, so that freezing, converting to SyncBatchNorm or replacing
a part later takes effect.

Source: the buffer and the recomputed norm are from Pleiss et al., "Memory-Efficient Implementation of DenseNets", 2017;
statistics once per channel, the correction applied once, and pooling first are derived in docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efficient_densenet.execution.hooks import has_hooks, runs
from efficient_densenet.execution.library import norm_relu_max_pool_forward, stage_forward
from efficient_densenet.execution.parts import (
    CONVOLUTIONS,
    Dropout,
    Head,
    Layer,
    Stem,
    Tail,
    all_norms,
    all_readers,
    window,
)
from efficient_densenet.execution.recompute import forgotten
from efficient_densenet.execution.stage import sources

KEEP = ("bottleneck", "features", "inputs")


def dense_block(x: Tensor, layers: Sequence[Layer], tail: Tail | Head | None, keep: str) -> Tensor:
    """Run a dense block, and the transition or the head behind it if there is one, on one buffer.

    Shapes: ``(N, C_0, *spatial)`` → ``(N, C_0 + Σk, *spatial)``, the block's features; or, with a transition,
    ``(N, C, *(spatial // pool))``; or, with a head, ``(N, C_0 + Σk)``. The result is channels-last in memory.

    Kept for backward, besides the small statistics: ``keep="bottleneck"`` the features and the bottleneck outputs,
    ``"features"`` the features alone, ``"inputs"`` only `x`; but the features too where no transition follows, which
    somebody else or the head needs. Gradients of gradients are refused.

    Args:
        x: the block's input.
        layers: without obstacles, see `parts.obstacle`; there may be none if there is a transition.
        tail: norm, relu, 1×1 convolution and average pool behind the block; or norm, relu and the mean over all pixels.
        keep: one of `KEEP`.
    """
    norms = all_norms(layers, tail)
    x, weights = _autocast(x, [reader.conv.weight for reader in all_readers(layers, tail)])
    uses_batch = [_uses_batch(norm) for norm in norms]
    group = _sync_group(norms)
    if any(uses_batch):
        _check_values_per_channel(x, group)
    dropout, per_layer = (layers[0].dropout, len(layers[0].readers)) if layers else (Dropout(), 1)
    made = [weight.shape[0] for weight in weights[: per_layer * len(layers)]]
    last_weights = weights[per_layer - 1 : len(made) : per_layer]
    output, statistics, count, *_ = stage_forward(
        x,
        [_affine(norm.weight, norm, x, 1.0) for norm in norms],
        [_affine(norm.bias, norm, x, 0.0) for norm in norms],
        _constants(norms, uses_batch),
        uses_batch,
        [norm.eps for norm in norms],
        weights,
        [_dropout_mask(x, weight, dropout) for weight in last_weights] if dropout.rate else [],
        1 / (1 - dropout.rate),
        per_layer,
        window(tail.pool) if isinstance(tail, Tail) else 0,
        keep if layers and torch.is_grad_enabled() else "inputs",  # without layers, the features are the input
        "" if group is None else group.group_name,
    )
    _move_running_averages(norms, sources(x.shape[1], made, per_layer, tail is not None), statistics, count)
    return output


def stem(x: Tensor, parts: Stem, keep: str) -> Tensor:
    """The stem of an ImageNet network: a convolution, and `norm_relu_max_pool` of what it makes.

    Kept for backward: the convolution's input and output; with ``keep="inputs"`` the input alone.
    """
    x, conv = _channels_last(x), parts.conv
    # A compiler decides by itself what to compute again.
    forget = keep == "inputs" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not forget or has_hooks([conv]) or not runs(conv, *CONVOLUTIONS):
        return norm_relu_max_pool(conv(x), parts.norm)
    with forgotten(conv, x) as made:
        return norm_relu_max_pool(made, parts.norm)


def norm_relu_max_pool(x: Tensor, norm: Any) -> Tensor:
    """The stem's norm, relu and max pool (window 3, stride 2, padding 1), keeping `x` alone for backward.

    Shapes: ``(N, C, *spatial)`` → ``(N, C, *⌈spatial/2⌉)``, channels-last in memory.
    """
    group = _sync_group([norm])
    uses_batch = _uses_batch(norm)
    if uses_batch:
        _check_values_per_channel(x, group)
    output, statistics, count, _ = norm_relu_max_pool_forward(
        x,
        _affine(norm.weight, norm, x, 1.0),
        _affine(norm.bias, norm, x, 0.0),
        _constants([norm], [uses_batch]),
        norm.eps,
        "" if group is None else group.group_name,
    )
    _move_running_averages([norm], [slice(None)], statistics, count)
    return output


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


def _dropout_mask(x: Tensor, weight: Tensor, dropout: Dropout) -> Tensor:
    """True where a value stays, drawn as dropout draws it for the output of the convolution with this weight.

    Single values are drawn in the order of the memory. Features are always channels-last here; in the ordinary network
    they are as the weights are, which ``network.to(memory_format=...)`` decides.
    """
    size = [1] * (x.dim() - 2) if dropout.whole_channels else x.shape[2:]
    ones = torch.ones((x.shape[0], weight.shape[0], *size), dtype=x.dtype, device=x.device)
    if not dropout.whole_channels and _is_channels_last(weight):
        ones = _channels_last(ones)
    return dropout(ones) != 0


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()


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
def _move_running_averages(norms: Sequence[Any], read: Sequence[slice], statistics: Tensor, count: Tensor) -> None:
    """As batch norms do it: by the mean and the unbiased variance of the batch, once per call in training.

    Those with one momentum all at once: one by one, it takes longer to start than to do.
    """
    moving = [
        (norm, source)
        for norm, source in zip(norms, read, strict=True)
        if norm.training and norm.track_running_stats and norm.running_mean is not None
    ]
    if not moving:
        return
    mean, variance = statistics[0], statistics[1] * (count / (count - 1))
    # A norm that reads in several places moves once for each, one after the other.
    rounds: list[dict[Any, slice]] = []
    for norm, source in moving:
        free = next((some for some in rounds if norm not in some), None)
        if free is None:
            rounds.append(free := {})
        free[norm] = source
    for some in rounds:
        _move_once(some, mean, variance)


def _move_once(norms: dict[Any, slice], mean: Tensor, variance: Tensor) -> None:
    """The running averages of norms that are all different, each by the statistics of the channels that it reads."""
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    if counts:
        torch._foreach_add_(counts, 1)
    together: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for norm, source in norms.items():
        averages, dtype = [norm.running_mean, norm.running_var], norm.running_mean.dtype
        batch = [mean[source].to(dtype), variance[source].to(dtype)]
        if norm.momentum is None:  # a cumulative average
            weight = 1.0 / norm.num_batches_tracked.to(dtype)
            for average, value in zip(averages, batch, strict=True):
                average.lerp_(value, weight)
        else:
            all_averages, all_values = together.setdefault(norm.momentum, ([], []))
            all_averages += averages
            all_values += batch
    for momentum, (all_averages, all_values) in together.items():
        torch._foreach_lerp_(all_averages, all_values, momentum)
