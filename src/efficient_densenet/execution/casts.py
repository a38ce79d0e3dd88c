"""The weights and biases of convolutions in the type of the activations, and their gradients in their own types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def types_of(arguments: Any) -> list[torch.dtype]:
    """Of weights and biases of convolutions, as their gradients must have them."""
    return [tensor.dtype for tensor in (*arguments.weights, *arguments.biases)]


def cast_one_by_one(arguments: Any, dtype: torch.dtype | None) -> Any:
    """Arguments whose weights and biases of convolutions have this type, if one is given."""
    if dtype is None:
        return arguments
    weights, biases = ([t.to(dtype) for t in some] for some in (arguments.weights, arguments.biases))
    return arguments._replace(weights=weights, biases=biases)


def cast_together(arguments: Any, dtype: torch.dtype | None) -> Any:
    """The same in one operation. On a GPU each one costs a start of a kernel and the time of the host."""
    if dtype is None:
        return arguments
    count = len(arguments.weights)
    cast = copies_in([*arguments.weights, *arguments.biases], [dtype] * (count + len(arguments.biases)))
    return arguments._replace(weights=cast[:count], biases=cast[count:])


def copies_in(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Sequence[Tensor]:
    """The tensors in these types: those that have another are copied, all in one operation."""
    others = [i for i, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)) if tensor.dtype != dtype]
    if not others:
        return tensors
    found = list(tensors)
    for i in others:
        found[i] = torch.empty_like(tensors[i], dtype=dtypes[i])
    torch._foreach_copy_([found[i] for i in others], [tensors[i] for i in others])
    return found
