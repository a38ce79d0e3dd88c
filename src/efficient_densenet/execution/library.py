"""`stage` as operators of PyTorch, one for forward and one for backward: a single node for autograd and for compilers.

An operator takes and returns tensors and lists of tensors (no None among them), and its outputs must not share memory.
Packing and unpacking that is all that happens here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from efficient_densenet.execution import stage as engine
from efficient_densenet.execution import stem
from efficient_densenet.execution.buffers import room
from efficient_densenet.execution.norms import Folded, Norm
from efficient_densenet.execution.stage import Kept, Stage
from efficient_densenet.ops.reference import Statistics, statistics_dtype

# The arguments that describe a `Stage`, in this order, for both operators:
#   gains, biases: each norm's weight and bias
#   constants:     running mean and variance of each norm that uses them, one behind the other
#   uses_batch:    for each norm whether it uses the batch's statistics instead
#   the rest:      as in `Stage`


def _stage(
    gains: Sequence[Tensor],
    biases: Sequence[Tensor],
    constants: Sequence[Tensor],
    uses_batch: Sequence[bool],
    eps: Sequence[float],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    mask_scale: float,
    per_layer: int,
    pool: int,
    keep: str,
    group: str,
) -> Stage:
    rest = iter(constants)
    norms = [
        _norm(gain, bias, () if batch else (next(rest), next(rest)), e)
        for gain, bias, batch, e in zip(gains, biases, uses_batch, eps, strict=True)
    ]
    return Stage(norms, weights, masks, mask_scale, per_layer, pool, keep, group)


def _pack(output: Tensor, kept: Kept) -> list[Tensor]:
    """Output first (the features themselves, where nothing follows them), then what is kept."""
    folded, middles, features = kept
    extra = [] if features is None or _same(features, output) else [features]
    return [output, *folded, *middles, *extra]


def _unpack(packed: Sequence[Tensor], stage: Stage) -> Kept:
    output, statistics, count, vectors, *rest = packed
    middles = [rest.pop(0) for _ in stage.layers] if stage.keeps_middles else []
    features = rest[0] if rest else output.movedim(1, -1) if stage.keeps_features else None
    return Kept(Folded(statistics, count, vectors), middles, features)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


@torch.library.custom_op("efficient_densenet::stage_forward", mutates_args=())
def stage_forward(
    x: Tensor,
    gains: Sequence[Tensor],
    biases: Sequence[Tensor],
    constants: Sequence[Tensor],
    uses_batch: Sequence[bool],
    eps: Sequence[float],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    mask_scale: float,
    per_layer: int,
    pool: int,
    keep: str,
    group: str,
) -> list[Tensor]:
    """`engine.forward`, packed."""
    stage = _stage(gains, biases, constants, uses_batch, eps, weights, masks, mask_scale, per_layer, pool, keep, group)
    return _pack(*engine.forward(x, stage))


@stage_forward.register_fake
def _(x: Tensor, *arguments: Any) -> list[Tensor]:
    stage = _stage(*arguments)
    width = x.shape[1] + stage.growth

    def activation(channels: int, pool: int = 1) -> Tensor:
        return room(x, channels, [n // pool for n in x.shape[2:]])

    features = activation(width)
    output = x.new_empty(x.shape[0], width) if stage.head else features
    if stage.pool:
        output = activation(stage.weights[-1].shape[0], stage.pool)
    folded = _fake_folded(x, width + stage.middles, sum(norm.weight.shape[0] for norm in stage.norms))
    kept = [stage.weights[i].shape[0] for i in stage.layers] if stage.keeps_middles else []
    middles = [activation(channels).movedim(1, -1) for channels in kept]
    return _pack(output, Kept(folded, middles, features.movedim(1, -1) if stage.keeps_features else None))


def _fake_folded(x: Tensor, channels: int, read: int) -> Folded:
    return Folded(*(x.new_empty(shape, dtype=statistics_dtype(x.dtype)) for shape in ((2, channels), (), (3, read))))


@torch.library.custom_op("efficient_densenet::stage_backward", mutates_args=())
def stage_backward(
    grad_output: Tensor,
    x: Tensor | None,
    packed: Sequence[Tensor],
    need_weights: Sequence[bool],
    gains: Sequence[Tensor],
    biases: Sequence[Tensor],
    constants: Sequence[Tensor],
    uses_batch: Sequence[bool],
    eps: Sequence[float],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    mask_scale: float,
    per_layer: int,
    pool: int,
    keep: str,
    group: str,
) -> list[Tensor]:
    """`engine.backward`: gradients of the input, of each norm's weight and bias, and of the weights that need one.

    `x` is empty where the features are kept, for then it is not needed.
    """
    stage = _stage(gains, biases, constants, uses_batch, eps, weights, masks, mask_scale, per_layer, pool, keep, group)
    gradients = engine.backward(grad_output, x, stage, _unpack(packed, stage), need_weights)
    gains_and_biases = [t for part in zip(*gradients.norms, strict=True) for t in part]
    return [gradients.x, *gains_and_biases, *(w for w in gradients.weights if w is not None)]


@stage_backward.register_fake
def _(
    grad_output: Tensor, x: Tensor | None, packed: Any, need_weights: Any, gains: Any, biases: Any, *rest: Any
) -> list[Tensor]:
    stage = _stage(gains, biases, *rest)
    wanted = [w for w, need in zip(stage.weights, need_weights, strict=True) if need]
    features = _unpack(packed, stage).features
    if features is not None:
        x = features.movedim(-1, 1)[:, : features.shape[-1] - stage.growth]
    assert x is not None
    return [room(x, x.shape[1], x.shape[2:]), *(torch.empty_like(t) for t in (*gains, *biases, *wanted))]


def _save_stage(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, gains, biases, constants, uses_batch, eps, weights, masks, *rest = inputs
    stage = _stage(*inputs[1:])
    ctx.plain = uses_batch, eps, rest
    # Behind a transition or a head the output itself is not needed: anything takes its place.
    packed = [output[1] if stage.pool or stage.head else output[0], *output[1:]]
    groups = (gains, biases, constants, weights, masks, packed)
    ctx.lengths = [len(some) for some in groups]
    # The features begin with a copy of x, which takes its place where they stay.
    ctx.save_for_backward(None if stage.keeps_features else x, *(t for some in groups for t in some))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _stage_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    uses_batch, eps, rest = ctx.plain
    x, *saved = ctx.saved_tensors
    saved_iterator = iter(saved)
    gains, biases, constants, weights, masks, packed = (list(islice(saved_iterator, n)) for n in ctx.lengths)
    need_weights = ctx.needs_input_grad[6]
    if grads[0] is None:
        found = iter([None] * (1 + len(gains) + len(biases) + len(weights)))
    else:
        arguments = (gains, biases, constants, uses_batch, eps, weights, masks, *rest)
        found = iter(stage_backward(grads[0], x, packed, need_weights, *arguments))
    x_grad = next(found)
    gain_grads = [next(found) for _ in gains]
    bias_grads = [next(found) for _ in biases]
    weight_grads = [next(found) if need else None for need in need_weights]
    nothing = [None] * len(constants), None, None
    return (x_grad, gain_grads, bias_grads, *nothing, weight_grads, [None] * len(masks), *[None] * len(rest))


stage_forward.register_autograd(_stage_gradients, setup_context=_save_stage)


@torch.library.custom_op("efficient_densenet::norm_relu_max_pool_forward", mutates_args=())
def norm_relu_max_pool_forward(
    x: Tensor, gain: Tensor, bias: Tensor, constants: Sequence[Tensor], eps: float, group: str
) -> list[Tensor]:
    """`stem.forward`: the output, and the folded norm."""
    output, folded = stem.forward(x, _norm(gain, bias, constants, eps), group)
    return [output, *folded]


@norm_relu_max_pool_forward.register_fake
def _(x: Tensor, *arguments: Any) -> list[Tensor]:
    output = room(x, x.shape[1], [(n + 1) // 2 for n in x.shape[2:]])
    return [output, *_fake_folded(x, x.shape[1], x.shape[1])]


@torch.library.custom_op("efficient_densenet::norm_relu_max_pool_backward", mutates_args=())
def norm_relu_max_pool_backward(
    grad_output: Tensor,
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    constants: Sequence[Tensor],
    folded: Sequence[Tensor],
    eps: float,
    group: str,
) -> list[Tensor]:
    """`stem.backward`: the gradients of x, gain and bias."""
    return list(stem.backward(grad_output, x, _norm(gain, bias, constants, eps), Folded(*folded), group))


@norm_relu_max_pool_backward.register_fake
def _(grad_output: Tensor, x: Tensor, gain: Tensor, bias: Tensor, *arguments: Any) -> list[Tensor]:
    return [room(x, x.shape[1], x.shape[2:]), torch.empty_like(gain), torch.empty_like(bias)]


def _save_stem(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, gain, bias, constants, ctx.eps, ctx.group = inputs
    ctx.save_for_backward(x, gain, bias, *output[1:], *constants)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _stem_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    x, gain, bias, statistics, count, vectors, *constants = ctx.saved_tensors
    found: Sequence[Tensor | None] = [None] * 3
    if grads[0] is not None:
        folded = [statistics, count, vectors]
        found = norm_relu_max_pool_backward(grads[0], x, gain, bias, constants, folded, ctx.eps, ctx.group)
    return (*found, [None] * len(constants), None, None)


norm_relu_max_pool_forward.register_autograd(_stem_gradients, setup_context=_save_stem)


def _norm(gain: Tensor, bias: Tensor, constants: Sequence[Tensor], eps: float) -> Norm:
    return Norm(gain, bias, Statistics(*constants) if constants else None, eps)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "gradients of gradients do not exist for the shared buffer (efficient=True): build the network with "
        "efficient='recompute', which has them"
    )


stage_backward.register_autograd(_refuse)
norm_relu_max_pool_backward.register_autograd(_refuse)
