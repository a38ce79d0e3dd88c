"""How far a contender's step is from the ordinary network's in float64."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_densenet.measure.contender import TrainingStep
from efficient_densenet.measure.kinks import move_zeros_into_gaps
from efficient_densenet.measure.peers import copy_state


def errors(step: TrainingStep) -> dict[str, float]:
    """One step from the same weights, on the same images; errors are shares of the reference's Euclidean norm.

    ``gradient``: of all parameters together. ``statistics``: the running averages of all norms together, after one step
    from 0 and 1; some per cent where they move twice. In evaluation ``output`` alone. Nothing for a contender that is
    another network. The inputs of rectifiers are moved away from zero before, see `kinks`.
    """
    torch.manual_seed(0)  # which the contender was built with
    ordinary = step.described.build().to(step.place.device).train(step.training)
    images = step.images.float().contiguous()
    if step.training:
        move_zeros_into_gaps(ordinary, images, step.place)
    ordinary.to(step.type)
    if not step.made.evaluates_only and not copy_state(ordinary, step.network):
        return {}
    exact = ordinary.double()
    if not step.training:
        with torch.inference_mode():
            return {"output": _share([step.output()], [exact(images.double())])}
    F.cross_entropy(exact(images.double()), step.labels).backward()
    step()
    both = (step.network, exact)
    gradients = ([p.grad for p in network.parameters() if p.grad is not None] for network in both)
    statistics = ([t for name, t in network.named_buffers() if "running" in name] for network in both)
    return {"gradient": _share(*gradients), "statistics": _share(*statistics)}


def _share(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    a, b = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (actual, expected))
    return ((a - b).norm() / b.norm()).item()
