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
from efficient_densenet.execution.casts import cast_one_by_one
from efficient_densenet.execution.library import StageArguments, run_stage, stage_forward
from efficient_densenet.execution.operators import Passes
from efficient_densenet.execution.plan import Dropout, Plan
from efficient_densenet.execution.profiling import label_backward, labelled
from efficient_densenet.execution.reading import (
    activations,
    are_named,
    arranged,
    named_tensor,
    read,
    sync_group,
)
from efficient_densenet.execution.ready import Ready
from efficient_densenet.execution.recompute import unrecorded
from efficient_densenet.execution.stem_library import StemArguments, run_stem, stem_forward
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
    compiling, graph, kind = torch.compiler.is_compiling(), torch.is_grad_enabled(), activations(x)
    if compiling or is_observed():
        ready = None
    x = x.resolve_neg()  # kernels read memory, and that of ``z.conj().imag`` holds the opposite numbers
    contiguous = not (channels_last or plan.output)
    if ready is not None and ready.engine is not None and not (graph or kind.cast):
        return _finished(ready.run(x, contiguous), plan, modules, channels_last)
    found = None if ready is None else ready.reading
    if found is None:
        found = read(x, plan, modules)
        if ready is not None and ready.owns(found.tensors) and are_named(plan, modules):
            ready.reading = found
    x, cast = (x.to(kind.dtype), kind.dtype) if kind.cast else (x, None)
    # Copies, for a later training step may move the originals.
    constants = [constant.clone() for constant in found.constants] if graph else found.constants
    group = sync_group([modules[norm.part] for norm in plan.norms])
    group_name = "" if group is None else group.group_name
    passes: Passes
    arguments: StemArguments | StageArguments
    if plan.entry is not None:
        passes, operator, blur = run_stem, stem_forward, plan.blur
        arguments = StemArguments(
            *found[:4],
            constants,
            [] if blur is None else [getattr(modules[blur.part], blur.name).to(x.dtype)],
            found.uses_batch,
            found.eps,
            *plan.entry,
            *(((), "", ()) if blur is None else blur[2:]),
            group_name,
            keep == "bottleneck" and x.is_cuda,
        )
    else:
        passes, operator = run_stage, stage_forward
        masks, scales = _masks(x, plan, modules, channels_last)
        arguments = StageArguments(
            *found[:4],
            masks,
            constants,
            found.uses_batch,
            found.eps,
            [channel for norm in plan.norms for channel in norm.source],
            contiguous,
            scales,
            plan.per_layer,
            plan.pool,
            keep if plan.layers and graph else "inputs",  # without layers, the features are the input
            group_name,
        )
    checked = ready is not None and ready.reading is found
    repeats = not (graph or kind.cast or any(found.uses_batch))
    if ready is not None and checked and repeats and ready.owns(passes.tensors(arguments)):
        ready.engine = arguments.engine()
    made = operator(x, *cast_one_by_one(arguments, cast)) if compiling else passes(x, arguments, cast, checked)
    output, statistics, count, *_ = made
    label_backward(output, label)
    found.averages.move(statistics, count)
    return _finished(output, plan, modules, channels_last)


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
