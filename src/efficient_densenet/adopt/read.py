"""Read dense layers, transitions and stems out of modules, by their structure: what they consist of, in which order.

Whether a module really does what its structure suggests is another question, which `trial` answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import Dropout1d, Dropout2d, Dropout3d, _DropoutNd

from efficient_densenet.execution import Dropout, Layer, Reader, Stem, Tail
from efficient_densenet.execution.parts import AVERAGE_POOLS, CONVOLUTIONS, MAX_POOLS

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class NotDenseError(ValueError):
    """Why modules are not what was looked for."""


def block(module: nn.Module) -> list[Layer]:
    """The dense layers of a block, each of which reads all channels before it.

    Raises:
        NotDenseError: the module does not consist of such layers.
    """
    children = list(module.children())
    while len(children) == 1 and type(children[0]) in (nn.ModuleList, nn.ModuleDict):
        children = list(children[0].children())
    if not children:
        raise NotDenseError("it consists of nothing")
    layers = []
    width = None
    for i, child in enumerate(children, start=1):
        try:
            found = layer(child)
        except NotDenseError as error:
            raise NotDenseError(f"its part {i}, {type(child).__name__}, is no dense layer: {error}") from None
        reads, makes = _in_channels(found.readers[0]), found.readers[-1].conv.out_channels
        if width is not None and reads != width:
            raise NotDenseError(f"its layer {i} reads {reads} channels, where the layers before it make {width}")
        width = reads + makes
        layers.append(found)
    return layers


def layer(module: nn.Module) -> Layer:
    """A dense layer: norm, activation, convolution; with a bottleneck twice; then perhaps dropout.

    Raises:
        NotDenseError: the module consists of other parts.
    """
    parts = list(_parts(module))
    readers: list[Reader] = []
    while parts and len(readers) < 2 and not isinstance(parts[0], _DropoutNd):
        readers.append(_reader(parts))
        if len(readers) == 2 and _in_channels(readers[1]) != readers[0].conv.out_channels:
            raise NotDenseError("its second norm does not fit its first convolution")
    rate = float(getattr(module, "drop_rate", 0) or 0)
    dropout = Dropout(rate if module.training else 0.0)
    if parts and isinstance(parts[0], _DropoutNd) and not rate:
        drop: Any = parts.pop(0)
        dropout = Dropout(drop.p if drop.training else 0.0, isinstance(drop, Dropout1d | Dropout2d | Dropout3d))
    if parts or not readers:
        raise NotDenseError(f"unexpected {type(parts[0]).__name__}" if parts else "it consists of nothing")
    return Layer(module, readers, dropout)


def transition(module: nn.Module) -> Tail | None:
    """Norm, activation, convolution and pool, or None."""
    parts = list(_parts(module))
    try:
        reader = _reader(parts)
    except NotDenseError:
        return None
    return Tail(*reader[:3], parts[0], reader.fused) if len(parts) == 1 and _is_pool(parts[0]) else None


def stem(modules: Sequence[nn.Module]) -> tuple[Stem, int] | None:
    """Convolution, norm, activation and max pool that these modules begin with, and how many of them that takes."""
    if not modules or not isinstance(modules[0], _ConvNd):
        return None
    rest = list(modules[1:4])
    try:
        norm, relu, fused = _norm_and_activation(rest)
    except NotDenseError:
        return None
    if not rest or not _is_pool(rest[0]):
        return None
    return Stem(modules[0], norm, relu, rest[0], fused), 3 if fused else 4


def _parts(module: nn.Module) -> Iterator[Any]:
    """What a module consists of, in the order in which it was put together."""
    if isinstance(module, nn.Identity):
        return
    if hasattr(module, "norm_weight") and hasattr(module, "conv_weight"):
        yield from _bare_bottleneck(module)
    elif _is_norm(module) or isinstance(module, _ConvNd) or next(module.children(), None) is None or _is_pool(module):
        yield module
    else:
        for child in module.children():
            yield from _parts(child)


def _is_norm(module: nn.Module) -> bool:
    """A norm of PyTorch's, or one that another library has frozen: with a weight for each channel."""
    if isinstance(module, _NORMS) or "norm" not in type(module).__name__.lower():
        return isinstance(module, _NORMS)
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def _is_pool(module: nn.Module) -> bool:
    """A pool of PyTorch's, or a few modules without parameters of their own whose first is one: a blurred pool."""
    first = module[0] if isinstance(module, nn.Sequential) and len(module) else module
    return isinstance(first, (*AVERAGE_POOLS, *MAX_POOLS)) or "pool" in type(module).__name__.lower()


def _reader(parts: list[Any]) -> Reader:
    """The norm, activation and convolution that `parts` begin with, taken out of them."""
    norm, relu, fused = _norm_and_activation(parts)
    if not parts or not isinstance(parts[0], _ConvNd) or isinstance(parts[0], _ConvTransposeNd):
        raise NotDenseError("no convolution follows its norm and activation")
    reader = Reader(norm, relu, parts.pop(0), fused)
    if _in_channels(reader) != reader.conv.in_channels:
        raise NotDenseError("a norm and the convolution behind it have different channels")
    return reader


def _norm_and_activation(parts: list[Any]) -> tuple[Any, Any, bool]:
    """A norm and an activation, or a norm that has both, taken out of `parts`."""
    if not parts or not _is_norm(parts[0]):
        raise NotDenseError(f"it begins with {type(parts[0]).__name__}, not with a norm" if parts else "no norm")
    norm = parts.pop(0)
    act = getattr(norm, "act", None)
    if isinstance(act, nn.Module) and not isinstance(act, nn.Identity):
        return norm, act, True
    if not parts or _is_norm(parts[0]) or isinstance(parts[0], (_ConvNd, _DropoutNd)) or _is_pool(parts[0]):
        raise NotDenseError(f"no activation follows its {type(norm).__name__}")
    return norm, parts.pop(0), False


def _in_channels(reader: Reader) -> int:
    norm = reader.norm
    for name in ("num_features", "num_channels"):
        if hasattr(norm, name):
            return getattr(norm, name)
    return norm.normalized_shape[0] if hasattr(norm, "normalized_shape") else len(norm.weight)


def _bare_bottleneck(module: Any) -> Iterator[nn.Module]:
    """Norm, relu and 1×1 convolution as modules that share the tensors of a module which has them under its own names.

    The modules live as long as they are looked at; whatever moves a running average moves the module's own.
    """
    out_channels, in_channels, *kernel = module.conv_weight.shape
    norm: Any = _BatchNorm.__new__((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(kernel) - 1])
    _BatchNorm.__init__(norm, in_channels, device="meta")
    for name in ("weight", "bias"):
        norm._parameters[name] = getattr(module, f"norm_{name}")
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        norm._buffers[name] = getattr(module, f"norm_{name}", None)
    for name in ("eps", "momentum"):
        setattr(norm, name, getattr(module, name, getattr(norm, name)))
    norm.training = module.training
    yield norm
    yield nn.ReLU(inplace=True)
    conv: Any = CONVOLUTIONS[len(kernel) - 1](in_channels, out_channels, tuple(kernel), bias=False, device="meta")
    conv._parameters["weight"] = module.conv_weight
    yield conv
