"""Who watches or transforms operations, and what the operators do then: modes, `torch.func`, batches, forward mode.

The operators have first derivatives in backward mode. Batches of gradients or arguments run one by one; gradients of
gradients and tangents are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from efficient_densenet import ops

_MOST_LEVELS = 64  # of batches in one another, in PyTorch


def is_watched() -> bool:
    """Whether a mode sees single operations, a counter for example, or `torch.func` transforms them.

    The modes that plan a step want what is inside the operators.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return bool(torch._C._len_torch_dispatch_stack()) and not ops.computes_nothing()


def is_observed() -> bool:
    """Whether somebody watches or transforms single operations, or wants derivatives in forward mode."""
    return is_watched() or forward_ad._current_level >= 0


def refuse_gradients(ctx: Any, *grads: Any) -> None:
    """Refuse to be the backward pass of a backward pass."""
    raise RuntimeError(
        "the shared buffer has no gradients of gradients: call make_efficient(model, way='recompute') before forward, "
        "which has them and keeps the same weights"
    )


def refuse_tangents(tensors: Sequence[Tensor]) -> None:
    """Refuse derivatives in forward mode, which PyTorch would drop without a word."""
    if forward_ad._current_level < 0:
        return
    # Below `torch.func.jvp` an operator meets the primals alone.
    if eager_transforms.JVP_NESTING or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            "the shared buffer has no forward-mode derivatives: call the network while the dual level is open, for "
            "then it runs its ordinary operations, or call make_efficient(model, way='recompute') before"
        )


def for_each(run: Callable[..., list[Tensor]], grad_output: list[Tensor], *saved: list[Tensor]) -> list[Tensor]:
    """What `run` makes of a gradient and of what was saved, in lists out of which it may take them.

    A batch of ``is_grads_batched`` is taken apart, for operators have no rules for it.
    """
    if not torch._C._functorch.is_legacy_batchedtensor(grad_output[0]):
        return run(grad_output, *saved)
    (batch,) = grad_output
    level = next(level for level in range(_MOST_LEVELS, 0, -1) if _is_batched(batch, level))  # the innermost first
    gradients = torch._remove_batch_dim(batch, level, 0, 0)
    if not len(gradients):
        raise IndexError("there is no gradient in the batch of gradients")
    made = [for_each(run, [gradient], *([*some] for some in saved)) for gradient in gradients]
    return [torch._add_batch_dim(torch.stack(some), 0, level) for some in zip(*made, strict=True)]


def _is_batched(tensor: Tensor, level: int) -> bool:
    """Whether this level gives it its size; a tensor without the level takes the size that is asked for."""
    return len(torch._remove_batch_dim(tensor, level, 0, 0)) == len(torch._remove_batch_dim(tensor, level, 1, 0))


def one_by_one(operator: Callable[..., list[Tensor]]) -> Callable[..., tuple[list[Tensor], list[int]]]:
    """What an operator does for a batch of some of its arguments, as `torch.func.vmap` gives it."""

    def run(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[list[Tensor], list[int]]:
        pairs = list(zip(arguments, in_dims, strict=True))
        each = [operator(*[_one_of(argument, dim, i) for argument, dim in pairs]) for i in range(info.batch_size)]
        made = [torch.stack(some) for some in zip(*each, strict=True)]
        return made, [0] * len(made)

    return run


def _one_of(argument: Any, dim: Any, i: int) -> Any:
    if isinstance(argument, Tensor):
        return argument if dim is None else argument.select(dim, i)
    if isinstance(argument, list | tuple) and dim is not None:
        return [_one_of(one, d, i) for one, d in zip(argument, dim, strict=True)]
    return argument
