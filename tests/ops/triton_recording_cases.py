"""Recorded launches against the same started one by one, in Triton's interpreter: run by `test_ops_triton`.

In a process of its own, as `triton_cases`.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import pytest
import torch
from triton_interpreter import correct_bfloat16, without_repetition

from efficient_densenet import DenseNet
from efficient_densenet import ops as backends
from efficient_densenet.adopt.step import step_memory
from efficient_densenet.ops import triton as ops
from efficient_densenet.ops.layers import Layers, Reader
from efficient_densenet.ops.protocol import Statistics

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_ops_triton.py, with TRITON_INTERPRET=1", allow_module_level=True)

from efficient_densenet.ops.triton import forward, launch, layers, moments, recording, tiles, tuning

without_repetition()


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(ops, "supports", lambda x: True)
    monkeypatch.setattr(ops, "_state", {"warned": set(), "failed": set()})
    monkeypatch.setattr(forward, "_MUST_WAIT", False)  # the interpreter has no instructions to insert
    monkeypatch.setattr(recording, "_recordings", {})
    correct_bfloat16(monkeypatch.setattr)


def steps(keep, bottleneck, count=2, autocast=False):
    """What each of some training steps makes: the loss, all gradients and buffers."""
    torch.manual_seed(0)
    options = {"growth_rate": 4, "block_config": (2,), "num_init_features": 8, "num_classes": 5, "input_size": 16}
    network = DenseNet(**options, bn_size=2 if bottleneck else None, efficient=True, keep=keep)
    made = []
    for i in range(count):
        torch.manual_seed(i)
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = network(torch.randn(2, 3, 5, 5)).float().square().sum()
        loss.backward()
        made.append([loss, *(p.grad for p in network.parameters()), *(b.clone() for b in network.buffers())])
    return made


@pytest.mark.parametrize(
    ("keep", "bottleneck", "device"),
    [
        ("bottleneck", True, tiles.OTHER),
        ("features", True, tiles.DEVICES[9, 0]),
        ("inputs", True, tiles.OTHER),
        ("bottleneck", False, tiles.DEVICES[9, 0]),
    ],
)
def test_recorded_steps_are_the_same_bit_for_bit(keep, bottleneck, device, monkeypatch):
    monkeypatch.setattr(tiles, "device_of", lambda x: device)
    started, start = [], recording.Recording.start

    def noted(self, *arguments):
        started.append(self)
        start(self, *arguments)

    monkeypatch.setattr(recording.Recording, "start", noted)
    found = steps(keep, bottleneck)
    assert all(count >= 2 for count in Counter(started).values())
    assert {*started} == {*recording._recordings.values()}  # there is nothing that cannot be recorded
    # The same in the order of the engine, and nothing recorded.
    monkeypatch.setattr(backends, "runs_layers", lambda *of_stage: False)
    monkeypatch.setattr(recording, "repeated", lambda *arguments: False)
    started.clear()
    for a, b in zip(found, steps(keep, bottleneck), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not started
    assert not all(torch.equal(x, y) for a, b in pairwise(found) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_recorded_evaluation_is_the_same_bit_for_bit(context, memory_format, monkeypatch):
    """With a stem, and layers that run operation by operation, which rearrange their weights where they must."""
    torch.manual_seed(0)
    options = {"growth_rate": 4, "block_config": (2,), "num_init_features": 8, "bn_size": 2, "num_classes": 5}
    network = DenseNet(**options, input_size=64, efficient=True).eval().to(memory_format=memory_format)
    batches = torch.randn(3, 2, 3, 20, 20)
    monkeypatch.setattr(backends, "runs_layers", lambda *of_stage: False)
    with context():
        found = [network(images) for images in batches]
        monkeypatch.setattr(recording, "repeated", lambda *arguments: False)
        assert all(torch.equal(network(images), output) for images, output in zip(batches, found, strict=True))


def test_gradients_of_weights_under_autocast_are_not_rounded_to_half_precision(monkeypatch):
    """Where all layers run in one call. One after the other, they are made in the type of the cast weights."""
    found = steps("bottleneck", True, 1, autocast=True)[0]
    monkeypatch.setattr(backends, "runs_layers", lambda *of_stage: False)
    rounded = 0
    for a, b in zip(found, steps("bottleneck", True, 1, autocast=True)[0], strict=True):
        assert a.dtype == b.dtype
        if not torch.equal(a, b):
            assert a.dim() == 4 and torch.equal(a.bfloat16().float(), b)
            rounded += 1
    assert rounded == 4  # both convolutions of both layers


def add(made, operation):
    with launch.collected() as launches:
        operation()
    made.add(launches)


def started(made, given):
    made.start(given, [x.data_ptr() for x in given])


def test_operations_share_the_scratch():
    """Each begins at its start, which is aligned; several tensors of one lie behind each other."""
    x, mean, variance = torch.randn(2, 5, 7, 8), torch.full((8,), -1.0), torch.full((8,), -1.0)
    made = recording.Recording([x, mean, variance])
    add(made, lambda: moments.statistics(x, (mean, variance)))
    size = made._scratch
    with launch.collected() as launches:
        for _ in range(2):
            moments.statistics(x, (mean, variance))
    made.add(launches)
    assert size % recording._ALIGNMENT == 0 and made._scratch == 2 * size > 0
    others = [torch.randn(2, 5, 7, 8), torch.empty(8), torch.empty(8)]
    started(made, others)
    assert (torch.cat([mean, variance]) == -1).all()  # to record starts nothing, and nothing goes where it was recorded
    moments.statistics(others[0], (mean, variance))
    assert torch.equal(others[1], mean) and torch.equal(others[2], variance)


def test_tensors_that_lie_in_the_gaps_of_each_other_are_told_apart():
    """By where they begin. A pointer into two of them, or tensors that begin at the same place, are not recorded."""
    whole = torch.arange(24.0).view(4, 6)
    left, right = whole[:, :3], whole[:, 3:]
    made = recording.Recording([left, right])
    add(made, lambda: moments.finish(right, left, torch.ones(3), torch.zeros(2, 3), torch.ones(()), right))
    assert not made.ambiguous
    assert [pointer.tensor for pointer in made._launches[0][2]] == [1, 0, 2, 2, 2, 1]
    add(made, lambda: moments.finish(left[1:], left[1:], *[left[1:]] * 4))
    assert made.ambiguous and recording.Recording([whole, left]).ambiguous


def repeated(x, mean, variance):
    """Whether that was possible, and whether there was such a recording before."""
    asked, into = [], (mean, variance)

    def operations():
        asked.append(1)
        return [lambda: moments.statistics(x, into)]

    return recording.repeated("statistics", [x, *into], operations), not asked


def test_what_lies_elsewhere_has_the_same_layout_and_what_is_aligned_otherwise_has_not():
    x, vectors = torch.zeros(2, 8), torch.zeros(2, 8)
    assert repeated(x, *vectors) == (True, False)
    assert repeated(torch.ones(2, 8), *vectors.clone()) == (True, True)
    for other in [x.bfloat16(), x[:1], torch.zeros(2, 16)[:, :8], torch.zeros(17)[1:].view(2, 8)]:
        assert repeated(other, *vectors) == (True, False)
    mean = vectors[0]
    assert repeated(x, mean, mean) == (True, False)  # two that are one


@pytest.mark.parametrize("context", [nullcontext, torch.inference_mode, torch._C._AutoDispatchBelowAutograd])
def test_what_copies_a_tensor_is_not_recorded(context):
    """PyTorch would do that once, and not again. In inference and in operators it does not say what it does."""
    spread, vectors = torch.randn(8, 2).t(), torch.full((2, 8), -1.0)
    with context():
        copies = [spread.contiguous, spread.double, lambda: spread.reshape(-1), spread.clone, vectors.zero_]
        views = [spread.t, spread.float, vectors.contiguous, lambda: spread.t().reshape(-1), spread.unbind]
        for i, operation in enumerate([*copies, *views]):
            is_view = recording.repeated(i, [torch.zeros(2, 8)], lambda operation=operation: [operation])
            assert is_view == (operation in views)
        vectors.fill_(-1.0)
        assert repeated(spread, *vectors) == (False, False) and repeated(spread, *vectors) == (False, True)
        assert (vectors == -1).all()
        with pytest.warns(UserWarning, match="no slice of the channels"):
            ops.statistics(spread, Statistics(*vectors))
    torch.testing.assert_close(vectors[0], spread.mean(0))


def test_what_cannot_start_is_not_recorded_again():
    attempts, x, vectors = [], torch.zeros(2, 8), torch.zeros(2, 8)

    def cannot():
        attempts.append(1)
        raise launch.CannotStart

    def asks_for_too_much():
        raise torch.OutOfMemoryError

    def fails(*arguments, **named):
        raise RuntimeError("invalid argument")

    with pytest.raises(launch.CannotStart):
        recording.repeated("broken", [x], lambda: [cannot])
    assert not recording.repeated("broken", [x], lambda: [cannot]) and len(attempts) == 1
    with pytest.raises(torch.OutOfMemoryError):
        recording.repeated("large", [x], lambda: [asks_for_too_much])
    assert recording.repeated("large", [x], lambda: [lambda: None])  # that may be over
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_compiled_for", lambda kernel, programs, tile, arguments: partial(fails, *arguments))
        with pytest.raises(launch.CannotStart):
            repeated(x, *vectors)
    assert repeated(x, *vectors) == (False, True)


@pytest.mark.parametrize(
    ("keep", "in_one_call"), [("bottleneck", True), ("bottleneck", False), ("features", True), ("inputs", True)]
)
def test_the_scratch_that_is_planned_is_that_of_the_recordings(keep, in_one_call, monkeypatch):
    """Of all operations of a step: those of a stem, a transition and a head among them, alone and in one call."""
    planned, found = [], []
    plan, start = recording.scratch_of, recording.Recording.start

    def planning(*arguments):
        planned.append(plan(*arguments))
        return planned[-1]

    def starting(self, *arguments):
        found.append(self._scratch)
        start(self, *arguments)

    monkeypatch.setattr(recording, "scratch_of", planning)
    monkeypatch.setattr(recording.Recording, "start", starting)
    monkeypatch.setattr(ops, "plans", lambda x: True)
    if not in_one_call:
        monkeypatch.setattr(backends, "runs_layers", lambda *of_stage: False)
    options = {"growth_rate": 4, "block_config": (2, 1), "num_init_features": 8, "bn_size": 2, "num_classes": 5}
    network = DenseNet(**options, input_size=64, efficient=True, keep=keep).to(memory_format=torch.channels_last)
    step_memory(network, (3, 20, 20), 2)
    assert not found
    network(torch.randn(2, 3, 20, 20)).square().sum().backward()
    assert planned == found and len({*found}) > 5


def test_the_latest_recordings_are_kept(monkeypatch):
    monkeypatch.setattr(recording, "_MOST", 2)
    found = [repeated(torch.zeros(rows, 8), *torch.zeros(2, 8))[1] for rows in (1, 2, 1, 3, 2, 1)]
    assert found == [False, False, True, False, True, False]


def test_a_layer_that_cannot_start_is_left_to_the_operations(monkeypatch):
    """From then on for all such layers, without another attempt; and with the results of plain PyTorch."""
    attempts = []

    def fail(*arguments, **options):
        attempts.append(1)
        raise RuntimeError("PassManager::run failed")

    expected = steps("features", True, 1)
    monkeypatch.setattr(recording, "_recordings", {})
    monkeypatch.setattr(forward.norm_relu_conv_kernel, "warmup", fail)
    with pytest.warns(UserWarning, match="norm_relu_conv for torch.float32: norm_relu_conv_kernel cannot be compiled"):
        found = steps("features", True, 1)
    assert None in recording._recordings.values()
    for a, b in zip(found[0], expected[0], strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(b.abs().max().item(), 1)


def evaluated(second, spread=False):
    """What three layers make in evaluation, whose second convolutions and norms are these; None where they are left."""
    generator = torch.Generator().manual_seed(0)

    def parts(inputs, outputs):
        weight = torch.randn(outputs, inputs, 1, 1, generator=generator)
        return weight, *torch.rand(4, inputs, generator=generator)

    firsts, choices = [parts(4 + 4 * i, 8) for i in range(3)], [parts(8, 4) for _ in range(2)]
    readers = []
    for i, first in enumerate(firsts):
        for (weight, scale, bias, mean, variance), start in ((first, 0), (choices[second[i]], 16 + 8 * i)):
            norm_weight = scale.repeat_interleave(2)[::2] if spread else scale
            readers.append(Reader(weight, norm_weight, bias, Statistics(mean, variance), 1e-5, start))
    features = torch.zeros(1, 3, 3, 16)
    features[..., :4] = torch.randn(1, 3, 3, 4, generator=generator)
    folded = torch.empty(3, sum(reader.weight.shape[1] for reader in readers))
    bottlenecks = [torch.empty(1, 3, 3, 8)] * 3
    run = layers.run(Layers(features, 4, readers, 2, bottlenecks, torch.zeros(2, 40), folded, {}), True, False)
    return features if run == 3 else None


def test_layers_that_share_modules_in_another_way_are_not_the_same():
    expected = evaluated([0, 1, 1])
    recording._recordings.clear()
    assert not torch.equal(evaluated([0, 1, 0]), expected)
    assert torch.equal(evaluated([0, 1, 1]), expected) and torch.equal(evaluated([0, 1, 1]), expected)


def test_layers_whose_vectors_would_be_copied_are_left():
    assert evaluated([0, 1, 1], spread=True) is None and [*recording._recordings.values()] == [None]


def test_tuning_keeps_all_outputs_of_a_pointwise_gradient_in_a_tile(monkeypatch):
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(tuning, "_found", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_milliseconds", lambda attempt, tile, device: tile.depth)
    x, device = torch.zeros(9, 64), tiles.DEVICES[9, 0]
    of = tiles.product(x, 48, 1, 1)._replace(device=device, precision="tf32")
    tile = tiles.grad_x_pointwise(of)
    assert tuning.tuned(tile, lambda tile: None, "grad_x_pointwise", x, of).depth == tile.depth >= 48
