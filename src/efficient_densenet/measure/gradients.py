"""Run one training step of the ordinary and of an efficient network, and compare everything that it produced.

The comparison is a list of `Difference`s: plain data, on which a verdict is a function. As a program this is the
worker that compares on one of several devices.
"""

from __future__ import annotations

import copy
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
from efficient_densenet.measure.kinks import move_zeros_into_gaps
from efficient_densenet.measure.networks import Network
from efficient_densenet.measure.processes import serve

KINDS = ("output", "loss", "input gradient", "parameter gradient", "buffer")
WHOLE = "whole gradient"

FLOOR = {"float64": 1e-10, "float32": 2.0**-15, "bfloat16": 2.0**-2}
"""Errors up to this share of a tensor's norm pass, however small the ordinary network's error happens to be.

float64: the ordinary network is the reference itself; its sums are in another order. float32: 256 eps, about the most
by which rounding is off where the terms of a small tensor's gradient nearly cancel; a mistake of one per cent is three
hundred times this. bfloat16: an activation next to zero may fall on its other side, see `kinks`, and the gradient of a
small tensor hangs on a few of them; mistakes show in `WHOLE_FLOOR`.
"""
WHOLE_FLOOR = {"float64": 1e-10, "float32": 2.0**-20, "bfloat16": 2.0**-6}
"""The same for all parameter gradients together, which leave less to luck: 8 eps in float32, two in bfloat16."""


@dataclass(frozen=True)
class Case:
    """What is compared, as plain data.

    Attributes:
        network: the network; all forms get the same random weights.
        efficient: the way that is compared with the ordinary one.
        keep: what it keeps, see `DenseNet`.
        training: training mode or evaluation mode; backward runs in both.
        dtype: of weights and images: ``"float32"``, ``"float64"`` or ``"bfloat16"``.
        batch_size: images over all devices.
        seed: of weights, images, labels and dropout.
    """

    network: Network
    efficient: Efficient
    keep: str
    training: bool
    dtype: str
    batch_size: int
    seed: int

    @property
    def bit_for_bit(self) -> bool:
        """Whether the way promises the same bits; else it promises errors like the ordinary network's."""
        return self.efficient is not True


class Difference(NamedTuple):
    """How far one tensor is from the reference: the ordinary network's, or its in float64 where rounding is judged.

    Sizes are Euclidean norms over all elements.

    Attributes:
        kind: one of `KINDS`, or `WHOLE`.
        name: of the parameter or buffer; for the others the kind again.
        size: of the reference.
        error: of the efficient network; NaN where it is not finite, infinite where the tensor is missing.
        ordinary_error: of the ordinary network in the same type, in contiguous or in channels-last memory, whichever
            has the smaller error of the whole gradient; 0 where the ordinary network is the reference.
        identical: both networks' tensors are equal bit for bit, and finite.
        rank: the device it was seen on.
    """

    kind: str
    name: str
    size: float
    error: float
    ordinary_error: float
    identical: bool
    rank: int = 0

    def share(self, error: float) -> float:
        """An error as a share of `size`; infinite where it is NaN."""
        if math.isnan(error):
            return math.inf
        return error / self.size if self.size > 0 else error


def compare(case: Case, place: Place) -> list[Difference]:
    """All differences after one step from the same weights, on the share of the batch that belongs to `place`."""
    with _deterministic():
        ordinary, efficient, reference = _networks(case, place)
        other_form = copy.deepcopy(ordinary)  # before a step moves its statistics
        expected, actual = _step(case, place, ordinary), _step(case, place, efficient)
        exact = expected
        if reference is not None:
            exact = _step(case, place, reference)
            other = _step(case, place, other_form, torch.channels_last)
            expected = min(expected, other, key=lambda results: _whole_error(results, exact))
    return [
        _difference(*key, actual.get(key), expected.get(key), exact.get(key), place.rank) for key in expected | actual
    ]


def whole_gradient(differences: Sequence[Difference]) -> list[Difference]:
    """For each device the difference of all parameter gradients together, as of one long vector."""
    whole = []
    for rank in sorted({d.rank for d in differences}):
        parts = [d for d in differences if d.kind == "parameter gradient" and d.rank == rank]
        size = math.hypot(*(d.size for d in parts))
        error = math.hypot(*(d.error for d in parts))
        ordinary_error = math.hypot(*(d.ordinary_error for d in parts))
        whole.append(Difference(WHOLE, WHOLE, size, error, ordinary_error, all(d.identical for d in parts), rank))
    return whole


def _whole_error(results: _Results, exact: _Results) -> float:
    """The error of all parameter gradients together."""
    parts = [_difference(*key, results.get(key), results.get(key), exact[key], 0) for key in exact]
    return whole_gradient(parts)[0].error


def not_identical(differences: Sequence[Difference]) -> list[Difference]:
    """The verdict on ways that promise the same bits: those that broke the promise, the worst first."""
    return sorted((d for d in differences if not d.identical), key=lambda d: d.share(d.error), reverse=True)


def strain(difference: Difference, dtype: str) -> float:
    """The error as a share of what is allowed.

    The whole gradient may be as far off as the ordinary network's, a single tensor, which hangs more on luck, twice as
    far; plus `WHOLE_FLOOR` and `FLOOR`.
    """
    times, floor = (1, WHOLE_FLOOR[dtype]) if difference.kind == WHOLE else (2, FLOOR[dtype])
    allowed = times * difference.ordinary_error + floor * difference.size
    if difference.error == 0:
        return 0.0
    # A reference that is not finite allows nothing.
    return difference.error / allowed if math.isfinite(difference.error) and 0 < allowed < math.inf else math.inf


_Results = dict[tuple[str, str], Tensor | None]


def _networks(case: Case, place: Place) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """The ordinary network, the efficient one, and where rounding is judged the ordinary one in float64."""
    torch.manual_seed(case.seed)
    ordinary = case.network.build(efficient=False)
    efficient = case.network.build(case.efficient, case.keep)
    for module in ordinary.modules():
        if isinstance(module, _BatchNorm):  # a weight of 1 or a mean of 0 would hide a mistake
            for name, low in (("weight", 0.5), ("running_var", 0.5), ("bias", -0.5), ("running_mean", -0.5)):
                nn.init.uniform_(getattr(module, name), low, low + 1)
    dtype = getattr(torch, case.dtype)
    for network in (ordinary, efficient):
        network.to(place.device, dtype).train(case.training)
    reference = None
    if not case.bit_for_bit:
        _seed_dropout(case, place)
        move_zeros_into_gaps(ordinary, _batch(case, place)[0], place)
        if dtype != torch.float64:
            reference = copy.deepcopy(ordinary).double()
    efficient.load_state_dict(ordinary.state_dict(), strict=True)
    return ordinary, efficient, reference


def _batch(case: Case, place: Place) -> tuple[Tensor, Tensor]:
    images, labels = (place.share(x) for x in case.network.batch(case.batch_size, case.seed))
    return images.to(getattr(torch, case.dtype)), labels


def _seed_dropout(case: Case, place: Place) -> None:
    torch.manual_seed(case.seed + place.rank)


def _step(
    case: Case, place: Place, network: nn.Module, memory_format: torch.memory_format = torch.contiguous_format
) -> _Results:
    images, labels = _batch(case, place)
    network.to(memory_format=memory_format)
    images = images.to(next(network.parameters()).dtype, copy=True, memory_format=memory_format).requires_grad_()
    wrapped = place.wrap(network)
    _seed_dropout(case, place)
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


def _difference(
    kind: str, name: str, actual: Tensor | None, expected: Tensor | None, exact: Tensor | None, rank: int
) -> Difference:
    if actual is None or expected is None or exact is None:
        return Difference(kind, name, 0.0, math.inf, math.inf, False, rank)
    identical = torch.equal(actual, expected) and bool(expected.isfinite().all())
    size, error, ordinary_error = (
        x.double().norm().item() for x in (exact, actual.double() - exact.double(), expected.double() - exact.double())
    )
    return Difference(kind, name, size, error, ordinary_error, identical, rank)


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
