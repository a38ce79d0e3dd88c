"""The kernels run only where they were seen to be right: with a pretended GPU, and a check that does as it is told."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from efficient_densenet import backends, ops
from efficient_densenet.cli import main
from efficient_densenet.errors import UserError
from efficient_densenet.ops import triton as kernels
from efficient_densenet.ops.triton import check, trust

HERE = Path(__file__).parent
GPU = torch.device("cuda", 0)
PROPERTIES = {"name": "A GPU", "major": 9, "minor": 0, "multi_processor_count": 132}


def pretend(setattr_, properties=PROPERTIES):
    """A GPU, for the functions that decide about trust."""
    setattr_(torch.cuda, "is_available", lambda: True)
    setattr_(torch.cuda, "device_count", lambda: 1)
    setattr_(torch.cuda, "current_device", lambda: 0)
    setattr_(torch.cuda, "get_device_capability", lambda device=None: (properties["major"], properties["minor"]))
    setattr_(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    setattr_(torch.cuda, "is_current_stream_capturing", lambda: False)
    setattr_(torch.cuda, "get_device_name", lambda device: properties["name"])
    forget()


def forget():
    """As in a new process."""
    trust._reasons.clear()
    trust.machine.cache_clear()
    kernels.obstacle.cache_clear()


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Sets how the check ends, and says how often it ran."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_installed", lambda: True)
    monkeypatch.setattr(kernels, "_state", {"warned": set(), "failed": set()})
    pretend(monkeypatch.setattr)
    log = tmp_path / "checks"

    def behave(behaviour):
        program = [sys.executable, str(HERE / "fake_gpu_check.py"), behaviour, str(log), check.READY]
        monkeypatch.setattr(trust, "PROGRAM", program)
        return lambda: log.read_text().splitlines() if log.exists() else []

    yield behave
    forget()


class Activations(SimpleNamespace):
    """What `ops.backend` looks at of a tensor that is on a GPU."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__(is_cuda=True, device=GPU, dtype=dtype)

    def numel(self):
        return 1


def obstacle(kind="bfloat16"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trust.obstacle(GPU, kind)


def test_the_first_use_checks_and_says_so_later_ones_know(gpu):
    checks = gpu("right")
    with pytest.warns(UserWarning, match="for the first time"):
        assert ops.backend(Activations()) is kernels
    assert checks() == ["cuda:0 bfloat16 trust"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.backend(Activations()) is kernels
        forget()
        assert ops.backend(Activations()) is kernels
    assert len(checks()) == 1
    assert obstacle("float16") == "" and len(checks()) == 2


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("wrong", r"finish: off by 3 \(and 1 more\)"),
        ("dies", "killed by signal 11"),
        ("raises", "ended with 1: an illegal memory access"),
        ("hangs", "took more than 3 seconds"),
    ],
)
def test_kernels_that_are_wrong_are_not_used_and_not_checked_again(gpu, behaviour, reason, monkeypatch):
    checks = gpu(behaviour)
    monkeypatch.setattr(trust, "SECONDS", 3)
    with pytest.warns(UserWarning, match=reason) as caught:
        for _ in range(3):
            assert ops.backend(Activations()) is ops.eager
    assert len([w for w in caught if "plain PyTorch runs instead" in str(w.message)]) == 1
    forget()
    assert "check-gpu checks again" in obstacle() and len(checks()) == 1
    assert "bfloat16 WRONG: " in backends()["cuda"]


@pytest.mark.parametrize("behaviour", ["fails before the first kernel", "too little free memory", "prints no verdict"])
def test_a_check_that_did_not_come_to_its_end_is_repeated_by_the_next_process(gpu, behaviour):
    checks = gpu(behaviour)
    assert obstacle() and obstacle() and len(checks()) == 1
    assert "bfloat16 not checked yet" in backends()["cuda"]
    forget()
    gpu("right")
    assert obstacle() == "" and len(checks()) == 2


@pytest.mark.parametrize("change", [{"name": "Another"}, {"multi_processor_count": 114}, {"minor": 1}])
def test_another_gpu_is_checked_for_itself(gpu, change, monkeypatch):
    checks = gpu("right")
    obstacle()
    pretend(monkeypatch.setattr, PROPERTIES | change)
    obstacle()
    assert len(checks()) == 2


@pytest.mark.parametrize("name", ["_driver", "_version"])
def test_other_versions_are_checked_for_themselves(gpu, name, monkeypatch):
    checks = gpu("right")
    obstacle()
    forget()
    monkeypatch.setattr(trust, name, lambda *of: "99")
    obstacle()
    assert len(checks()) == 2


