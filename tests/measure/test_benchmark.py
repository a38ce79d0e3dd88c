"""`benchmark` from the command line, on tiny networks."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._dynamo.eval_frame import OptimizedModule

from efficient_densenet import UserError, ops
from efficient_densenet.cli import main
from efficient_densenet.execution import KEEP
from efficient_densenet.measure import benchmark as command
from efficient_densenet.measure import contest, machine, max_batch, worker
from efficient_densenet.measure.contender import TrainingStep
from efficient_densenet.measure.contenders import CONTENDERS
from efficient_densenet.measure.devices import Place
from efficient_densenet.measure.exactness import errors
from efficient_densenet.measure.memory import peak_bytes
from efficient_densenet.measure.networks import TINY, Network
from efficient_densenet.measure.processes import Team
from efficient_densenet.ops import eager

SMALL = ["--num-init-features", "6", "--block-config", "2,2", "--input-size", "12", "--threads", "1"]


def benchmark(tmp_path, *options):
    output = tmp_path / "result.json"
    assert main(["benchmark", "--output", str(output), *options]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    return json.loads(output.read_text())


@pytest.mark.usefixtures("forked")
def test_times_and_memory(tmp_path, capsys):
    names = ["ordinary-channels-last", "bottleneck"]
    record = benchmark(
        tmp_path, *SMALL, "--batch-size", "3", "--rounds", "2", "--iterations", "2", "--contenders", ",".join(names)
    )
    assert [result["contender"] for result in record["results"]] == names
    for result in record["results"]:
        for part in ("forward_ms", "backward_ms"):
            assert [len(times) for times in result[part]] == [2, 2]
            assert all(0 < t < 60_000 for times in result[part] for t in times)
        assert result["step_bytes_per_image"] == result["step_bytes"] / 3
        assert result["process_bytes"] > 50e6
        assert result["threads"] == 1
    first, second = record["summary"]
    assert first["memory ratio"] == first["F+B ratio"] == first["F+B to ordinary"] == 1
    assert second["F+B ratio"] == second["F+B to ordinary"]
    assert record["network"]["arguments"]["block_config"] == [2, 2]
    assert record["versions"]["torch"] and record["hardware"]["cpu"] and record["date"]
    table = capsys.readouterr().out
    assert all(name in table for name in names) and "R=B/F" in table


@pytest.mark.usefixtures("forked")
def test_several_devices(tmp_path):
    (result,) = benchmark(
        tmp_path, *SMALL, "--batch-size", "4", "--rounds", "1", "--iterations", "1", "--num-devices", "2",
        "--contenders", "recompute",
    )["results"]  # fmt: skip
    assert result["num_devices"] == 2
    arguments = {"num_init_features": 6, "block_config": [2, 2], "input_size": 12}
    alone = TrainingStep("recompute", Network(None, arguments, 12, 100), 4, Place("cpu"))
    alone()
    assert result["step_bytes"] < 0.7 * peak_bytes(alone), "each device has half of the batch"


PACKAGES = {name: name for name in ("torchvision", "timm", "monai", "onnxruntime", "openvino")}
PACKAGES["resnet50"] = "torchvision"


LIKE_ORDINARY = ("torchvision-c", "torchvision-g", "monai")  # made in the same way as the ordinary network's forms
CALLED = [name for name, made in CONTENDERS.items() if not (made.evaluates_only or name.startswith(LIKE_ORDINARY))]


@pytest.mark.parametrize("name", CALLED)
def test_contenders_are_what_they_are_called(name, monkeypatch):
    made, usual = CONTENDERS[name], ops.backend(torch.ones(1))
    pytest.importorskip(PACKAGES.get(name.split("-")[0], "torch"))
    step = TrainingStep(name, TINY, 2, Place("cpu"))
    assert isinstance(step.network, OptimizedModule) == ("compiled" in name or "reduce-overhead" in name)
    in_channels_last = any(word in name for word in ("channels-last", "budget", "graph", "cudnn", "autotune", "reduce"))
    assert step.images.is_contiguous(memory_format=torch.channels_last) == in_channels_last
    module = getattr(step.network, "_orig_mod", step.network)
    kept = name.split("-")[0] if name.split("-")[0] in KEEP else None
    if kept or name == "recompute":
        adoption = module.features.denseblock1.adoption
        assert adoption.way == ("shared" if kept else "recompute") and kept in (None, adoption.keep)
    else:
        assert not any(hasattr(part, "adoption") for part in module.modules())
    flags = [getattr(p, "memory_efficient", getattr(p, "grad_checkpointing", False)) for p in module.modules()]
    assert ("flag" in name) == any(flags)
    if not made.compile:  # to compile takes minutes
        backends = backends_from_now_on(monkeypatch)
        assert all(0 < t < 60_000 for t in step())
        assert backends == ({eager if name.endswith("-plain") else usual} if kept else set())


BUILDS = {
    made.build: name for name, made in reversed(CONTENDERS.items()) if not (name.startswith("resnet50") or made.compile)
}


@pytest.mark.parametrize("name", BUILDS.values())
def test_contenders_are_one_and_the_same_network(name):
    pytest.importorskip(PACKAGES.get(name.split("-")[0], "torch"))
    expected, actual = (TrainingStep(n, TINY, 2, Place("cpu"), training=False) for n in ("ordinary", name))
    with torch.inference_mode():
        given = actual.network(actual.images)
        torch.testing.assert_close(given, expected.network(expected.images), rtol=1e-4, atol=1e-4)


def test_a_library_without_such_a_network_says_so():
    pytest.importorskip("timm")
    other = {"num_init_features": 4, "block_config": [1], "growth_rate": 4}
    for arguments in (other, other | {"bn_size": 2}):
        with pytest.raises(UserError, match="timm has no network of the shape"):
            TrainingStep("timm", Network(None, arguments, 8, 10), 2, Place("cpu"))


def backends_from_now_on(monkeypatch):
    """The backends that are chosen from now on."""
    chosen, choose = set(), ops.backend

    def noted(x):
        chosen.add(choose(x))
        return choose(x)

    monkeypatch.setattr(ops, "backend", noted)
    return chosen


def test_evaluation_and_half_precision():
    network = Network(None, {"num_init_features": 4, "block_config": [1]}, 8, 10)
    step = TrainingStep("bottleneck", network, 2, Place("cpu"), dtype="bfloat16", training=False)
    assert step.images.dtype == torch.bfloat16 and not step.network.training
    forward, backward = step()
    assert forward > 0 and backward == 0
    assert all(not p.grad.any() for p in step.network.parameters())


@pytest.mark.parametrize("bn_size", [None, 2])
def test_checkpointing_stores_less_and_computes_the_same(bn_size):
    network = Network(None, {"num_init_features": 8, "block_config": [6], "bn_size": bn_size}, 16, 10)
    steps = [TrainingStep(name, network, 4, Place("cpu")) for name in ("ordinary", "checkpointing")]
    ordinary, checkpointed = (peak_bytes(step) for step in steps)
    assert checkpointed < 0.8 * ordinary
    gradients = [[p.grad.clone() for p in step.network.parameters()] for step in steps]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast():
    network = Network(None, {"num_init_features": 4, "block_config": [1]}, 8, 10)
    step, seen = TrainingStep("bottleneck", network, 2, Place("cpu"), dtype="amp-bf16"), []
    step.network.features.conv0.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    step()
    assert seen == [torch.bfloat16] and step.images.dtype == torch.float32


def test_instructions_are_held_to_a_level_in_every_worker(tmp_path, capsys):
    record = benchmark(
        tmp_path, *SMALL, "--batch-size", "2", "--rounds", "1", "--iterations", "1", "--evaluation",
        "--dtype", "bfloat16", "--instructions", "baseline", "--contenders", "bottleneck",
    )  # fmt: skip
    assert record["arguments"]["instructions"] == "baseline"
    assert all(t == 0 for times in record["results"][0]["backward_ms"] for t in times)
    assert re.search(r"bottleneck +[\d.]+ ± [\d.]+ +[\d.]+ +– +– +– +1\.000", capsys.readouterr().out)
    code = "import torch, efficient_densenet as e; print(torch.backends.cpu.get_cpu_capability(), e.backends()['cpu'])"
    environment = os.environ | machine.HELD["baseline"]
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert said.stdout.startswith("DEFAULT") and " baseline," in said.stdout


def test_peers_beside_each_other(tmp_path, monkeypatch, capsys):
    """Each is compared with float64; a package that is not there is a gap, with the command that installs it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "timm.py").write_text("raise ModuleNotFoundError('no timm here', name='timm')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"), prepend=os.pathsep)
    (tmp_path / "results").mkdir()
    names = ["ordinary", "checkpointing", "timm"]
    options = ["--peers", "--batch-size", "3", "--rounds", "2", "--iterations", "1", "--contenders", ",".join(names)]
    record = benchmark(tmp_path / "results", *SMALL, *options)
    assert [row["contender"] for row in record["summary"]] == names[:2]
    (gap,) = record["gaps"]
    assert gap["contender"] == "timm" and "pip install 'efficient-densenet[peers]'" in gap["reason"]
    table = capsys.readouterr().out
    assert "pip install 'efficient-densenet[peers]'" in table and "% off" in table
    for row in record["summary"]:
        assert row["ready_s"] > 0 and 0 < row["errors"]["gradient"] < 1e-5
        right = row["errors"]["statistics"] < 1e-6
        assert right == (row["contender"] != "checkpointing"), "checkpoints move running statistics twice"


