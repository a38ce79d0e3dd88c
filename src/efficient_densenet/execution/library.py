"""`stage` and `stem` as operators of PyTorch, one for forward and one for backward: a single node for autograd and for
compilers.

An operator takes and returns tensors and lists of tensors (no None among them), and its outputs must not share memory.
Packing and unpacking that is all that happens here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from efficient_densenet.execution import stage as engine
from efficient_densenet.execution import stem
from efficient_densenet.execution.buffers import empty_activation
from efficient_densenet.execution.norms import Folded, Norm
from efficient_densenet.execution.stage import Kept, Stage
from efficient_densenet.ops.protocol import Statistics, statistics_dtype


class StageArguments(NamedTuple):
    """A `Stage` as the operators get it, tensors first; names and types are their schema.

    Attributes:
        norm_weights, norm_biases: of each norm.
        weights, biases, masks: as in `Stage`.
        constants: running mean and variance of each norm that uses them, in sequence.
        uses_batch: for each norm whether it uses the batch's statistics instead.
        eps: of each norm.
        sources: first and last channel (exclusive) that each norm reads, in sequence.
        mask_scales, per_layer, pool, keep, group: as in `Stage`.
    """

    norm_weights: Sequence[Tensor]
    norm_biases: Sequence[Tensor]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    masks: Sequence[Tensor]
    constants: Sequence[Tensor]
    uses_batch: Sequence[bool]
    eps: Sequence[float]
    sources: Sequence[int]
    mask_scales: Sequence[float]
    per_layer: int
    pool: int
    keep: str
    group: str

    def stage(self) -> Stage:
        constants = iter(self.constants)
        norms = [
            Norm(weight, bias, None if batch else Statistics(next(constants), next(constants)), eps)
            for weight, bias, batch, eps in zip(
                self.norm_weights, self.norm_biases, self.uses_batch, self.eps, strict=True
            )
        ]
        sources = list(zip(self.sources[::2], self.sources[1::2], strict=True))
        return Stage(norms, self.weights, self.biases, self.masks, self.mask_scales, sources, *self[-4:])


_TYPES = get_type_hints(StageArguments)
_TENSORS = list(_TYPES.values()).count(Sequence[Tensor])  # the first so many are lists of tensors
_SCHEMA = ", ".join(
    f"{get_args(type_)[0].__name__}[] {name}" if get_args(type_) else f"{type_.__name__} {name}"
    for name, type_ in _TYPES.items()
)


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
    return _pack(*engine.forward(x, StageArguments(*arguments).stage()))


stage_forward = torch.library.custom_op(
    "efficient_densenet::stage_forward",
    stage_without_gradients,
    mutates_args=(),
    schema=f"(Tensor x, {_SCHEMA}) -> Tensor[]",
)


@stage_forward.register_fake
def _(x: Tensor, *arguments: Any) -> list[Tensor]:
    stage = StageArguments(*arguments).stage()
    width = x.shape[1] + stage.growth

    def activation(channels: int, pool: int = 1) -> Tensor:
        return empty_activation(x, channels, [n // pool for n in x.shape[2:]])

    features = activation(width)
    output = x.new_empty(x.shape[0], width) if stage.head else features
    if stage.pool:
        output = activation(stage.weights[-1].shape[0], stage.pool)
    folded = _fake_folded(x, width + stage.bottlenecks, sum(norm.weight.shape[0] for norm in stage.norms))
    kept = [stage.weights[i].shape[0] for i in stage.layers] if stage.keeps_bottlenecks else []
    bottlenecks = [activation(channels).movedim(1, -1) for channels in kept]
    return _pack(output, Kept(folded, bottlenecks, features.movedim(1, -1) if stage.keeps_features else None))


def _fake_folded(x: Tensor, channels: int, read: int) -> Folded:
    return Folded(*(x.new_empty(shape, dtype=statistics_dtype(x.dtype)) for shape in ((2, channels), (), (3, read))))


@torch.library.custom_op(
    "efficient_densenet::stage_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor? x, Tensor[] packed, bool[] need_weights, {_SCHEMA}) -> Tensor[]",
)
def stage_backward(
    grad_output: Tensor, x: Tensor | None, packed: Sequence[Tensor], need_weights: Sequence[bool], *arguments: Any
) -> list[Tensor]:
    """`engine.backward`: gradients of the input, of each norm's weight and bias, of the weights that need one, and of
    the convolutions' biases.

    `x` is empty where the features are kept, for then it is not needed.
    """
    stage = StageArguments(*arguments).stage()
    gradients = engine.backward(grad_output, x, stage, _unpack(packed, stage), need_weights)
    of_norms = chain.from_iterable(zip(*gradients.norms, strict=True))
    return [gradients.x, *of_norms, *[w for w in gradients.weights if w is not None], *gradients.biases]


@stage_backward.register_fake
def _(grad_output: Tensor, x: Tensor | None, packed: Any, need_weights: Any, *arguments: Any) -> list[Tensor]:
    given = StageArguments(*arguments)
    stage = given.stage()
    wanted = [w for w, need in zip(stage.weights, need_weights, strict=True) if need]
    features = _unpack(packed, stage).features
    if features is not None:
        x = features.movedim(-1, 1)[:, : features.shape[-1] - stage.growth]
    assert x is not None
    parameters = (*given.norm_weights, *given.norm_biases, *wanted, *given.biases)
    return [empty_activation(x, x.shape[1], x.shape[2:]), *(torch.empty_like(t) for t in parameters)]


def _save_stage(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, *arguments = inputs
    stage = StageArguments(*arguments).stage()
    # The output of a transition or a head is not needed, and not kept.
    packed = [output[1] if stage.pool or stage.head else output[0], *output[1:]]
    tensors, ctx.plain = arguments[:_TENSORS], arguments[_TENSORS:]
    ctx.lengths = [len(group) for group in tensors]
    # The features begin with a copy of x: where they are kept, x is not.
    ctx.save_for_backward(None if stage.keeps_features else x, *chain(*tensors, packed))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _stage_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    x, *saved = ctx.saved_tensors
    left = iter(saved)
    tensors = [list(islice(left, length)) for length in ctx.lengths]
    found: list[list | None] = [[None] * length for length in ctx.lengths]
    found += [[] if plain == [] else None for plain in ctx.plain]  # an empty list may be one of tensors
    if grads[0] is None:
        return None, *found
    need_weights = StageArguments(*ctx.needs_input_grad[1:]).weights
    of_x, *parameters = stage_backward(grads[0], x, list(left), need_weights, *tensors, *ctx.plain)
    some = iter(parameters)
    of_norms = [[next(some) for _ in group] for group in tensors[:2]]
    of_weights = [next(some) if need else None for need in need_weights]
    return of_x, *of_norms, of_weights, list(some), *found[4:]


stage_forward.register_autograd(_stage_gradients, setup_context=_save_stage)


def stem_without_gradients(
    x: Tensor, weight: Tensor, bias: Tensor, constants: Sequence[Tensor], eps: float, group: str
) -> list[Tensor]:
    """`stem.forward`: the output, and the folded norm; what `norm_relu_max_pool_forward` does, and no operator."""
    output, folded = stem.forward(x, _norm(weight, bias, constants, eps), group)
    return [output, *folded]


norm_relu_max_pool_forward = torch.library.custom_op(
    "efficient_densenet::norm_relu_max_pool_forward", stem_without_gradients, mutates_args=()
)


@norm_relu_max_pool_forward.register_fake
def _(x: Tensor, *arguments: Any) -> list[Tensor]:
    output = empty_activation(x, x.shape[1], [(n + 1) // 2 for n in x.shape[2:]])
    return [output, *_fake_folded(x, x.shape[1], x.shape[1])]


@torch.library.custom_op("efficient_densenet::norm_relu_max_pool_backward", mutates_args=())
def norm_relu_max_pool_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    constants: Sequence[Tensor],
    folded: Sequence[Tensor],
    eps: float,
    group: str,
) -> list[Tensor]:
    """`stem.backward`: the gradients of x, weight and bias."""
    return list(stem.backward(grad_output, x, _norm(weight, bias, constants, eps), Folded(*folded), group))


@norm_relu_max_pool_backward.register_fake
def _(grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *arguments: Any) -> list[Tensor]:
    return [empty_activation(x, x.shape[1], x.shape[2:]), torch.empty_like(weight), torch.empty_like(bias)]


def _save_stem(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, weight, bias, constants, ctx.eps, ctx.group = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:], *constants)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _stem_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    x, weight, bias, statistics, count, vectors, *constants = ctx.saved_tensors
    found: Sequence[Tensor | None] = [None] * 3
    if grads[0] is not None:
        folded = [statistics, count, vectors]
        found = norm_relu_max_pool_backward(grads[0], x, weight, bias, constants, folded, ctx.eps, ctx.group)
    return (*found, [None] * len(constants), None, None)


norm_relu_max_pool_forward.register_autograd(_stem_gradients, setup_context=_save_stem)


def _norm(weight: Tensor, bias: Tensor, constants: Sequence[Tensor], eps: float) -> Norm:
    return Norm(weight, bias, Statistics(*constants) if constants else None, eps)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "the shared buffer has no gradients of gradients: call make_efficient(model, way='recompute') before forward, "
        "which has them and keeps the same weights"
    )


stage_backward.register_autograd(_refuse)
norm_relu_max_pool_backward.register_autograd(_refuse)
