"""The check of a GPU's kernels finds whatever is wrong: with backends that lie, race and forget on purpose."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from operands import EVERY_OPERATION
from torch import Tensor

from efficient_densenet.ops import eager
from efficient_densenet.ops.triton import check

CPU = torch.device("cpu")
SHAPES = (check.Shape(16, 8, 1), check.Shape(8, 4, 3), check.Shape(16, 8, 1, 2))


def faults(backend, kind="float32"):
    return check.faults(backend, CPU, kind, rows=1600, shapes=SHAPES)


def with_one_changed(name, change):
    """Plain PyTorch, where one operation is followed by `change`, which gets its arguments and its result."""

    def changed(*arguments):
        result = getattr(eager, name)(*arguments)
        change(arguments, result)
        return result

    return SimpleNamespace(**{other: getattr(eager, other) for other in EVERY_OPERATION} | {name: changed})


def written(name, arguments, result):
    """A tensor that the operation writes or returns."""
    if name == "norm_relu_conv_backward":
        return arguments[0].grad_x
    where = {"norm_relu_conv": 3, "norm_relu_max_pool": 2, "norm_relu_mean": 2, "finish": 5, "statistics": 1}
    where |= {"norm_relu_max_pool_backward": 3, "norm_relu_mean_backward": 3, "fold_norm": 4}
    found = arguments[where[name]]
    return found if isinstance(found, Tensor) else found[1]


@pytest.mark.parametrize("kind", check.KINDS)
def test_what_is_right_has_no_faults(kind):
    assert faults(eager, kind) == []


@pytest.mark.parametrize("name", EVERY_OPERATION)
def test_a_single_wrong_value_is_found(name):
    def lie(arguments, result):
        target = written(name, arguments, result)
        target[(-1,) * target.dim()] += 0.1 + target.abs().max()

    found = faults(with_one_changed(name, lie))
    assert found and all(fault.startswith(name) and "off by" in fault for fault in found)


@pytest.mark.parametrize("name", EVERY_OPERATION)
def test_a_race_is_found_however_small_its_errors(name):
    calls = itertools.count()

    def race(arguments, result):
        if next(calls) % 5 == 4:
            target = written(name, arguments, result)
            target[(-1,) * target.dim()] += 1e-6 * target.abs().max()

    found = faults(with_one_changed(name, race))
    assert found and all(fault.startswith(name) and "another result each time" in fault for fault in found)


@pytest.mark.parametrize("name", ["norm_relu_conv", "finish", "norm_relu_max_pool"])
def test_what_is_not_written_is_found(name):
    def forget(arguments, result):
        written(name, arguments, result)[-1] = torch.nan

    assert all("off by nan" in fault for fault in faults(with_one_changed(name, forget)))


@pytest.mark.parametrize("name", ["norm_relu_conv", "finish", "norm_relu_max_pool"])
@pytest.mark.parametrize("before", [True, False])
def test_writing_outside_is_found(name, before):
    def spill(arguments, result):
        out = written(name, arguments, result)
        out._base[..., 15 if before else -16] = 0

    found = faults(with_one_changed(name, spill))
    assert found and all("writes outside" in fault for fault in found)


def test_gradients_that_are_not_added_are_found():
    def changed(operands):
        return eager.norm_relu_conv_backward(operands._replace(accumulate=False))

    backend = with_one_changed("finish", lambda *found: None)
    backend.norm_relu_conv_backward = changed
    assert len(faults(backend)) == 2  # a transition's are not meant to be


@pytest.mark.parametrize("part", [0, 1, 2])
def test_wrong_sums_and_weight_gradients_are_found(part):
    found = faults(with_one_changed("norm_relu_conv_backward", lambda arguments, result: result[part].mul_(1.1)))
    assert len(found) == len(SHAPES)


def test_what_flows_through_the_statistics_is_looked_at():
    found = faults(with_one_changed("norm_relu_mean_backward", lambda arguments, result: arguments[4].zero_()))
    assert len(found) == 1


def test_the_kinds_of_products(monkeypatch):
    assert check.kind_of(torch.bfloat16) == "bfloat16"
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for precision, kind in (("tf32", "tf32"), ("ieee", "float32")):
            conv.fp32_precision = precision
            assert check.kind_of(torch.float32) == kind
    finally:
        conv.fp32_precision = before
