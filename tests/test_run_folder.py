"""Tests of the output folder: atomic writes, older checkpoints, damaged files, and the lock."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from core import run_folder
from core.run_folder import RunFolder
from tests.helpers import ROOT
from utils import UserError, make_folder, save_checkpoint, write_atomically


def names(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


def load(path) -> int:
    return torch.load(path, weights_only=True)["number"]


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path / "run", keep=3) as folder:
        yield folder


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the new")
        raise OSError("no space left on device")

    with pytest.raises(UserError, match=r"file: cannot be written \(no space left on device\); the previous file is"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


def test_the_log_is_one_json_line_per_epoch(folder):
    history = [{"epoch": 0, "test_acc1": 1.5}, {"epoch": 1, "test_acc1": 2.5}]
    folder.write_log(history)
    assert [json.loads(line) for line in (folder.path / "log.txt").read_text().splitlines()] == history


def test_internal_errors_of_a_write_keep_their_type(tmp_path):
    def fail(file):
        raise KeyError("internal")

    with pytest.raises(KeyError, match="internal"):
        write_atomically(tmp_path / "file", fail)
    assert not names(tmp_path)


def test_the_log_is_valid_json_whatever_the_figures(folder):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    folder.write_log([{"epoch": 0, "loss": math.nan, "best": math.inf, "lr": 1e-3, "name": "x"}])
    (line,) = (folder.path / "log.txt").read_text().splitlines()
    expected = {"epoch": 0, "loss": None, "best": None, "lr": 1e-3, "name": "x"}
    assert json.loads(line, parse_constant=refuse) == expected


def test_older_checkpoints_are_kept(folder):
    for number in range(5):
        folder.save({"number": number})
    assert names(folder.path) == {".lock", "checkpoint.pth", "checkpoint.1.pth", "checkpoint.2.pth"}
    assert [load(path) for path in folder.generations().values()] == [4, 3, 2]
    folder.keep = 1  # as in a later start with another --keep
    folder.save({"number": 5})
    assert names(folder.path) == {".lock", "checkpoint.pth"}


def test_older_checkpoints_are_kept_without_links(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links on this file system")

    monkeypatch.setattr(os, "link", refuse)
    for number in range(5):
        folder.save({"number": number})
    assert [load(path) for path in folder.generations().values()] == [4, 3, 2]


def save_until(folder: RunFolder, last_call: int) -> bool:
    """Save in a child process that dies at a certain call to the file system. Return True if it has died."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == last_call:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for name in ("open", "fsync", "link", "unlink", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    folder.save({"number": 10})
    os._exit(0)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_kill_at_any_call_leaves_an_intact_checkpoint(tmp_path, keep):
    for last_call in range(1, 100):
        with RunFolder(tmp_path / str(last_call), keep) as folder:
            for number in range(4):
                folder.save({"number": number})
            died = save_until(folder, last_call)
            assert load(folder.path / "checkpoint.pth") in (3, 10)
            kept = [load(path) for path in folder.generations().values()]
            assert kept == sorted(kept, reverse=True)
            assert len(set(kept)) >= keep - 1
            folder.save({"number": 11})
            assert load(folder.path / "checkpoint.pth") == 11
            assert len(folder.generations()) == keep
            assert not list(folder.path.glob(".*.tmp"))
        if not died:
            break
    assert last_call > 3


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "empty": lambda data: b"",
    "garbage": lambda data: bytes(range(256)) * 20,
    "text": lambda data: b"garbage\n" * 20,
    "zeros": lambda data: bytes(len(data)),
    "a flipped bit": lambda data: data.replace(
        b"\x00\x00\x80\x3f" * 8, b"\x00\x00\x80\x3e" + b"\x00\x00\x80\x3f" * 7, 1
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_renamed(folder, damage, caplog):
    for number in range(3):
        folder.save({"number": number, "weights": torch.ones(1000)})
    newest = folder.path / "checkpoint.pth"
    data = newest.read_bytes()
    newest.write_bytes(DAMAGES[damage](data))
    assert newest.read_bytes() != data
    assert folder.find_checkpoint() == folder.path / "checkpoint.1.pth"
    assert f"{newest} is damaged; renamed to checkpoint.pth.damaged, resuming from checkpoint.1.pth" in caplog.text
    assert not newest.exists()
    assert folder.find_checkpoint() == folder.path / "checkpoint.1.pth"  # again, as after a kill
    folder.save({"number": 3})
    assert [load(path) for path in folder.generations().values()] == [3, 1, 0]


def test_only_damaged_checkpoints_end_each_start(folder):
    for name in ("checkpoint.pth", "checkpoint.1.pth"):
        (folder.path / name).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"checkpoint.pth, .*checkpoint.1.pth: there is no intact checkpoint"):
            folder.find_checkpoint()
    assert names(folder.path) == {".lock", "checkpoint.pth", "checkpoint.1.pth"}


def test_a_checkpoint_that_cannot_be_read_is_not_renamed(folder, monkeypatch):
    folder.save({"number": 0})

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(run_folder.zipfile, "ZipFile", fail)
    with pytest.raises(UserError, match=r"checkpoint\.pth: cannot be read \(Input/output error\)"):
        folder.find_checkpoint()
    assert names(folder.path) == {".lock", "checkpoint.pth"}