def test_the_environment_decides(gpu, monkeypatch):
    checks = gpu("wrong")
    monkeypatch.setenv(trust.VARIABLE, "trust")
    assert obstacle() == "" and "without a check" in backends()["cuda"]
    monkeypatch.setenv(trust.VARIABLE, "off")
    assert obstacle() == "EFFICIENT_DENSENET_GPU is off" and backends()["cuda"].startswith("plain PyTorch: ")
    monkeypatch.setenv(trust.VARIABLE, "always")
    with pytest.raises(UserError, match="set it to auto, trust or off"):
        obstacle()
    assert not checks()


def test_a_damaged_verdict_is_no_verdict(gpu):
    checks = gpu("right")
    obstacle()
    (file,) = trust.folder().iterdir()
    for text in ("", "[]", '{"reason": ""}', "\x00"):
        file.write_text(text)
        forget()
        assert obstacle() == ""
    assert len(checks()) == 5
    assert json.loads(file.read_text())["machine"]["gpu"].startswith("A GPU")


def test_a_cache_that_is_a_file_costs_a_check_each_time(gpu, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    gpu("right")
    with pytest.warns(UserWarning, match="cannot be stored"):
        assert trust.obstacle(GPU, "bfloat16") == ""


def test_nothing_is_checked_while_a_graph_is_captured(gpu, monkeypatch):
    checks = gpu("right")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "have not been checked" in obstacle() and not checks()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert obstacle() == "" and len(checks()) == 1
    forget()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert obstacle() == ""  # what is stored is known there, too


def test_nothing_is_checked_while_a_model_is_traced(gpu, monkeypatch):
    checks = gpu("right")
    with torch._subclasses.FakeTensorMode():
        assert "have not been checked" in obstacle()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "have not been checked" in obstacle() and not checks()


def test_the_command_checks_shows_and_keeps(gpu, capsys):
    gpu("wrong")
    assert main(["check-gpu", "--types", "bfloat16", "tf32"]) == 1
    found = capsys.readouterr().out
    assert "A GPU, capability 9.0" in found and found.count("WRONG: finish: off by 3") == 2
    checks = gpu("right")
    assert main(["check-gpu", "--types", "bfloat16"]) == 0 and len(checks()) == 3
    assert "bfloat16            right (checked on 20" in capsys.readouterr().out
    assert main(["check-gpu", "--show"]) == 1 and len(checks()) == 3
    found = capsys.readouterr().out
    assert "tf32                WRONG" in found and "float16             not checked yet" in found


def test_the_command_without_a_gpu_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["check-gpu"]) == 2
    assert "there is no GPU number 0" in capsys.readouterr().err


def test_devices_without_the_tensor_cores_are_not_checked(gpu, monkeypatch):
    checks = gpu("right")
    pretend(monkeypatch.setattr, PROPERTIES | {"major": 7, "minor": 5})
    with pytest.warns(UserWarning, match="older than they need"):
        assert ops.backend(Activations()) is ops.eager
    assert not checks() and "older than they need" in backends()["cuda"]


# What the checks of two processes would find, on which GPUs; where they are taken for wrong, and where they were run.
GROUPS = [
    (("wrong", "right"), ("A", "A"), (True, True), (True, False)),
    (("right", "wrong"), ("A", "A"), (False, False), (True, False)),
    (("right", "wrong"), ("A", "B"), (False, True), (True, True)),  # another GPU has to be right itself
]


def _rank(rank, folder):
    """The groups one after the other, for it takes seconds to start a process."""
    os.environ.pop(trust.VARIABLE, None)
    for number, (behaviours, names, *_) in enumerate(GROUPS):
        here = Path(f"{folder}/{number}")
        os.environ["XDG_CACHE_HOME"] = f"{here}/cache-{rank}"
        pretend(setattr, PROPERTIES | {"name": names[rank]})
        fake = str(HERE / "fake_gpu_check.py")
        trust.PROGRAM = [sys.executable, fake, behaviours[rank], f"{here}/checks-{rank}", check.READY]
        store = torch.distributed.FileStore(f"{here}/store", 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        (here / str(rank)).write_text(obstacle())
        torch.distributed.destroy_process_group()


def test_all_processes_of_a_group_use_the_verdict_of_the_first(tmp_path):
    for number in range(len(GROUPS)):
        (tmp_path / str(number)).mkdir()
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    for number, (*_, wrong, checked) in enumerate(GROUPS):
        here = tmp_path / str(number)
        assert tuple("off by 3" in (here / str(rank)).read_text() for rank in range(2)) == wrong, GROUPS[number]
        assert tuple((here / f"checks-{rank}").exists() for rank in range(2)) == checked, GROUPS[number]
