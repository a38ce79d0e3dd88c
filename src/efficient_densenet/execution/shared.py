"""One buffer for a whole dense block: a plan and the modules that it names, handed to the engine in `stage`.

The semantics of batch norm live here: which statistics a norm uses at this call, and how its running averages move.

Source: the buffer and the recomputed norm are from Pleiss et al., "Memory-Efficient Implementation of DenseNets", 2017;
statistics once per channel, the correction applied once, and pooling first are derived in docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_densenet.execution.buffers import is_channels_last
from efficient_densenet.execution.library import StageArguments, run_stage, stage_forward
from efficient_densenet.execution.operators import cast_together, is_observed
from efficient_densenet.execution.plan import Dropout, Norm, Plan, Ranges
from efficient_densenet.execution.profiling import label_backward, labelled
from efficient_densenet.execution.ready import Ready
from efficient_densenet.execution.recompute import unrecorded
from efficient_densenet.execution.stem_library import StemArguments, run_stem, stem_forward

# Found here, for PyTorch 2.11 cannot compile the question.
_WITH_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(device)
)


def run(
    x: Tensor,
    plan: Plan,
    modules: Sequence[nn.Module],
    keep: str,
    channels_last: bool = False,
    name: str = "",
    ready: Ready | None = None,
) -> Tensor:
    """Run what `plan` describes on one buffer.

    Shapes: ``(N, C_0, *spatial)`` → ``(N, C_0 + Σk, *spatial)``, the block's features; or, with a transition,
    ``(N, C, *(spatial // pool))``; or, with a head, ``(N, C_0 + Σk)``. The result is channels-last in memory.

    Kept for backward, besides the small statistics: ``keep="bottleneck"`` the features and the bottleneck outputs,
    ``"features"`` the features alone, ``"inputs"`` only `x`; but the features too where no transition follows, which
    somebody else or the head needs. A stem keeps `x`, see `stem`. Gradients of gradients are refused.

    Args:
        x: its input.
        plan: see `Plan`.
        modules: those that it names, in the order of `plan.parts`.
        keep: one of `KEEP`.
        channels_last: whether `x` would be so in the ordinary network: dropout draws in the order of the memory.
        name: what a profiler's trace calls it.
        ready: what earlier calls with the same modules have left.
    """
    label = f"{name}: shared buffer, keep={keep}"
    with labelled(label), unrecorded():
        return _run(x, plan, modules, keep, channels_last, label, ready)


def _run(
    x: Tensor,
    plan: Plan,
    modules: Sequence[nn.Module],
    keep: str,
    channels_last: bool,
    label: str,
    ready: Ready | None,
) -> Tensor:
    compiling = torch.compiler.is_compiling()
    if compiling or torch.is_grad_enabled() or casts_automatically(x) or is_observed():
        ready = None
    contiguous = not (channels_last or plan.output)
    if ready is not None and ready.engine is not None:
        return _finished(ready.run(x, contiguous), plan, modules, channels_last)
    x, weights, biases = _convolutions(x, plan, modules)
    norms = _norms(x, plan, modules)
    if ready is not None and (any(norms.uses_batch) or not _are_held(plan, modules)):
        ready = None
    if plan.entry is not None:
        blur = plan.blur
        of_stem = StemArguments(
            norms.weights,
            norms.biases,
            weights,
            biases,
            norms.constants,
            [] if blur is None else [getattr(modules[blur.part], blur.name).to(x.dtype)],
            norms.uses_batch,
            norms.eps,
            *plan.entry,
            *(((), "", ()) if blur is None else blur[2:]),
            norms.group,
            keep == "bottleneck" and x.is_cuda,
        )
        if ready is not None and ready.owns(run_stem.tensors(of_stem)):
            ready.engine = of_stem.stem()
        output, statistics, count, *_ = stem_forward(x, *of_stem) if compiling else run_stem(x, of_stem)
        label_backward(output, label)
        _move_running_averages(norms.moving, statistics, count)
        return output
    masks, scales = _masks(x, plan, modules, channels_last)
    arguments = StageArguments(
        norms.weights,
        norms.biases,
        weights,
        biases,
        masks,
        norms.constants,
        norms.uses_batch,
        norms.eps,
        [channel for norm in plan.norms for channel in norm.source],
        contiguous,
        scales,
        plan.per_layer,
        plan.pool,
        keep if plan.layers and torch.is_grad_enabled() else "inputs",  # without layers, the features are the input
        norms.group,
    )
    if ready is not None and ready.owns(run_stage.tensors(arguments)):
        ready.engine = arguments.stage()
    output, statistics, count, *_ = stage_forward(x, *arguments) if compiling else run_stage(x, arguments)
    label_backward(output, label)
    _move_running_averages(norms.moving, statistics, count)
    return _finished(output, plan, modules, channels_last)


def _finished(output: Tensor, plan: Plan, modules: Sequence[nn.Module], channels_last: bool) -> Tensor:
    """What is handed out, of what the engine has made."""
    for step in plan.steps:
        if step.function is F.dropout and not (channels_last or makes_channels_last(plan, modules)):
            output = output.contiguous()
        output = step(output)
    return _arranged(output, plan.output, 1)


def _convolutions(x: Tensor, plan: Plan, modules: Sequence[nn.Module]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The input, and weights and biases of all convolutions, in the type that autocast asks for."""
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for part, (weight_name, bias_name), order, dilation in plan.convolutions:
        weight = getattr(modules[part], weight_name)
        if order:
            weight = _arranged(weight, order, 1)
        weights.append(_dilated(weight, dilation) if dilation else weight)
        biases.append(None if bias_name is None else getattr(modules[part], bias_name))
    given = []
    if any(bias is not None for bias in biases):
        given = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
    if casts_automatically(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, cast = x.to(dtype), cast_together([*weights, *given], dtype)
        weights, given = cast[: len(weights)], cast[len(weights) :]
    return x, weights, given


def casts_automatically(x: Tensor) -> bool:
    """Whether autocast would cast the arguments of a convolution of `x`."""
    device = x.device.type
    return device in _WITH_AUTOCAST and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def takes_types(x: Tensor, plan: Plan, modules: Sequence[nn.Module]) -> bool:
    """Whether the ordinary convolutions and norms take tensors of these types, for activations that begin with `x`."""
    casts = casts_automatically(x)
    activations = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
    for part, names, *_ in plan.convolutions:
        held = [_held(modules[part], name) for name in names]
        if not casts and any(tensor is not None and tensor.dtype != x.dtype for tensor in held):
            return False
    for norm in plan.norms:
        held = [_held(modules[norm.part], name) for name in norm.names]
        types = {tensor.dtype for tensor in held if tensor is not None}
        single = types == {torch.float32} and activations in (torch.float16, torch.bfloat16)
        if types and not single and types != {activations}:
            return False
    return True


def _are_held(plan: Plan, modules: Sequence[nn.Module]) -> bool:
    """Whether all tensors are found by their names, and not by a property, which may find another at the next call."""
    named = [
        *[(part, names) for part, names, *_ in plan.convolutions],
        *[(norm.part, norm.names) for norm in plan.norms],
    ]
    return all(
        getattr(modules[part], name, None) is _held(modules[part], name)
        for part, names in named
        for name in names
        if name is not None
    )


def _held(module: nn.Module, name: Any) -> Tensor | None:
    """A tensor of a module; None where it is computed. That of a replica is a plain attribute."""
    own = vars(module)
    return own["_parameters"].get(name, own["_buffers"].get(name, own.get(name)))


def _arranged(x: Tensor, order: Ranges, dim: int) -> Tensor:
    """The pieces of `x` along `dim` in this order."""
    if not order:
        return x
    pieces = [x.narrow(dim, start, count) for start, count in order]
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]


def _dilated(weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """The weight with zeros between its taps, which the operations need not know of."""
    size = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    wide = weight.new_zeros((*weight.shape[:2], *size))
    taps: tuple[Any, ...] = (..., *[slice(None, None, d) for d in dilation])
    wide[taps] = weight
    return wide


class _Norms(NamedTuple):
    """What the engine needs of the norms at this call, and how their running averages will move."""

    weights: list[Tensor]
    biases: list[Tensor]
    constants: list[Tensor]
    uses_batch: list[bool]
    eps: list[float]
    moving: list[_Moving]
    group: str


class _Moving(NamedTuple):
    """The running averages of a norm that follow the statistics of the channels that it reads."""

    norm: Norm
    mean: Tensor
    variance: Tensor
    tracked: Tensor | None
    momentum: float | None


def _norms(x: Tensor, plan: Plan, modules: Sequence[nn.Module]) -> _Norms:
    found = _Norms([], [], [], [], [], [], "")
    for norm in plan.norms:
        module: Any = modules[norm.part]
        tensors: list[Any] = [None if name is None else getattr(module, name) for name in norm.names]
        start, stop = norm.source
        for into, tensor, otherwise in zip(found[:2], tensors[:2], (1.0, 0.0), strict=True):
            if tensor is None:
                tensor = torch.full((stop - start,), otherwise, dtype=x.dtype, device=x.device)
            into.append(_arranged(tensor, norm.order, 0) if norm.order else tensor)
        mean, variance = tensors[2:]
        training = module.training and not norm.frozen
        uses_batch = training or mean is None
        found.uses_batch.append(uses_batch)
        found.eps.append(module.eps if norm.eps is None else norm.eps)
        if not uses_batch:
            for tensor in (mean, variance):
                # A copy, for a later training step may move the original.
                tensor = tensor.clone() if torch.is_grad_enabled() else tensor
                found.constants.append(_arranged(tensor, norm.order, 0))
        elif training and mean is not None:
            if norm.momentum is not None:
                found.moving.append(_Moving(norm, mean, variance, None, norm.momentum))
            elif module.track_running_stats:
                found.moving.append(_Moving(norm, mean, variance, module.num_batches_tracked, module.momentum))
    group = sync_group([modules[norm.part] for norm in plan.norms])
    return found._replace(group="" if group is None else group.group_name)


def sync_group(modules: Sequence[Any]) -> torch.distributed.ProcessGroup | None:
    """The processes that share the statistics of the norms among these modules, if any do."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    for module in modules:
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            group = module.process_group or torch.distributed.distributed_c10d._get_default_group()
            return group if group.size() > 1 else None
    return None


def makes_channels_last(plan: Plan, modules: Sequence[nn.Module]) -> bool:
    """Whether the last convolution makes a channels-last activation of a contiguous one, in the ordinary network."""
    if not plan.convolutions:
        return False
    part, (name, _), *_ = plan.convolutions[-1]
    weight = _held(modules[part], name)
    return weight is not None and is_channels_last(weight)


def _masks(
    x: Tensor, plan: Plan, modules: Sequence[nn.Module], channels_last: bool
) -> tuple[list[Tensor], list[float]]:
    """For each layer where dropout leaves values, and by what it multiplies them; nothing without dropout."""
    if not any(plan.dropouts):
        return [], []
    last = plan.convolutions[plan.per_layer - 1 : plan.layers * plan.per_layer : plan.per_layer]
    masks, scales = [], []
    for convolution, dropouts in zip(last, plan.dropouts, strict=True):
        weight = getattr(modules[convolution.part], convolution.names[0])
        mask, scale = torch.ones([1] * x.dim(), dtype=torch.bool, device=x.device), 1.0
        for dropout in dropouts:
            mask = mask & _mask(x, weight, dropout, channels_last or is_channels_last(weight))
            scale *= 1 / (1 - dropout.rate) if dropout.rate < 1 else 0.0
        masks.append(mask)
        scales.append(scale)
    return masks, scales


def _mask(x: Tensor, weight: Tensor, dropout: Dropout, channels_last: bool) -> Tensor:
    """True where a value stays, drawn as dropout draws it for the output of the convolution with this weight.

    Single values are drawn in the order of the memory.
    """
    size = [1] * (x.dim() - 2) if dropout.whole_channels else x.shape[2:]
    ones = torch.ones((x.shape[0], weight.shape[0], *size), dtype=x.dtype, device=x.device)
    if dropout.whole_channels:
        return torch.feature_dropout(ones, dropout.rate, True) != 0
    if channels_last:
        ones = ones.movedim(1, -1).contiguous().movedim(-1, 1)
    return F.dropout(ones, dropout.rate) != 0


@torch.no_grad()
def _move_running_averages(moving: Sequence[_Moving], statistics: Tensor, count: Tensor) -> None:
    """As batch norms do it: by the mean and the unbiased variance of the batch, once per call in training.

    Those with one momentum all at once: one by one, it takes longer to start than to do.
    """
    if not moving:
        return
    mean, variance = statistics[0], statistics[1] * (count / (count - 1))
    # A norm that reads in several places moves once for each, one after the other.
    rounds: list[dict[int, _Moving]] = []
    for one in moving:
        for some in rounds:
            if one.norm.part not in some:
                some[one.norm.part] = one
                break
        else:
            rounds.append({one.norm.part: one})
    for some in rounds:
        _move_once(list(some.values()), mean, variance)


def _move_once(moving: Sequence[_Moving], mean: Tensor, variance: Tensor) -> None:
    """The running averages of norms that are all different, each by the statistics of the channels that it reads."""
    counts = [one.tracked for one in moving if one.tracked is not None]
    if counts:
        torch._foreach_add_(counts, 1)
    together: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for norm, running_mean, running_variance, tracked, momentum in moving:
        start, stop = norm.source
        averages, dtype = [running_mean, running_variance], running_mean.dtype
        batch = [mean[start:stop].to(dtype), variance[start:stop].to(dtype)]
        if norm.order:
            batch = [_restored(values, norm.order) for values in batch]
        if momentum is None:  # a cumulative average
            assert tracked is not None
            weight = 1.0 / tracked.to(dtype)
            for average, value in zip(averages, batch, strict=True):
                average.lerp_(value, weight)
        else:
            all_averages, all_values = together.setdefault(momentum, ([], []))
            all_averages += averages
            all_values += batch
    for momentum, (all_averages, all_values) in together.items():
        torch._foreach_lerp_(all_averages, all_values, momentum)


def _restored(values: Tensor, order: Ranges) -> Tensor:
    """The inverse of `_arranged`, of a vector."""
    pieces = values.split([count for _, count in order])
    return torch.cat([piece for _, piece in sorted(zip(order, pieces, strict=True), key=lambda both: both[0])])
