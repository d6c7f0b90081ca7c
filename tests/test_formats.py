"""Checkpoints of format 1, written by earlier code, resume and evaluate with the same results.

`tests/data/format_1_*.pth.xz` were written in the middle of an epoch. Their weights are replaced by a repeated pattern,
so that the files are small. `format_1.json` has the options of the runs and the log of the earlier code after resuming.
"""

import json
import lzma

import pytest
import torch

import main
from core.checkpoint import FORMAT
from detection import data as detection_data
from detection import train as detection_train
from main import get_args_parser
from segmentation import data as segmentation_data
from segmentation import train as segmentation_train
from tests.conftest import ROOT, fails, read_log

DATA = ROOT / "tests/data"
RUNS = json.loads((DATA / "format_1.json").read_text())
SCRIPTS = {"classification": main, "segmentation": segmentation_train, "detection": detection_train}


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    monkeypatch.setattr("datasets.SHAPES_TRAIN", 16)
    monkeypatch.setattr("datasets.SHAPES_VAL", 10)
    for module in (segmentation_data, detection_data):
        monkeypatch.setattr(module, "SHAPES_TRAIN", 16)
        monkeypatch.setattr(module, "SHAPES_VAL", 6)


@pytest.fixture
def checkpoint(request, tmp_path):
    """Return the name of a task, the unpacked file of its checkpoint, and the options of its run."""
    path = tmp_path / "old.pth"
    path.write_bytes(lzma.decompress((DATA / f"format_1_{request.param}.pth.xz").read_bytes()))
    options = RUNS[request.param]["options"]
    return request.param, path, [str(ROOT / options[0]), *options[1:]] if request.param != "classification" else options


def insert(options: list[str], *others) -> list[str]:
    """Return options with others inserted before --cfg-options, which takes all arguments after it."""
    place = options.index("--cfg-options") if "--cfg-options" in options else len(options)
    return [*options[:place], *map(str, others), *options[place:]]


@pytest.mark.parametrize("checkpoint", SCRIPTS, indirect=True)
def test_old_checkpoints_resume(checkpoint, tmp_path):
    task, path, options = checkpoint
    SCRIPTS[task].main(insert(options, "--resume", path, "--output_dir", tmp_path / "run"))
    found, expected = read_log(tmp_path / "run"), RUNS[task]["log"]
    assert [line["epoch"] for line in found] == [0, 1]
    for line, other in zip(found, expected, strict=True):
        assert set(line) == set(other)
        assert line["train_lr"] == pytest.approx(other["train_lr"], rel=1e-12)
        assert line["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
    state = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    assert state["format"] == FORMAT


@pytest.mark.parametrize("checkpoint", SCRIPTS, indirect=True)
def test_newer_checkpoints_are_refused(checkpoint, tmp_path, capsys):
    task, path, options = checkpoint
    content = torch.load(path, weights_only=True)
    del content["meters"]  # a newer format may have other keys
    for version in (FORMAT + 1, "new"):
        torch.save({**content, "format": version}, path)
        line = fails(capsys, SCRIPTS[task], *insert(options, "--resume", path, "--output_dir", tmp_path / "run"))
        assert f"old.pth: has format {version}, but this code reads formats up to {FORMAT}; continue the run" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("checkpoint", SCRIPTS, indirect=True)
def test_checkpoints_of_another_task_are_refused(checkpoint, tmp_path, capsys):
    task, path, _ = checkpoint
    for other in set(SCRIPTS) - {task}:
        options = RUNS[other]["options"]
        options = options if other == "classification" else [str(ROOT / options[0]), *options[1:]]
        options = [option for option in options if option != "--model-ema"]
        if task == "classification":
            torch.save({**torch.load(path, weights_only=True), "model_ema": None}, path)
        line = fails(capsys, SCRIPTS[other], *insert(options, "--resume", path, "--output_dir", tmp_path / "run"))
        assert "old.pth: is a checkpoint of another task, which has no option" in line


@pytest.mark.parametrize("checkpoint", ["classification"], indirect=True)
def test_old_checkpoints_evaluate(checkpoint, capsys):
    _, path, options = checkpoint
    args = get_args_parser().parse_args(options)
    main.main(["--eval", "--resume", str(path), "--model", args.model, "--data-set", "SHAPES", "--input-size", "32"])
    assert "on the 10 test images" in capsys.readouterr().out
