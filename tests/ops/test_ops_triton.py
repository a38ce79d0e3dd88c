"""The Triton kernels without a GPU: in the interpreter, and what is started when."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operands import Operands, weight_for
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import needs_interpreter

from efficient_densenet import DenseNet, backends, ops
from efficient_densenet.execution import stage
from efficient_densenet.ops import profiled, reference
from efficient_densenet.ops import triton as kernels
from efficient_densenet.ops.triton import launch, recording

pytest.importorskip("triton")

HERE = Path(__file__).parent
# The tests beside this one, and the package that is being tested.
PYTHONPATH = os.pathsep.join([str(HERE.parent), str(Path(ops.__file__).parents[2])])
INTERPRETER = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}


@needs_interpreter
def test_every_kernel_in_the_interpreter():
    """In a process of its own: the interpreter must be on before the kernels are defined."""
    cases = [str(HERE / f"triton_{name}.py") for name in ("cases", "fallback_cases", "recording_cases")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cases]
    result = subprocess.run(command, env=INTERPRETER, cwd=HERE.parents[1], capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


@needs_interpreter
def test_tests_for_a_gpu_are_sound():
    """Some of those below, in the interpreter, the CPU in the GPU's place: or they would rot where there is none."""
    chosen = "(reference or head) and 13 or max_pool and 9 or falls_back"
    options = ["-q", "-p", "no:cacheprovider", "-p", "triton_interpreter", "-m", "gpu", "-k", chosen]
    files = [str(HERE / name) for name in ("test_ops_triton_gpu.py", "test_triton_steps_gpu.py")]
    command = [sys.executable, "-m", "pytest", *options, *files]
    result = subprocess.run(command, env=INTERPRETER, cwd=HERE.parents[1], capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", result.stdout)
    assert result.returncode == 0 and passed and int(passed[1]) >= 14, result.stdout + result.stderr


def test_kernels_are_started_as_triton_would(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(HERE / "triton_launches.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout == "the same\n", result.stdout + result.stderr


class Started(TorchDispatchMode):
    """The operations of PyTorch that compute something: no views, no empty tensors, no conversion to the same type."""

    NOTHING = (
        "empty",
        "new_empty",
        "view",
        "slice",
        "select",
        "narrow",
        "split",
        "unbind",
        "movedim",
        "permute",
        "to.",
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(self.NOTHING):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("bottleneck", "forward", "backward"), [(False, 4, 5), (True, 7, 10)])
def test_a_layer_starts_its_kernels_and_nothing_else(bottleneck, forward, backward, monkeypatch):
    """Forward: fold, rectify for a window, convolve, merge. Backward: both gradients, what sums them up; finishing."""
    counts, launched = [], []

    def counting(run):
        def counted(*arguments):
            before = len(launched)
            with Started() as started:
                result = run(*arguments)
            counts.append((len(launched) - before, len(started.names)))
            return result

        return counted

    monkeypatch.setattr(launch, "run", lambda kernel, *arguments: launched.append(kernel))
    monkeypatch.setattr(recording, "repeated", lambda *arguments: False)
    monkeypatch.setattr(ops, "backend", lambda x: kernels)
    monkeypatch.setattr(ops, "runs_layers", lambda x, readers, memo: False)
    for name in ("forward", "backward"):
        monkeypatch.setattr(stage, name, counting(getattr(stage, name)))
    for layers in (2, 7):
        network = DenseNet(block_config=(layers,), bn_size=4 if bottleneck else None, efficient=True)
        network.to(memory_format=torch.channels_last)(torch.randn(2, 3, 8, 8)).sum().backward()
    few, many = counts[:2], counts[2:]
    for (kernels_few, others_few), (kernels_many, others_many), expected in zip(
        few, many, (forward, backward), strict=True
    ):
        assert (kernels_many - kernels_few, others_many - others_few) == (5 * expected, 0)


def operations(run):
    """How often PyTorch was asked for an operation, not counting those that these are made of."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    of_pytorch = [event for event in profile.events() if event.name.startswith("aten::")]
    return sum(not (event.cpu_parent and event.cpu_parent.name.startswith("aten::")) for event in of_pytorch)


@pytest.mark.parametrize(("bottleneck", "forward", "backward"), [(False, 0, 4), (True, 1, 8)])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_the_host_does_for_each_layer_of_a_block_that_is_replayed(
    bottleneck, forward, backward, autocast, monkeypatch
):
    """It allocates a bottleneck output and each weight's gradient; autograd gives each parameter a gradient of its own.

    Under autocast, weights are allocated in the other type too. All else is done once for a block.
    """
    monkeypatch.setattr(launch, "run", lambda kernel, *arguments: None)
    monkeypatch.setattr(ops, "_choose", lambda x: kernels)
    monkeypatch.setattr(ops, "runs_layers", lambda x, readers, memo: True)
    monkeypatch.setattr(profiled, "_count", lambda *_: None)  # whose events hold operations too
    for name in ("run_layers", "run_layers_backward"):  # recordings are started
        monkeypatch.setattr(kernels, name, lambda layers, *_: len(layers.readers) // layers.per_layer)
    counts = []
    for layers in (2, 7):
        network = DenseNet(block_config=(layers,), bn_size=4 if bottleneck else None, efficient=True)
        network.to(memory_format=torch.channels_last)
        for _ in range(3):  # what is found out once
            network.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses = []
                of_forward = operations(
                    lambda run=network, into=losses: into.append(run(torch.randn(2, 3, 8, 8)).sum())
                )
            of_backward = operations(losses[0].backward)
        counts.append((of_forward, of_backward))
    weights = (1 + bottleneck) * autocast
    (few_forward, few_backward), (many_forward, many_backward) = counts
    assert many_forward - few_forward == 5 * (forward + weights)
    assert many_backward - few_backward == 5 * backward


def test_cpu_tensors_go_elsewhere():
    assert ops.backend(torch.ones(1)) is not kernels
    assert "Triton kernels" in backends()["cuda"]


def test_shapes_without_a_kernel_fall_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(kernels, "_state", {"warned": set(), "failed": set()})
    x, norm = Operands.random((2, (6, 7), 5), torch.float32)
    out, expected = torch.empty(2, 2, 2, 4), torch.empty(2, 2, 2, 4)
    weight = weight_for(x, 4, 3)  # a window behind a pool
    with pytest.warns(UserWarning, match="a pool of 3 before a kernel") as caught:
        for _ in range(2):
            kernels.norm_relu_conv(x, norm, weight, out, 3)
    assert len(caught) == 1
    reference.norm_relu_conv(x, norm, weight, expected, 3)
    torch.testing.assert_close(out, expected)
