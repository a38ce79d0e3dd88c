"""Networks that end with relu, the mean over all pixels and a classifier: their head joins the last block's buffer.

What a network does with its features is recorded as other forwards are, with empty features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from efficient_densenet.adopt.conditions import MOST_LOOKS, conditions, hooked, hooked_globally
from efficient_densenet.adopt.kinds import modules_of
from efficient_densenet.adopt.meanings import Meanings, NotDenseError
from efficient_densenet.adopt.trial import Tensors, on_trial
from efficient_densenet.adopt.turns import alone
from efficient_densenet.execution.plan import parts

_aten = torch.ops.aten
_SAME = {_aten.clone, _aten.detach, _aten.alias, _aten.view, _aten._unsafe_view, _aten.unsqueeze, _aten.squeeze}


@dataclass(frozen=True)
class Head:
    """How a network ends, under these conditions.

    Attributes:
        conditions: of all its modules but the features.
        ends: whether it ends with relu, mean and classifier of its features, and nothing else.
        classifier: the name of the module that gets the mean; empty where it is what comes out.
        sizes: whether it asks for the size of a tensor.
        by_size: whether this holds for an input of that shape, for those that were met; see `sizes`.
    """

    conditions: tuple[Any, ...]
    ends: bool
    classifier: str = ""
    sizes: bool = False
    by_size: dict[torch.Size, bool] = field(default_factory=dict, compare=False)


def head_of(network: nn.Module, features: nn.Module, known: list[Head], shape: torch.Size) -> Head | None:
    """How the network ends, for an input of this shape, if its head may join the last block; `known` is added to."""
    modules, _, found = conditions([network], without=features)
    head = next((one for one in known if one.conditions == found), None)
    if head is None and len(known) >= MOST_LOOKS:
        return None
    if head is None or (head.sizes and shape not in head.by_size):
        with alone([network]) as nobody_else:
            if not nobody_else:
                return None
            seen = _look(network, features, found, shape)
        if head is None:
            known.insert(0, head := seen)
        head.by_size[shape] = seen == head
    if not head.ends or (head.sizes and not head.by_size[shape]):
        return None
    classifier = network.get_submodule(head.classifier) if head.classifier else None
    # A hook on the last norm may keep its output, which the network's relu may overwrite.
    watched = [features, modules_of(features)[-1], *(m for m in modules[1:] if m is not classifier)]
    return None if hooked_globally() or hooked(watched) else head


def ends_with_a_head(network: nn.Module, features: nn.Module) -> bool:
    """Whether it does, for images of a usual size."""
    weight = next((p for p in features.parameters() if not is_lazy(p) and p.dim() > 2), None)
    if weight is None:
        return False
    shape = torch.Size((2, weight.shape[1], *[_USUAL_SIZE] * (weight.dim() - 2)))
    return head_of(network, features, [], shape) is not None


def _look(network: nn.Module, features: nn.Module, found: tuple[Any, ...], shape: Sequence[int]) -> Head:
    modules, tensors = parts([network]), _Zeros("cpu")
    names = {module: name for name, module in network.named_modules()}
    try:
        with on_trial(modules, tensors):
            record = _Record(modules, features)
            features.__dict__["forward"] = _Empty(_width(features))
            for module in modules:
                if any(p is not None and is_lazy(p) for p in module._parameters.values()):
                    # A classifier that learns from its first input what it reads.
                    module.__dict__["forward"] = _Empty(1)
            record.set(x := torch.zeros(()).expand(shape), "input")
            output = record.watch(network, x)
    except Exception:  # whatever it is: its parts run one by one
        return Head(found, False)
    ends = record.meaning(output) in ("pooled", "logits")
    classifier = names[record.classifier] if record.classifier is not None else ""
    return Head(found, ends, classifier, record.looks_at_sizes)


_USUAL_SIZE = 64


class _Zeros(Tensors):
    """Zeros, for what is recorded depends on no value. The large ones take no memory.

    They are not on the device "meta": PyTorch would import its compiler for that, which takes a second.
    """

    def _make(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        shape = like.shape if like.dim() < 2 else ()  # vectors may be written to
        return torch.zeros(shape, dtype=dtype, device=self.device).expand(like.shape)


class _Empty:
    """Empty features of this many channels, as a forward."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __call__(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return x.new_empty(len(x), self.channels, *[max(1, n // 32) for n in x.shape[2:]])


def _width(features: nn.Module) -> int:
    norm: Any = modules_of(features)[-1]
    return norm.num_features


class _Record(Meanings):
    """Meanings are "input", "features", "rectified", "averaged", "pooled" (the same in two dimensions), "logits"."""

    def __init__(self, modules: Sequence[nn.Module], features: nn.Module) -> None:
        super().__init__(modules)
        self.features = features
        self.classifier: nn.Module | None = None
        self.inside: nn.Module | None = None  # the features or the classifier, which are not looked into

    def enter(self, module: nn.Module, given: Any) -> None:
        if self.inside is None and (module is self.features or given == "pooled"):
            if (module is self.features) != (given == "input"):
                raise NotDenseError("its features and its classifier are not called one after the other")
            self.inside = module

    def before(self, packet: Any, args: Sequence[Any]) -> None:
        if self.inside is None and any(self.meaning(a) == "input" for a in args):
            raise NotDenseError("it does something with its images")  # and nothing as large as they are is made

    def leave(self, module: nn.Module, output: Any) -> None:
        if module is self.inside:
            self.inside = None
            if module is not self.features:
                self.classifier = module
            self.set(output, "features" if module is self.features else "logits")

    def after(self, function: Any, args: Sequence[Any], named: dict[str, Any], output: Any) -> None:
        meaning = self.meaning(args[0]) if args else None
        if self.inside is not None or not any(self.knows(a) for a in args):
            return
        packet, shape = function.overloadpacket, output.shape
        if packet in (_aten.relu, _aten.relu_) and meaning == "features":
            self.set(output, "rectified")
        elif packet is _aten.mean and meaning == "rectified":
            dims = {d % args[0].dim() for d in args[1]}
            if dims != set(range(2, args[0].dim())):
                raise NotDenseError("it does not take the mean over all pixels")
            self.set(output, "pooled" if len(shape) == 2 else "averaged")
        elif packet in _SAME and (meaning == "rectified" or meaning == "averaged") and shape[:2] == args[0].shape[:2]:
            self.set(output, "pooled" if len(shape) == 2 else meaning)
        else:
            raise NotDenseError(f"{packet} is not part of a head")
