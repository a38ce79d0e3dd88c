"""Forget the concatenation and the activation after forward; compute them again in backward, bit for bit.

The autograd graph is the ordinary one, node for node: only what its nodes *store* is replaced, through saved-tensor
hooks, by a promise to compute it again. So the sums of backward run in the ordinary order, gradients of gradients
exist, and every result equals the ordinary one in its last bit.

The recomputation runs norm and activation alone, never the convolution, on the features that are alive anyway. It
changes nothing: the norm's buffers are replaced by copies while it runs, so running statistics and
`num_batches_tracked` move once per step, however often backward runs. (Checkpointing that re-runs the whole layer
moves them twice: https://github.com/pytorch/pytorch/issues/96136.)

Saved for backward: references to the inputs, and the small tensors (weights, batch statistics). Extra time: one
concatenation, norm and activation per convolution, in backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from efficient_densenet.execution import concatenate


def norm_relu_conv(inputs: Sequence[Tensor], norm: nn.Module, relu: nn.Module, conv: nn.Module) -> Tensor:
    """The function of `concatenate.norm_relu_conv`, bit for bit, storing neither concatenation nor activation.

    Norm and activation must be without hooks, which would see the second run too.
    """
    prologue = _Prologue(inputs, norm, relu)
    with saved_tensors_hooks(prologue.pack, prologue.unpack):
        return conv(prologue.run())


@contextmanager
def forgotten(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """``module(x)``, for which everything that runs in this context saves a promise to compute it again.

    Kept for backward: `x`, once. The module must be without randomness, and without hooks.
    """
    again, source, autocast = _Stage(module), _Kept(x, x._version), _autocast(x.device.type)
    output = module(x)
    made = weakref.ref(output)  # not itself, which the hooks would keep

    def pack(tensor: Tensor) -> _Kept | None:
        return None if tensor is made() else _Kept(tensor, tensor._version)

    def unpack(packed: _Kept | None) -> Tensor:
        if packed is not None:
            return _unchanged(packed)
        with torch.no_grad(), autocast:
            return again.rerun(_unchanged(source))

    with saved_tensors_hooks(pack, unpack):
        yield output


class _Kept(NamedTuple):
    """A tensor that stays, with the version that autograd would have checked (hooks switch its check off)."""

    tensor: Tensor
    version: int


class _Forgotten(NamedTuple):
    """The promise that the tensor saved in this place by the run is the one saved in this place by a rerun."""

    place: int


class _Prologue:
    """``activation(norm(concat(inputs)))``: run once, forgotten, and rerun when backward asks for it."""

    def __init__(self, inputs: Sequence[Tensor], norm: nn.Module, activation: nn.Module) -> None:
        self.inputs = [_Kept(x, x._version) for x in inputs]
        self.stages = [_Stage(norm), _Stage(activation)]
        # Everything of the concatenation's size is forgotten; what is smaller is kept.
        self.shape = torch.Size((inputs[0].shape[0], sum(x.shape[1] for x in inputs), *inputs[0].shape[2:]))
        self.autocast = _autocast(inputs[0].device.type)
        self.num_saved = 0
        self.activated: weakref.ref[Tensor] | None = None  # known once the run is over; weak, for it is forgotten
        self.recomputed: dict[int, Tensor] = {}

    def run(self) -> Tensor:
        """The forward pass, by the modules themselves. To be called under the hooks `pack` and `unpack`."""
        x = concatenate.concat([kept.tensor for kept in self.inputs])
        for stage in self.stages:
            x = stage.module(x)
        self.activated = weakref.ref(x)
        return x

    def pack(self, tensor: Tensor) -> _Kept | _Forgotten:
        if self.activated is not None:  # the run is over, and the convolution saves its input and weight
            return _Forgotten(self.num_saved) if tensor is self.activated() else _Kept(tensor, tensor._version)
        index, self.num_saved = self.num_saved, self.num_saved + 1
        return _Forgotten(index) if tensor.shape == self.shape else _Kept(tensor, tensor._version)

    def unpack(self, packed: _Kept | _Forgotten) -> Tensor:
        if isinstance(packed, _Kept):
            return _unchanged(packed)
        if packed.place not in self.recomputed:
            recomputed = self._rerun()
            if not _when_backward_ends(recomputed.clear):
                return recomputed[packed.place]
            self.recomputed = recomputed
        # Handed out once per backward: the memory goes as soon as the last node has used it.
        return self.recomputed.pop(packed.place)

    def _rerun(self) -> dict[int, Tensor]:
        saved: list[Tensor] = []

        def save(x: Tensor) -> Tensor:
            saved.append(x.detach())
            return saved[-1]

        leaves = [_unchanged(x).detach().requires_grad_(x.tensor.requires_grad) for x in self.inputs]
        with (
            torch.enable_grad(),
            self.autocast,
            saved_tensors_hooks(save, lambda x: x),
        ):
            x = concatenate.concat(leaves)
            for stage in self.stages:
                x = stage.rerun(x)
        return {i: x for i, x in enumerate([*saved, x.detach()]) if x.shape == self.shape}


class _Stage:
    """A module as it was at the time of its call: parameters, mode, and the buffers that its result depends on."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.training = module.training
        self.parameters = {k: _Kept(p, p._version) for k, p in module.named_parameters()}
        # In evaluation the result depends on the buffers, which a later training step may change: copy them now.
        # In training it depends on the batch alone.
        self.buffers = None if module.training else _clones(module)

    def rerun(self, x: Tensor) -> Tensor:
        state = {k: _unchanged(p) for k, p in self.parameters.items()}
        state |= _clones(self.module) if self.buffers is None else self.buffers
        with _mode(self.module, self.training):
            return torch.func.functional_call(self.module, state, (x,)) if state else self.module(x)


def _clones(module: nn.Module) -> dict[str, Tensor]:
    return {k: b.detach().clone() for k, b in module.named_buffers()}


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    now = module.training
    module.training = training
    try:
        yield
    finally:
        module.training = now


def _unchanged(kept: _Kept) -> Tensor:
    """The kept tensor, if it still holds what forward saw: the check that autograd makes where no hooks are."""
    if kept.tensor._version != kept.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a tensor of shape {tuple(kept.tensor.shape)} is at version {kept.tensor._version}, and backward "
            f"needs version {kept.version} of it"
        )
    return kept.tensor


def _autocast(device: str) -> AbstractContextManager[object]:
    """A context that sets mixed precision as it is now, to be entered in backward."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=enabled)


def _when_backward_ends(callback: Callable[[], None]) -> bool:
    """Have `callback` called when the running backward is over; False if none is running."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(callback)
    except RuntimeError:
        return False
    return True
