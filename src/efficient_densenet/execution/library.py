"""`stage` as operators of PyTorch, one for forward and one for backward: a single node for autograd and for compilers.

An operator takes and returns tensors and lists of tensors (no None among them), and its outputs must not share memory.
Packing and unpacking that is all that happens here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from efficient_densenet.execution import stage as engine
from efficient_densenet.execution.buffers import empty_activation
from efficient_densenet.execution.norms import Folded, Norm
from efficient_densenet.execution.stage import Kept, Stage
from efficient_densenet.ops.reference import Statistics, statistics_dtype

# What describes a `Stage` to an operator: each norm's weight and bias; running mean and variance of each norm that uses
# them, one behind the other; for each norm whether it uses the batch's statistics instead; the rest as in `Stage`.
_STAGE = (
    "Tensor[] norm_weights, Tensor[] norm_biases, Tensor[] constants, bool[] uses_batch, float[] eps, "
    "Tensor[] weights, Tensor[] biases, Tensor[] masks, float[] mask_scales, int[] sources, "
    "int per_layer, int pool, str keep, str group"
)


def _stage(
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    constants: Sequence[Tensor],
    uses_batch: Sequence[bool],
    eps: Sequence[float],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor],
    mask_scales: Sequence[float],
    sources: Sequence[int],
    *rest: Any,
) -> Stage:
    norms = norms_of(norm_weights, norm_biases, constants, uses_batch, eps)
    pairs = list(zip(sources[::2], sources[1::2], strict=True))
    return Stage(norms, weights, biases, masks, mask_scales, pairs, *rest)


def norms_of(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    constants: Sequence[Tensor],
    uses_batch: Sequence[bool],
    eps: Sequence[float],
) -> list[Norm]:
    """The norms that an operator's arguments describe."""
    left = iter(constants)
    return [
        Norm(weight, bias, None if batch else Statistics(next(left), next(left)), e)
        for weight, bias, batch, e in zip(weights, biases, uses_batch, eps, strict=True)
    ]


def _pack(output: Tensor, kept: Kept) -> list[Tensor]:
    """Output first (the features themselves, where nothing follows them), then what is kept."""
    folded, bottlenecks, features = kept
    extra = [] if features is None or _same(features, output) else [features]
    return [output, *folded, *bottlenecks, *extra]


def _unpack(packed: Sequence[Tensor], stage: Stage) -> Kept:
    output, statistics, count, vectors, *rest = packed
    bottlenecks = [rest.pop(0) for _ in stage.layers] if stage.keeps_bottlenecks else []
    features = rest[0] if rest else output.movedim(1, -1) if stage.keeps_features else None
    return Kept(Folded(statistics, count, vectors), bottlenecks, features)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def stage_without_gradients(x: Tensor, *arguments: Any) -> list[Tensor]:
    """`engine.forward`, packed: what `stage_forward` does, and no operator."""
    return _pack(*engine.forward(x, _stage(*arguments)))


stage_forward = torch.library.custom_op(
    "efficient_densenet::stage_forward",
    stage_without_gradients,
    mutates_args=(),
    schema=f"(Tensor x, {_STAGE}) -> Tensor[]",
)


