"""One buffer for a whole dense block: a plan and the modules that it names, handed to the engine in `stage`.

What the modules hold is read in `reading`: which statistics a norm uses at this call, for one; `averages` moves the
running ones.

Source: the buffer and the recomputed norm are from Pleiss et al., "Memory-Efficient Implementation of DenseNets", 2017;
statistics once per channel, the correction applied once, and pooling first are derived in docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_densenet.execution.buffers import is_channels_last
from efficient_densenet.execution.plan import Dropout, Plan
from efficient_densenet.execution.profiling import label_backward, labelled
from efficient_densenet.execution.reading import (
    Activations,
    Reading,
    activations,
    are_named,
    arranged,
    named_tensor,
    read,
    sync_group,
)
from efficient_densenet.execution.ready import Ready
from efficient_densenet.execution.recompute import unrecorded
from efficient_densenet.execution.stage_operators import StageArguments, run_stage
from efficient_densenet.execution.stem_operators import StemArguments, run_stem
from efficient_densenet.execution.transforms import is_observed


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
    ``(N, C, *(spatial // pool))``; or, with a head, ``(N, C_0 + Σk)``. Features are laid out in memory as the ordinary
    block's would be, unless the plan has them in another order; what a transition or a stem makes is channels-last.

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
    if torch.compiler.is_compiling() or is_observed():
        ready = None
    kind = activations(x)
    with labelled(label), unrecorded():
        x = x.resolve_neg()  # kernels read memory, and that of ``z.conj().imag`` holds the opposite numbers
        if ready is not None and ready.engine is not None and not (torch.is_grad_enabled() or kind.cast):
            output = ready.run(x, _is_contiguous(plan, channels_last))
        else:
            output = _run(x, plan, modules, keep, channels_last, kind, ready)
            label_backward(output, label)
        return _finished(output, plan, modules, channels_last)


def _run(
    x: Tensor,
    plan: Plan,
    modules: Sequence[nn.Module],
    keep: str,
    channels_last: bool,
    kind: Activations,
    ready: Ready | None,
) -> Tensor:
    """What the engine makes; running averages move, and what later calls can use is left in `ready`."""
    reading = None if ready is None else ready.reading
    if reading is None:
        reading = read(x, plan, modules)
        if ready is not None and ready.owns(reading.tensors) and are_named(plan, modules):
            ready.reading = reading
    x, cast = (x.to(kind.dtype), kind.dtype) if kind.cast else (x, None)
    passes = run_stage if plan.entry is None else run_stem
    arguments = _arguments(x, plan, modules, keep, channels_last, reading)
    checked = ready is not None and ready.reading is reading
    repeats = not (torch.is_grad_enabled() or kind.cast or any(reading.uses_batch))
    if ready is not None and checked and repeats and ready.owns(passes.tensors(arguments)):
        ready.engine = arguments.engine()
    output, statistics, count, *_ = passes(x, arguments, cast, checked)
    reading.averages.move(statistics, count)
    return output


def _arguments(
    x: Tensor, plan: Plan, modules: Sequence[nn.Module], keep: str, channels_last: bool, reading: Reading
) -> StageArguments | StemArguments:
    """Those of the operator."""
    graph = torch.is_grad_enabled()
    # Copies, for a later training step may move the originals.
    constants = [constant.clone() for constant in reading.constants] if graph else reading.constants
    group = sync_group([modules[norm.part] for norm in plan.norms])
    group_name = "" if group is None else group.group_name
    if plan.entry is not None:
        blur = plan.blur
        return StemArguments(
            *reading[:4],
            constants,
            [] if blur is None else [getattr(modules[blur.part], blur.name).to(x.dtype)],
            reading.uses_batch,
            reading.eps,
            *plan.entry,
            *(((), "", ()) if blur is None else blur[2:]),
            group_name,
            keep == "bottleneck" and x.is_cuda,
        )
    masks, scales = _masks(x, plan, modules, channels_last)
    return StageArguments(
        *reading[:4],
        masks,
        constants,
        reading.uses_batch,
        reading.eps,
        [channel for norm in plan.norms for channel in norm.source],
        _is_contiguous(plan, channels_last),
        scales,
        plan.per_layer,
        plan.pool,
        keep if plan.layers and graph else "inputs",  # without layers, the features are the input
        group_name,
    )


def _is_contiguous(plan: Plan, channels_last: bool) -> bool:
    """Whether the engine hands out features contiguous, and not channels-last."""
    return not (channels_last or plan.output)


def _finished(output: Tensor, plan: Plan, modules: Sequence[nn.Module], channels_last: bool) -> Tensor:
    """What is handed out, of what the engine has made."""
    for step in plan.steps:
        if step.function is F.dropout and not (channels_last or makes_channels_last(plan, modules)):
            output = output.contiguous()
        output = step(output)
    return arranged(output, plan.output, 1)


def makes_channels_last(plan: Plan, modules: Sequence[nn.Module]) -> bool:
    """Whether the last convolution makes a channels-last activation of a contiguous one, in the ordinary network."""
    if not plan.convolutions:
        return False
    part, (name, _), *_ = plan.convolutions[-1]
    weight = named_tensor(modules[part], name)
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
    if channels_last and not dropout.whole_channels:
        ones = ones.movedim(1, -1).contiguous().movedim(-1, 1)
    return dropout.step()(ones) != 0
