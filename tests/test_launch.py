"""Tests of how scripts end: one line for bad input, a traceback for internal errors. Tests of argument types."""

import argparse
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import main
from core.launch import find_cause, one_line, run_script
from core.options import NON_NEGATIVE, POSITIVE
from models import TwinsError
from tests.helpers import ROOT, run_processes
from utils import UserError

ARGS = argparse.Namespace(device="cpu", dist_url="env://", loader_timeout=0, deterministic=False, traceback=False)


def end(capsys, error: Exception) -> str:
    """Return the output of a script that ends with an error."""

    def fail(*_):
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script("script.py", fail, ARGS)
    assert stop.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", [UserError, TwinsError])
def test_bad_input_ends_with_one_line(kind, capsys):
    assert end(capsys, kind("--lr fast: give a number")) == "script.py: error: --lr fast: give a number\n"


@pytest.mark.parametrize("error", [ValueError("x"), OSError(2, "No such file"), KeyError("x"), TypeError("x")])
def test_internal_errors_keep_their_traceback(error):
    def fail(*_):
        raise error

    with pytest.raises(type(error)) as raised:
        run_script("script.py", fail, ARGS)
    assert raised.value is error


class Broken(torch.utils.data.Dataset):
    """Data set that raises an error for each sample."""

    def __init__(self, error: Exception):
        self.error = error

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int):
        raise self.error


def load_broken(error: Exception) -> Exception:
    """Return the error of a loader whose process raises an error."""
    batches = iter(DataLoader(Broken(error), num_workers=1))
    with pytest.raises(type(error)) as raised:
        next(batches)
    batches._shutdown_workers()  # a later collection of garbage would wait 5 seconds for the process
    return raised.value


@pytest.mark.parametrize("error", [UserError("a.jpg: cut short; copy it again"), ValueError("internal")])
def test_errors_of_data_loading_processes(error):
    assert find_cause(load_broken(error)) == (str(error) if isinstance(error, UserError) else None)


def test_messages_of_several_lines_become_one_line():
    assert one_line(ValueError("first line\n  second line")) == "first line second line"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(load_broken(UserError("a.json: bad:\nline 3"))) == "a.json: bad: line 3"


@pytest.mark.slow
def test_the_cause_of_an_error_in_a_data_loading_process_is_not_its_message():
    error = UserError("a.jpg: cut short")
    error.__cause__ = OSError("truncated: 3 bytes")
    assert one_line(load_broken(error)) == "a.jpg: cut short"


@pytest.mark.parametrize("kind", [POSITIVE, NON_NEGATIVE])
@pytest.mark.parametrize("text", ["inf", "nan", "-1", "1e999"])
def test_numbers_are_finite(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a number"):
        kind(text)


ON_MAIN = """
import sys
sys.path.insert(0, {root!r})
import argparse, utils
from core import distributed, launch
def run(args, processes):
    def fail():
        raise {error}
    distributed.on_main(fail)
launch.run_script("script.py", run, argparse.Namespace(
    device="cpu", dist_url="env://", loader_timeout=0, deterministic=False, traceback=False))
"""


@pytest.mark.slow
@pytest.mark.parametrize("error", ["utils.UserError('bad input')", "ValueError('internal')"])
def test_errors_of_the_main_process_end_all(error, tmp_path):
    (tmp_path / "script.py").write_text(ON_MAIN.format(root=str(ROOT), error=error))
    result = run_processes(2, [tmp_path / "script.py"])
    assert result.returncode == 1
    said = [line for line in result.stderr.splitlines() if line.startswith("script.py")]
    assert said == (["script.py: error: bad input"] if "User" in error else [])
    assert result.stderr.count("ValueError: internal") == ("internal" in error)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "test.py"])
@pytest.mark.parametrize("task", ["segmentation", "detection"])
@pytest.mark.parametrize("form", ["inside its folder", "as a module"])
def test_scripts_of_the_dense_tasks_start_in_both_forms(task, script, form):
    command, folder = [script], ROOT / task
    if form == "as a module":
        command, folder = ["-m", f"{task}.{script[:-3]}"], ROOT
    command = [sys.executable, *command, "--help"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: bash dist_{script[:-3]}.sh CONFIG")


@pytest.mark.slow
def test_a_bad_rendezvous_is_named(monkeypatch, run_in_process):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for url in ("nowhere", "env://"):
        _, error = run_in_process("--device", "cpu", "--dist_url", url)
        assert error.startswith(f"main.py: error: --dist_url {url}: the rendezvous failed (")
        assert len(error.splitlines()) == 1


def test_traceback_on_demand():
    with pytest.raises(ValueError, match="not a folder"):
        main.main(["--traceback", "--device", "cpu", "--data-path", "/nowhere"])