@stage_forward.register_fake
def _(x: Tensor, *arguments: Any) -> list[Tensor]:
    stage = _stage(*arguments)
    width = x.shape[1] + stage.growth

    def activation(channels: int, pool: int = 1) -> Tensor:
        return empty_activation(x, channels, [n // pool for n in x.shape[2:]])

    features = activation(width)
    output = x.new_empty(x.shape[0], width) if stage.head else features
    if stage.pool:
        output = activation(stage.weights[-1].shape[0], stage.pool)
    folded = fake_folded(x, width + stage.bottlenecks, sum(norm.weight.shape[0] for norm in stage.norms))
    kept = [stage.weights[i].shape[0] for i in stage.layers] if stage.keeps_bottlenecks else []
    bottlenecks = [activation(channels).movedim(1, -1) for channels in kept]
    return _pack(output, Kept(folded, bottlenecks, features.movedim(1, -1) if stage.keeps_features else None))


def fake_folded(x: Tensor, channels: int, read: int) -> Folded:
    return Folded(*(x.new_empty(shape, dtype=statistics_dtype(x.dtype)) for shape in ((2, channels), (), (3, read))))


@torch.library.custom_op(
    "efficient_densenet::stage_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor? x, Tensor[] packed, bool[] need_weights, {_STAGE}) -> Tensor[]",
)
def stage_backward(
    grad_output: Tensor, x: Tensor | None, packed: Sequence[Tensor], need_weights: Sequence[bool], *arguments: Any
) -> list[Tensor]:
    """`engine.backward`: gradients of the input, of each norm's weight and bias, of the weights that need one, and of
    the convolutions' biases.

    `x` is empty where the features are kept, for then it is not needed.
    """
    stage = _stage(*arguments)
    gradients = engine.backward(grad_output, x, stage, _unpack(packed, stage), need_weights)
    of_norms = chain.from_iterable(zip(*gradients.norms, strict=True))
    return [gradients.x, *of_norms, *[w for w in gradients.weights if w is not None], *gradients.biases]


@stage_backward.register_fake
def _(grad_output: Tensor, x: Tensor | None, packed: Any, need_weights: Any, *arguments: Any) -> list[Tensor]:
    stage = _stage(*arguments)
    wanted = [w for w, need in zip(stage.weights, need_weights, strict=True) if need]
    features = _unpack(packed, stage).features
    if features is not None:
        x = features.movedim(-1, 1)[:, : features.shape[-1] - stage.growth]
    assert x is not None
    norm_weights, norm_biases = arguments[:2]
    parameters = (*norm_weights, *norm_biases, *wanted, *stage.biases)
    return [empty_activation(x, x.shape[1], x.shape[2:]), *(torch.empty_like(t) for t in parameters)]


# Among the arguments of `stage_forward`.
_NEEDS_WEIGHTS = 6


def _save_stage(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, norm_weights, norm_biases, constants, uses_batch, eps, weights, biases, masks, *rest = inputs
    stage = _stage(*inputs[1:])
    ctx.plain = uses_batch, eps, rest
    # Behind a transition or a head the output itself is not needed: anything takes its place.
    packed = [output[1] if stage.pool or stage.head else output[0], *output[1:]]
    groups = (norm_weights, norm_biases, constants, weights, biases, masks, packed)
    ctx.lengths = [len(some) for some in groups]
    # The features begin with a copy of x, which takes its place where they stay.
    ctx.save_for_backward(None if stage.keeps_features else x, *chain.from_iterable(groups))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _stage_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    uses_batch, eps, rest = ctx.plain
    x, *saved = ctx.saved_tensors
    left = iter(saved)
    norm_weights, norm_biases, constants, weights, biases, masks, packed = (
        list(islice(left, n)) for n in ctx.lengths
    )  # fmt: skip
    need_weights = ctx.needs_input_grad[_NEEDS_WEIGHTS]
    if grads[0] is None:
        found = iter([None] * (1 + len(norm_weights) + len(norm_biases) + len(weights) + len(biases)))
    else:
        arguments = (norm_weights, norm_biases, constants, uses_batch, eps, weights, biases, masks, *rest)
        found = iter(stage_backward(grads[0], x, packed, need_weights, *arguments))
    of_x = next(found)
    of_norms = [next(found) for _ in norm_weights], [next(found) for _ in norm_biases]
    of_weights = [next(found) if need else None for need in need_weights]
    of_biases = [next(found) for _ in biases]
    nothing = [None] * len(constants), None, None
    of_rest: list[list | None] = [[] if plain == [] else None for plain in rest]  # an empty list may be one of tensors
    return (of_x, *of_norms, *nothing, of_weights, of_biases, [None] * len(masks), *of_rest)


stage_forward.register_autograd(_stage_gradients, setup_context=_save_stage)


def refuse_gradients_of_gradients(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "the shared buffer has no gradients of gradients: call make_efficient(model, way='recompute') before forward, "
        "which has them and keeps the same weights"
    )


stage_backward.register_autograd(refuse_gradients_of_gradients)