def test_everybody_takes_part_where_nobody_is_named():
    def named(*options):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return command.contenders(parser.parse_args(options))

    training = named("--peers")
    assert set(training) >= {"recompute", *KEEP, "torchvision-flag", "timm-channels-last", "monai"}
    assert not any(CONTENDERS[name].evaluates_only for name in training)
    assert set(named("--peers", "--evaluation")) >= {"onnxruntime", "openvino", "compiled"}
    assert not any(CONTENDERS[name].compile for name in named("--peers", "--max-batch", "2GB"))
    assert named() == ["ordinary", "ordinary-channels-last", *KEEP]


def test_a_wrong_gradient_and_wrong_statistics_are_found():
    network = Network(None, {"num_init_features": 6, "block_config": [2, 2], "input_size": 12}, 12, 100)
    step = TrainingStep("bottleneck", network, 3, Place("cpu"))
    step()  # what was before does not matter
    right = errors(step)
    assert right["gradient"] < 1e-5 and right["statistics"] < 1e-6
    step.network.classifier.weight.register_hook(lambda grad: 1.01 * grad)
    step.network.features.norm3.momentum = 0.2
    wrong = errors(step)
    assert wrong["gradient"] > 1e-4 and wrong["statistics"] > 1e-3


def test_summary():
    result = {"num_devices": 2, "step_bytes": 10, "step_bytes_per_image": 5.0, "process_bytes": 99}
    rows = contest.summarize(
        [
            result | {"contender": "ordinary", "forward_ms": [[1.0, 2.0], [9.0]], "backward_ms": [[4.0, 4.0], [4.0]]},
            result | {"contender": "b", "forward_ms": [[1.0]], "backward_ms": [[2.0]], "step_bytes": 5},
            result | {"contender": "b", "forward_ms": [[1.0]], "backward_ms": [[2.0]], "num_devices": 1},
        ]
    )
    assert rows[0]["F"] == {"median": 2, "mean": 4, "std": pytest.approx(19**0.5)}
    assert (rows[0]["B/F"], rows[0]["F+B"], rows[0]["F+B ratio"]) == (2, 6, 1)
    assert (rows[1]["F"]["std"], rows[1]["F+B ratio"], rows[1]["memory ratio"]) == (0, 0.5, 0.5)
    assert rows[2]["F+B ratio"] == 1, "ratios are to the first on as many devices"
    assert rows[2]["F+B to ordinary"] is rows[2]["pairs"] is None