def test_folders_that_cannot_be_created_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/pictures: the folder cannot be created \(Not a directory\)"):
        make_folder(tmp_path / "file/pictures")
    make_folder(tmp_path / "new/pictures")
    make_folder(tmp_path / "new/pictures")
    assert (tmp_path / "new/pictures").is_dir()


def test_a_new_run_finds_nothing(folder):
    (folder.path / "checkpoint.old.pth").touch()
    folder.write_log([])  # left by a run that was killed before its first checkpoint
    assert folder.find_checkpoint() is None


def test_a_run_without_its_checkpoint_is_not_overwritten(folder):
    folder.write_log([{"epoch": 0}])
    with pytest.raises(ValueError, match=r"log.txt: there is no intact checkpoint .*; remove .*run to start again$"):
        folder.find_checkpoint()
    save_checkpoint({"number": 1}, folder.path / "checkpoint_best.pth")
    with pytest.raises(ValueError, match=r"intact .* again, or pass --resume .*/run/checkpoint_best.pth instead of"):
        folder.find_checkpoint()


HOLD = """
import sys
from core.run_folder import RunFolder
with RunFolder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_folder_is_locked_until_its_process_ends(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            refusal = rf"{tmp_path} is in use by process {holder.pid} on {os.uname().nodename}; wait until it ends"
            for _ in range(2):
                with pytest.raises(ValueError, match=refusal), RunFolder(tmp_path):
                    pass
        finally:
            holder.kill()
    with RunFolder(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", refuse)
    with RunFolder(tmp_path):
        assert f"{tmp_path} cannot be locked (No locks available); do not start another run in it" in caplog.text


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with pytest.raises(ValueError, match="bad input"), RunFolder(tmp_path / "run"):
        raise ValueError("bad input")
    assert not (tmp_path / "run").exists()
    with RunFolder(tmp_path / "run") as folder:
        folder.write_log([])
    assert names(tmp_path / "run") == {".lock", "log.txt"}


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/run: cannot be written to"), RunFolder(tmp_path / "file/run"):
        pass


def write_metrics(folder: RunFolder, *lines: str) -> None:
    (folder.path / "metrics.jsonl").write_text("".join(lines))


def test_metrics_after_the_checkpoint_are_cut(folder):
    """A complete line at the checkpoint's place stays byte for byte; later, damaged and incomplete lines go."""
    kept = ['{"epoch": 0, "step": 9, "loss": 1.50}\n', '{"epoch": 1, "step": 2, "loss": null}\n']
    damaged = ['{"epoch": 0, "st\n', "[0, 1]\n", '{"step": 1}\n', "\n", '{"epoch": null, "step": 1}\n']
    later = ['{"epoch": 1, "step": 3}\n', '{"epoch": 2, "step": 1}\n', '{"epoch": 0, "step": 1}']
    write_metrics(folder, kept[0], *damaged, kept[1], *later)
    folder.cut_metrics(1, 2, folder.path / "checkpoint.pth")
    assert (folder.path / "metrics.jsonl").read_text() == "".join(kept)
    folder.add_metrics({"epoch": 1, "step": 3, "loss": math.nan})
    assert (folder.path / "metrics.jsonl").read_text().endswith('null}\n{"epoch": 1, "step": 3, "loss": null}\n')


def test_metrics_of_an_older_run_may_be_missing_or_damaged(folder):
    folder.cut_metrics(1, 2, None)
    assert not (folder.path / "metrics.jsonl").read_text()
    (folder.path / "metrics.jsonl").write_bytes(b"\xff\x00 no text")
    folder.cut_metrics(1, 2, None)
    assert (folder.path / "metrics.jsonl").read_bytes() == b""


def test_metrics_of_a_checkpoint_in_another_folder_are_taken_over(folder, tmp_path):
    """Those of the folder itself are of another run."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.jsonl").write_text('{"epoch": 0, "step": 1, "loss": 1}\n{"epoch": 1, "step": 1}\n')
    write_metrics(folder, '{"epoch": 0, "step": 1, "loss": 2}\n')
    folder.cut_metrics(1, 0, tmp_path / "other/checkpoint.pth")
    assert (folder.path / "metrics.jsonl").read_text() == '{"epoch": 0, "step": 1, "loss": 1}\n'


def test_metrics_alone_are_no_result(folder):
    """They are those of a run that was killed before its first checkpoint; it starts again."""
    write_metrics(folder, '{"epoch": 0, "step": 1}\n')
    folder.refuse_results()
    assert folder.find_checkpoint() is None


def test_metrics_reach_the_disk_before_the_checkpoint(folder, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    folder.add_metrics({"epoch": 0, "step": 1})
    folder.save({"number": 1})
    assert flushed[:2] == ["metrics.jsonl", ".checkpoint.pth.tmp"]


def test_metrics_that_cannot_be_written_end_with_one_line(folder):
    (folder.path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(Is a directory\); correct the cause"):
        folder.add_metrics({"epoch": 0, "step": 1})
