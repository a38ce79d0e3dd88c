"""How dense blocks run: what is stored for backward, and what is computed again.

Every way computes the same function with the same parameters; only time and memory differ:

- `concatenate`: the ordinary way, and the definition;
- `recompute`: the same autograd graph, whose activations are computed again; bit-identical;
- `shared`: a whole block on one buffer, see `stage`; equal up to rounding, smallest and fastest.

Models say which way they want and know nothing about how it works.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from efficient_densenet.errors import UserError
from efficient_densenet.execution import concatenate, recompute, shared
from efficient_densenet.execution.hooks import has_hooks
from efficient_densenet.execution.parts import Dropout, Head, Layer, Reader, Stem, Tail, obstacle
from efficient_densenet.execution.shared import KEEP

__all__ = [
    "KEEP",
    "Dropout",
    "Efficient",
    "Head",
    "Layer",
    "Reader",
    "Stem",
    "Tail",
    "check_efficient",
    "layer_by_layer",
    "norm_relu_conv",
    "obstacle",
    "run_reader",
    "shared",
    "wants_buffer",
]

Efficient = bool | str
"""``False``: keep everything; ``"recompute"``: bit-identical, less memory; ``True``: the shared buffer."""


def check_efficient(efficient: Efficient, keep: str) -> None:
    """Raise `UserError` unless these name a way to run."""
    if efficient not in (False, True, "recompute") or not isinstance(efficient, bool | str):
        raise UserError(f"efficient must be False, True or 'recompute', not {efficient!r}")
    if keep not in KEEP:
        raise UserError(f"keep must be one of {', '.join(map(repr, KEEP))}, not {keep!r}")


def wants_buffer(x: Tensor, efficient: Efficient) -> bool:
    """Whether to run on the shared buffer: it was asked for, and nobody records the operations to run elsewhere."""
    return efficient is True and not _must_be_ordinary(x)


def norm_relu_conv(
    inputs: Sequence[Tensor], norm: nn.Module, relu: nn.Module, conv: nn.Module, efficient: Efficient
) -> Tensor:
    """``conv(relu(norm(concat(inputs))))``, by itself.

    Args:
        inputs: tensors ``(N, C_i, H, W)`` that agree in everything but their channels; they are concatenated.
        norm: a normalisation over ``ΣC_i`` channels.
        relu: an activation without randomness.
        conv: what consumes the activation: a convolution, or a pool.
        efficient: see `Efficient`; without its block around it, ``True`` is the same as ``"recompute"``, but gives no
            warning, for its block has given one.
    """
    # Without gradients nothing is stored; and a compiler decides by itself what to compute again.
    ordinary = not efficient or not torch.is_grad_enabled() or torch.compiler.is_compiling()
    way = concatenate if ordinary or _must_be_ordinary(inputs[0]) else recompute
    if way is recompute and has_hooks([norm, relu]):
        if efficient == "recompute":  # else its block has given the reason
            warnings.warn(
                "hooks on the norm or activation inside a dense layer must see every activation exactly once: "
                "this layer keeps its activations instead of computing them again",
                stacklevel=2,
            )
        way = concatenate
    return way.norm_relu_conv(inputs, norm, relu, conv)


def run_reader(inputs: Sequence[Tensor], reader: Reader, efficient: Efficient) -> Tensor:
    """`norm_relu_conv` of a reader, whose norm may bring its activation along."""
    norm, relu, conv, fused = reader
    return norm_relu_conv(inputs, norm, nn.Identity() if fused else relu, conv, efficient)


def layer_by_layer(x: Tensor, layers: Sequence[Layer], efficient: Efficient) -> Tensor:
    """A dense block from its layers' parts, which need not fit the shared buffer; without their modules' own forward.

    Shapes: ``(N, C_0, *spatial)`` → ``(N, C_0 + Σk, *spatial)``.
    """
    features = [x]
    for layer in layers:
        inputs: Sequence[Tensor] = features
        for reader in layer.readers:
            inputs = [run_reader(inputs, reader, efficient)]
        features.append(layer.dropout(inputs[0]))
    return concatenate.concat(features)


def _must_be_ordinary(x: Tensor) -> bool:
    """torch.fx (whose proxies are no tensors), TorchScript, torch.export and ONNX get the ordinary operations."""
    return not isinstance(x, Tensor) or torch.jit.is_tracing() or torch.compiler.is_exporting()