def test_the_faster_ordinary_form_counts():
    result = {"num_devices": 1, "step_bytes": 1, "step_bytes_per_image": 1.0, "process_bytes": 1}
    times = {"bottleneck": 3.0, "ordinary": 8.0, "ordinary-channels-last": 6.0}
    rows = contest.summarize(
        [result | {"contender": n, "forward_ms": [[t]], "backward_ms": [[t]]} for n, t in times.items()]
    )
    assert [row["F+B to ordinary"] for row in rows] == [0.5, pytest.approx(4 / 3), 1]


def test_ratios_are_taken_in_pairs():
    """Of steps that follow each other, for the machine may become slower in between."""
    result = {"num_devices": 1, "step_bytes": 1, "step_bytes_per_image": 1.0, "process_bytes": 1}
    times = {"ordinary": [[2.0, 4.0], [20.0]], "bottleneck": [[1.0, 2.0], [16.0]]}
    results = [result | {"contender": n, "forward_ms": t, "backward_ms": [[0.0, 0.0], [0.0]]} for n, t in times.items()]
    assert contest.summarize(results)[1]["pairs"] == {"low": 0.5, "median": 0.5, "high": pytest.approx(0.65)}


def test_largest_batch(tmp_path, capsys):
    """With memory for one image and half of another one, one is found."""
    job = {
        "contender": "ordinary",
        "network": {"variant": None, "arguments": {}, "input_size": 32, "num_classes": 100},
        "batch_size": 1,
        "memory_limit": None,
    }
    with Team(worker.__name__, job, threads=1) as team:
        limit = team.ask("process_bytes")[0] + 10_000_000
    options = ["--contenders", "ordinary", "--threads", "1", "--max-batch", f"{limit}B"]
    (result,) = benchmark(tmp_path, *options)["results"]
    assert result["largest_batch"] == 1 and result["smallest_that_did_not_fit"] == 2
    assert result["peak_bytes"] <= limit < result["its_peak_bytes"]
    assert "did not fit" in capsys.readouterr().out


