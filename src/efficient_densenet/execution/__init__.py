"""How a norm–relu–convolution on concatenated features runs: what is stored for backward, and what is computed again.

Every way computes the same function with the same parameters; only time and memory differ. Models call
`norm_relu_conv` and say which way they want; they know nothing about how it works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from efficient_densenet.errors import UserError
from efficient_densenet.execution import concatenate, recompute

Efficient = bool | str
"""``False``: keep everything; ``"recompute"``: bit-identical, less memory; ``True``: the best there is."""

_WAYS: dict[Efficient, Callable[[Sequence[Tensor], nn.Module, nn.Module, nn.Module], Tensor]] = {
    False: concatenate.norm_relu_conv,
    "recompute": recompute.norm_relu_conv,
    True: recompute.norm_relu_conv,
}


def check_efficient(efficient: Efficient) -> Efficient:
    """Return `efficient` if it names a way to run, else raise `UserError`."""
    if not isinstance(efficient, bool | str) or efficient not in _WAYS:
        raise UserError(f"efficient must be False, True or 'recompute', not {efficient!r}")
    return efficient


def norm_relu_conv(
    inputs: Sequence[Tensor], norm: nn.Module, relu: nn.Module, conv: nn.Module, efficient: Efficient
) -> Tensor:
    """``conv(relu(norm(concat(inputs))))``, run the way `efficient` says.

    Args:
        inputs: tensors ``(N, C_i, H, W)`` that agree in everything but their channels; they are concatenated.
        norm: a normalisation over ``ΣC_i`` channels.
        relu: an activation without randomness.
        conv: what consumes the activation: a convolution, or a pool.
        efficient: see `Efficient`.
    """
    return _WAYS[efficient](inputs, norm, relu, conv)
