"""What the engine needs of the modules that a plan names, as they are at a call.

Which statistics a norm uses at this call, and whether its running averages move, is decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from efficient_densenet.execution.averages import Moving, RunningAverages
from efficient_densenet.execution.plan import Plan, Ranges

# Asked once, at import: `torch.compile` of PyTorch 2.11 cannot trace this call.
_WITH_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(device)
)


class Reading(NamedTuple):
    """What the engine needs of the modules: tensors first, as in `StageArguments`.

    Attributes:
        constants, uses_batch, eps: as there.
        averages: the running averages that will move.
    """

    norm_weights: list[Tensor]
    norm_biases: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor]
    constants: list[Tensor]
    uses_batch: list[bool]
    eps: list[float]
    averages: RunningAverages

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All but the running averages."""
        return chain.from_iterable(self[:5])


def read(x: Tensor, plan: Plan, modules: Sequence[nn.Module]) -> Reading:
    """Read it off the modules of a plan, for activations that begin with `x`."""
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for part, (weight_name, bias_name), order, dilation in plan.convolutions:
        weight = getattr(modules[part], weight_name)
        if order:
            weight = arranged(weight, order, 1)
        weights.append(_dilated(weight, dilation) if dilation else weight)
        biases.append(None if bias_name is None else getattr(modules[part], bias_name))
    given = []
    if any(bias is not None for bias in biases):
        given = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
    norm_weights: list[Tensor] = []
    norm_biases: list[Tensor] = []
    constants: list[Tensor] = []
    by_batch: list[bool] = []
    eps: list[float] = []
    moving: list[Moving] = []
    for norm in plan.norms:
        module: Any = modules[norm.part]
        tensors: list[Any] = [None if name is None else getattr(module, name) for name in norm.names]
        start, stop = norm.source
        for into, tensor, otherwise in zip((norm_weights, norm_biases), tensors[:2], (1.0, 0.0), strict=True):
            if tensor is None:
                tensor = torch.full((stop - start,), otherwise, dtype=x.dtype, device=x.device)
            into.append(arranged(tensor, norm.order, 0) if norm.order else tensor)
        mean, variance = tensors[2:]
        training = module.training and not norm.frozen
        uses_batch = training or mean is None
        by_batch.append(uses_batch)
        eps.append(module.eps if norm.eps is None else norm.eps)
        if not uses_batch:
            constants.extend(arranged(tensor, norm.order, 0) for tensor in (mean, variance))
        elif training and mean is not None:
            if norm.momentum is not None:
                moving.append(Moving(norm, mean, variance, None, norm.momentum))
            elif module.track_running_stats:
                moving.append(Moving(norm, mean, variance, module.num_batches_tracked, module.momentum))
    averages = RunningAverages(moving)
    return Reading(norm_weights, norm_biases, weights, given, constants, by_batch, eps, averages)


class Activations(NamedTuple):
    """The type that a network's activations have, and whether autocast gives it to them."""

    dtype: torch.dtype
    cast: bool


def activations(x: Tensor) -> Activations:
    """Those that begin with `x`."""
    device = x.device.type
    cast = device in _WITH_AUTOCAST and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return Activations(torch.get_autocast_dtype(device) if cast else x.dtype, cast)


def accepts(kind: Activations, plan: Plan, modules: Sequence[nn.Module]) -> bool:
    """Whether the ordinary convolutions and norms accept such activations, by the types of their tensors."""
    for part, names, *_ in plan.convolutions:
        tensors = [named_tensor(modules[part], name) for name in names]
        if not kind.cast and any(tensor is not None and tensor.dtype != kind.dtype for tensor in tensors):
            return False
    for norm in plan.norms:
        tensors = [named_tensor(modules[norm.part], name) for name in norm.names]
        types = {tensor.dtype for tensor in tensors if tensor is not None}
        single = types == {torch.float32} and kind.dtype in (torch.float16, torch.bfloat16)
        if types and not single and types != {kind.dtype}:
            return False
    return True


def are_named(plan: Plan, modules: Sequence[nn.Module]) -> bool:
    """Whether all tensors are found by their names, and not by a property, which may find another at the next call."""
    named = [
        *[(part, names) for part, names, *_ in plan.convolutions],
        *[(norm.part, norm.names) for norm in plan.norms],
    ]
    return all(
        getattr(modules[part], name, None) is named_tensor(modules[part], name)
        for part, names in named
        for name in names
        if name is not None
    )


def named_tensor(module: nn.Module, name: Any) -> Tensor | None:
    """A tensor of a module; None where it is computed. That of a replica is a plain attribute."""
    own = vars(module)
    return own["_parameters"].get(name, own["_buffers"].get(name, own.get(name)))


def sync_group(modules: Sequence[Any]) -> torch.distributed.ProcessGroup | None:
    """The processes that share the statistics of the norms among these modules, if any do."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    for module in modules:
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            group = module.process_group or torch.distributed.distributed_c10d._get_default_group()
            return group if group.size() > 1 else None
    return None


def arranged(x: Tensor, order: Ranges, dim: int) -> Tensor:
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