def test_nothing_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(max_batch, "_peak", lambda *arguments: 2_000_000)
    (result,) = benchmark(tmp_path, *SMALL, "--contenders", "ordinary", "--max-batch", "1MB")["results"]
    assert (result["largest_batch"], result["peak_bytes"], result["smallest_that_did_not_fit"]) == (0, None, 1)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-batch", "900TB"], "smaller --max-batch"),
        (["--max-batch", "1GB", "--num-devices", "2"], "--num-devices"),
        (["--num-devices", "1,300"], "batch of 128"),
        (["--output", "no-such-folder/result.json"], "no-such-folder"),
        (["--output", "."], "is a folder"),
        (["--contenders", "ordinary,onnxruntime"], "--evaluation"),
        (["--contenders", "ordinary-graph"], "benchmarks/gpu.py"),
        (["--max-batch", "1GB", "--instructions", "avx2"], "--instructions"),
        (["--compression", "0"], "compression"),
    ],
)
def test_refuses_what_cannot_run(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *SMALL, *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--contenders", "unknown"], ["--max-batch", "12"], ["--rounds", "0"]])
def test_refuses_what_cannot_be_read(options, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["benchmark", *options])
    assert exit_.value.code == 2
    assert options[1] in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_leaves_no_process_behind(number, code, tmp_path, tmp_path_factory):
    command = [sys.executable, "-m", "efficient_densenet", "benchmark", *SMALL, "--rounds", "100000"]
    with subprocess.Popen(
        [*command, "--contenders", "ordinary", "--batch-size", "2"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path_factory.mktemp("temporary"))},  # SIGKILL leaves its files there
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background ignores it
    ) as process:
        assert process.stderr is not None
        while "round" not in process.stderr.readline():
            assert process.poll() is None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        process.send_signal(number)
        process.stderr.read()
        assert process.wait(30) == code
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []
