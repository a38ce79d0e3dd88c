"""Norms that bring their activation with them, as timm's do: whether they do that and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from efficient_densenet.execution.hooks import modes_kept

_tried: dict[tuple[type, ...], bool] = {}


def only_rectifies(norm: Any) -> bool:
    """Whether `norm` computes ``relu(batch_norm(x))``; tried once for each kind of norm."""
    if not isinstance(norm, _BatchNorm) or any("forward" in module.__dict__ for module in norm.modules()):
        return False
    if any(not isinstance(module, nn.Identity) and module is not norm.act for module in norm.children()):
        return False
    if torch.compiler.is_compiling():  # a trial is nothing to compile
        return True
    kind = tuple(type(module) for module in norm.modules())
    if kind not in _tried:
        _tried[kind] = all(_agree(norm, training) for training in (False, True))
    return _tried[kind]


@torch.no_grad()
def _agree(norm: _BatchNorm, training: bool) -> bool:
    dims = 1 if isinstance(norm, nn.BatchNorm1d) else 3 if isinstance(norm, nn.BatchNorm3d) else 2
    training = training and not isinstance(norm, nn.SyncBatchNorm)  # which needs the other processes
    generator = torch.Generator().manual_seed(0)
    channels, cpu = norm.num_features, torch.device("cpu")
    x = torch.randn(3, channels, *[2] * dims, generator=generator, device=cpu)
    mean, bias = torch.randn(2, channels, generator=generator, device=cpu)
    variance, weight = torch.rand(2, channels, generator=generator, device=cpu) + 0.5
    names = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance}
    state: dict[str, Tensor] = {k: t.clone() for k, t in names.items() if getattr(norm, k) is not None}
    if norm.num_batches_tracked is not None:
        state["num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=cpu)
    own = training or norm.running_mean is None  # statistics of the batch
    normed = F.batch_norm(
        x, None if own else mean, None if own else variance, state.get("weight"), state.get("bias"), own, eps=norm.eps
    )
    with modes_kept(norm):
        for module in norm.modules():
            module.training = training
        try:
            return torch.allclose(functional_call(norm, state, (x.clone(),)), normed.relu(), rtol=1e-4, atol=1e-4)
        except Exception:  # whatever it wants, it is something else
            return False
