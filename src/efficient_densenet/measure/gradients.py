"""Run one training step of the ordinary and of an efficient network, and compare everything that it produced.

The comparison is a list of `Difference`s: plain data, on which a verdict is a function. As a program this is the
worker that compares on one of several devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from efficient_densenet.execution import Efficient
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.networks import Network
from efficient_densenet.measure.processes import serve

KINDS = ("output", "loss", "input gradient", "parameter gradient", "buffer")


@dataclass(frozen=True)
class Case:
    """What is compared, as plain data.

    Attributes:
        network: the network; both forms get the same random weights.
        efficient: the way that is compared with the ordinary one.
        training: training mode or evaluation mode; backward runs in both.
        dtype: of weights and images: ``"float32"``, ``"float64"`` or ``"bfloat16"``.
        batch_size: images over all devices.
        seed: of weights, images, labels and dropout.
    """

    network: Network
    efficient: Efficient
    training: bool
    dtype: str
    batch_size: int
    seed: int


class Difference(NamedTuple):
    """How one tensor of the efficient network differs from the ordinary network's.

    Attributes:
        kind: one of `KINDS`.
        name: of the parameter or buffer; for the others the kind again.
        largest: the largest absolute difference; NaN where one of the two is not finite, infinite where one is missing.
        scale: the largest absolute value of the ordinary network's tensor.
        identical: both are equal bit for bit, and finite.
        rank: the device it was seen on.
    """

    kind: str
    name: str
    largest: float
    scale: float
    identical: bool
    rank: int = 0

    @property
    def relative(self) -> float:
        """`largest` as a share of `scale`; infinite where it is no number."""
        if math.isnan(self.largest):
            return math.inf
        return self.largest / self.scale if self.scale > 0 else self.largest


def compare(case: Case, place: Place) -> list[Difference]:
    """All differences after one step from the same weights, on the share of the batch that belongs to `place`."""
    with _deterministic():
        expected, actual = (_step(case, place, network) for network in _pair(case))
    return [
        _difference(kind, name, actual.get((kind, name)), expected.get((kind, name)), place.rank)
        for kind, name in expected | actual
    ]


def not_identical(differences: Sequence[Difference]) -> list[Difference]:
    """The verdict on ways that promise the same bits: those that broke the promise, the worst first."""
    return sorted((d for d in differences if not d.identical), key=lambda d: d.relative, reverse=True)


_Results = dict[tuple[str, str], Tensor | None]


def _pair(case: Case) -> list[nn.Module]:
    torch.manual_seed(case.seed)
    networks = [case.network.build(efficient) for efficient in (False, case.efficient)]
    for module in networks[0].modules():
        if isinstance(module, _BatchNorm):  # a gain of 1 or a mean of 0 would hide a mistake
            for name, low in (("weight", 0.5), ("running_var", 0.5), ("bias", -0.5), ("running_mean", -0.5)):
                nn.init.uniform_(getattr(module, name), low, low + 1)
    networks[1].load_state_dict(networks[0].state_dict(), strict=True)
    return [network.train(case.training) for network in networks]


def _step(case: Case, place: Place, network: nn.Module) -> _Results:
    dtype = getattr(torch, case.dtype)
    network = network.to(place.device, dtype)
    images, labels = (place.share(x) for x in case.network.batch(case.batch_size, case.seed))
    images = images.to(dtype).requires_grad_()
    wrapped = place.wrap(network)
    torch.manual_seed(case.seed + place.rank)  # dropout
    output = wrapped(images)
    loss = F.cross_entropy(output, labels)
    loss.backward()
    results: _Results = {
        ("output", "output"): output.detach(),
        ("loss", "loss"): loss.detach(),
        ("input gradient", "input gradient"): images.grad,
    }
    results |= {("parameter gradient", name): p.grad for name, p in network.named_parameters()}
    results |= {("buffer", name): b for name, b in network.named_buffers()}
    return results


def _difference(kind: str, name: str, actual: Tensor | None, expected: Tensor | None, rank: int) -> Difference:
    scale = 0.0 if expected is None else expected.abs().max().item()
    if actual is None or expected is None:
        return Difference(kind, name, math.inf, scale, False, rank)
    largest = (actual.double() - expected.double()).abs().max().item()
    identical = torch.equal(actual, expected) and bool(expected.isfinite().all())
    return Difference(kind, name, largest, scale, identical, rank)


@contextmanager
def _deterministic() -> Iterator[None]:
    """On a GPU, convolutions may otherwise add up in another order each time."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def _start(job: dict[str, Any], place: Place) -> dict[str, Any]:
    case = Case(**(job | {"network": Network(**job["network"])}))
    return {"compare": lambda: compare(case, place)}


if __name__ == "__main__":
    serve(_start)
