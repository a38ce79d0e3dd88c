"""`stem` as operators of PyTorch, as `library` has `stage`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from efficient_densenet.execution import stem as engine
from efficient_densenet.execution.buffers import empty_activation
from efficient_densenet.execution.library import fake_folded, norms_of, refuse_gradients_of_gradients
from efficient_densenet.execution.norms import Folded
from efficient_densenet.execution.plan import Entry
from efficient_densenet.execution.stem import Kept, Stem, pooled

# What describes a `Stem` to an operator: norms as in `library`, convolutions, and the entry.
_STEM = (
    "Tensor[] norm_weights, Tensor[] norm_biases, Tensor[] constants, bool[] uses_batch, float[] eps, "
    "Tensor[] weights, Tensor[] biases, int[] stride, int[] padding, int[] dilation, int groups, str group"
)


def _stem(*arguments: Any) -> Stem:
    norms = norms_of(*arguments[:5])
    weights, biases, *entry, group = arguments[5:]
    return Stem(norms, weights, biases, Entry(*entry), group)


def stem_without_gradients(x: Tensor, *arguments: Any) -> list[Tensor]:
    """`engine.forward`, packed: what `stem_forward` does, and no operator."""
    output, (folded, made) = engine.forward(x, _stem(*arguments))
    return [output, *folded, *made]


stem_forward = torch.library.custom_op(
    "efficient_densenet::stem_forward",
    stem_without_gradients,
    mutates_args=(),
    schema=f"(Tensor x, {_STEM}) -> Tensor[]",
)


@stem_forward.register_fake
def _(x: Tensor, *arguments: Any) -> list[Tensor]:
    stem = _stem(*arguments)
    size, channels = stem.like(x).shape[1:-1], [len(norm.weight) for norm in stem.norms]
    made = [empty_activation(x, some, size).movedim(1, -1) for some in channels[:-1]]
    output = empty_activation(x, channels[-1], pooled(size))
    return [output, *fake_folded(x, sum(channels), sum(channels)), *made]


@torch.library.custom_op(
    "efficient_densenet::stem_backward",
    mutates_args=(),
    schema=(f"(Tensor grad_output, Tensor x, Tensor[] kept, bool need_x, bool[] need_weights, {_STEM}) -> Tensor[]"),
)
def stem_backward(
    grad_output: Tensor,
    x: Tensor,
    kept: Sequence[Tensor],
    need_x: bool,
    need_weights: Sequence[bool],
    *arguments: Any,
) -> list[Tensor]:
    """`engine.backward`: gradients of each norm's weight and bias, of the weights that need one, of the convolutions'
    biases, and of the input if it needs one.
    """
    packed = Kept(Folded(*kept[:3]), kept[3:])
    found = engine.backward(grad_output, x, _stem(*arguments), packed, need_x, need_weights)
    of_norms = chain.from_iterable(zip(*found.norms, strict=True))
    of_weights = [w for w in found.weights if w is not None]
    return [*of_norms, *of_weights, *found.biases, *([] if found.x is None else [found.x])]


@stem_backward.register_fake
def _(grad_output: Tensor, x: Tensor, kept: Any, need_x: bool, need_weights: Any, *arguments: Any) -> list[Tensor]:
    norm_weights, norm_biases, *_ = arguments
    weights, biases = arguments[5:7]
    wanted = [w for w, need in zip(weights, need_weights, strict=True) if need]
    of_x = [empty_activation(x, x.shape[1], x.shape[2:])] if need_x else []
    return [*(torch.empty_like(t) for t in (*norm_weights, *norm_biases, *wanted, *biases)), *of_x]


# Among the arguments of `stem_forward`.
_NEEDS_WEIGHTS = 6


def _save_stem(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, norm_weights, norm_biases, constants, uses_batch, eps, weights, biases, *rest = inputs
    ctx.plain = uses_batch, eps, rest
    groups = (norm_weights, norm_biases, constants, weights, biases, output[1:])
    ctx.lengths = [len(some) for some in groups]
    ctx.save_for_backward(x, *chain.from_iterable(groups))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _stem_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    uses_batch, eps, rest = ctx.plain
    x, *saved = ctx.saved_tensors
    left = iter(saved)
    norm_weights, norm_biases, constants, weights, biases, kept = (list(islice(left, n)) for n in ctx.lengths)
    need_x, need_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[_NEEDS_WEIGHTS]
    if grads[0] is None:
        found = iter([None] * (1 + len(norm_weights) + len(norm_biases) + len(weights) + len(biases)))
    else:
        arguments = (norm_weights, norm_biases, constants, uses_batch, eps, weights, biases, *rest)
        found = iter(stem_backward(grads[0], x, kept, need_x, need_weights, *arguments))
    of_norms = [next(found) for _ in norm_weights], [next(found) for _ in norm_biases]
    of_weights = [next(found) if need else None for need in need_weights]
    of_biases = [next(found) for _ in biases]
    of_x = next(found) if need_x else None
    of_rest: list[list | None] = [[] if plain == [] else None for plain in rest]  # an empty list may be one of tensors
    return (of_x, *of_norms, [None] * len(constants), None, None, of_weights, of_biases, *of_rest)


stem_forward.register_autograd(_stem_gradients, setup_context=_save_stem)
stem_backward.register_autograd(refuse_gradients_of_gradients)
