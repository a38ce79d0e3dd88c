from __future__ import annotations

import os
import subprocess
import sys
from unittest import mock

import pytest

from efficient_densenet.cli import main
from efficient_densenet.errors import MissingExtraError, UserError, require


def test_a_missing_extra_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'efficient-densenet\[train\]'"):
        require("lightning.pytorch", "train")


def test_a_broken_package_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text("import something_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_that_is_not_there"):
        require("broken_package", "train")


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("say this"), 2), (OSError(28, "No space left on device", "file"), 2), (KeyboardInterrupt(), 130)],
)
def test_commands_print_a_users_mistake_in_one_line(monkeypatch, capsys, error, code):
    def fail(_arguments):
        raise error

    monkeypatch.setattr("efficient_densenet.checkpoints.convert.run", fail)
    assert main(["convert", "--to", "normal", "--checkpoint", "a.pth", "--output", "b.pth"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("efficient-densenet: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 10_000])
def test_output_that_nobody_reads_ends_a_command_quietly(lines, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    program = f"""
from unittest import mock
from efficient_densenet.cli import main

with mock.patch("efficient_densenet.checkpoints.convert.run", lambda _: print("line\\n" * {lines})):
    raise SystemExit(main(["convert", "--to", "normal", "--checkpoint", "a.pth", "--output", "b.pth"]))
"""
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_pipe_between_processes_that_breaks_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(
        "efficient_densenet.checkpoints.convert.run", mock.Mock(side_effect=BrokenPipeError(32, "Broken pipe"))
    )
    assert main(["convert", "--to", "normal", "--checkpoint", "a.pth", "--output", "b.pth"]) == 2
    assert "Broken pipe" in capsys.readouterr().err


def test_a_bug_keeps_its_trace(monkeypatch):
    def fail(_arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("efficient_densenet.checkpoints.convert.run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["convert", "--to", "normal", "--checkpoint", "a.pth", "--output", "b.pth"])


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    assert "check-gradients" not in capsys.readouterr().out
