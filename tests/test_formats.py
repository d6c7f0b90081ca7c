"""Checkpoints of format 1, written by earlier code, resume and evaluate with the same results.

`tests/data/format_1_*.pth.xz` were written in the middle of an epoch. Their weights are replaced by a repeated pattern,
so that the files are small. `format_1.json` has the options of the runs and the log of the earlier code after resuming.
"""

import io
import json
import lzma
import re
from functools import cache

import pytest
import torch

import main
from core.checkpoint import FORMAT
from core.description import read_description
from core.run import Run
from detection import data as detection_data
from detection import test as detection_test
from detection import train as detection_train
from segmentation import data as segmentation_data
from segmentation import test as segmentation_test
from segmentation import train as segmentation_train
from tests.helpers import ROOT, assert_equal, fails, read_log
from utils import get_random_state, versions

DATA = ROOT / "tests/data"
NUMBER = r"\d+(?:\.\d+)?"
RUNS = json.loads((DATA / "format_1.json").read_text())
TEST_SCRIPTS = {"segmentation": segmentation_test, "detection": detection_test}
SCRIPTS = {"classification": main, "segmentation": segmentation_train, "detection": detection_train}


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    monkeypatch.setattr("datasets.SHAPES_TRAIN", 16)
    monkeypatch.setattr("datasets.SHAPES_VAL", 10)
    for module in (segmentation_data, detection_data):
        monkeypatch.setattr(module, "SHAPES_TRAIN", 16)
        monkeypatch.setattr(module, "SHAPES_VAL", 6)


@cache
def unpack(task: str) -> bytes:
    """Return the content of the file of a task's checkpoint."""
    return lzma.decompress((DATA / f"format_1_{task}.pth.xz").read_bytes())


@cache
def load_old(task: str) -> dict:
    """Return the checkpoint of a task."""
    return torch.load(io.BytesIO(unpack(task)), weights_only=True)


@pytest.fixture
def checkpoint(request, tmp_path):
    """Return the name of a task, the unpacked file of its checkpoint, and the options of its run."""
    path = tmp_path / "old.pth"
    path.write_bytes(unpack(request.param))
    options = RUNS[request.param]["options"]
    return request.param, path, [str(ROOT / options[0]), *options[1:]] if request.param != "classification" else options


def insert(options: list[str], *others) -> list[str]:
    """Return options with others inserted before --cfg-options, which takes all arguments after it."""
    place = options.index("--cfg-options") if "--cfg-options" in options else len(options)
    return [*options[:place], *map(str, others), *options[place:]]


@pytest.fixture
def tolerance(checkpoint) -> float:
    """Other versions of the libraries draw and augment slightly other images, and so do other processors."""
    written = load_old(checkpoint[0])["versions"]
    names = ("torch", "torchvision", "timm", "numpy", "pillow")
    return 0.02 if all(written[name] == versions()[name] for name in names) else 0.3


@pytest.mark.parametrize("checkpoint", SCRIPTS, indirect=True)
def test_old_checkpoints_are_restored(checkpoint, tmp_path, monkeypatch, capsys):
    task, path, options = checkpoint
    runs = []
    monkeypatch.setattr(Run, "epochs", lambda self, *_: runs.append(self) or iter(()))
    SCRIPTS[task].main(insert(options, "--resume", path, "--output_dir", tmp_path / "run"))
    state, content = runs[0].state, load_old(task)
    assert_equal(dict(state.model.state_dict()), dict(content["model"]))
    assert_equal(state.optimizer.state_dict()["state"], content["optimizer"]["state"])
    if task == "classification":
        assert_equal(dict(state.model_ema.module.state_dict()), dict(content["model_ema"]))
    padding = "option changed: window_padding from mask to released" in capsys.readouterr().out
    assert padding == (task == "segmentation")
    assert (state.epoch, state.meter.step, state.position) == (0, 1, 4)
    assert_equal(state.meter.state_dict(), content["meters"][0] | {"overflows_in_a_row": 0})
    assert torch.equal(get_random_state()["torch"], content["random_states"][0]["torch"])


@pytest.mark.parametrize("checkpoint", SCRIPTS, indirect=True)
def test_old_checkpoints_resume(checkpoint, tolerance, tmp_path):
    task, path, options = checkpoint
    SCRIPTS[task].main(insert(options, "--resume", path, "--output_dir", tmp_path / "run"))
    found, expected = read_log(tmp_path / "run"), RUNS[task]["log"]
    assert [line["epoch"] for line in found] == [0, 1]
    for line, other in zip(found, expected, strict=True):
        assert set(line) == set(other)
        assert line["train_lr"] == pytest.approx(other["train_lr"], rel=1e-12)
    assert found[0]["train_loss"] == pytest.approx(expected[0]["train_loss"], rel=tolerance)
    state = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    assert state["format"] == FORMAT


@pytest.mark.parametrize("checkpoint", SCRIPTS, indirect=True)
def test_newer_checkpoints_are_refused(checkpoint, tmp_path, capsys):
    task, path, options = checkpoint
    content = {
        key: value for key, value in load_old(task).items() if key != "meters"
    }  # a newer format may have other keys
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
            torch.save({**load_old(task), "model_ema": None}, path)
        line = fails(capsys, SCRIPTS[other], *insert(options, "--resume", path, "--output_dir", tmp_path / "run"))
        assert "old.pth: is a checkpoint of another task, which has no option" in line


@pytest.mark.parametrize("checkpoint", SCRIPTS, indirect=True)
def test_old_checkpoints_evaluate(checkpoint, tolerance, capsys):
    task, path, options = checkpoint
    device = ["--device", "cpu", "--num_workers", "0"]
    if task == "classification":
        model = ["--model", "alt_gvt_tiny", "--data-set", "SHAPES", "--input-size", "32"]
        main.main(["--eval", "--resume", str(path), *model, *device])
    else:
        changes = options[options.index("--cfg-options") :]
        TEST_SCRIPTS[task].main([options[0], str(path), *device, *changes])
    expected = RUNS[task]["evaluation"]
    lines = capsys.readouterr().out.strip().splitlines()[-len(expected) :]
    for line, other in zip(lines, expected, strict=True):
        assert re.sub(NUMBER, "", line) == re.sub(NUMBER, "", other)
        found, wanted = (list(map(float, re.findall(NUMBER, text))) for text in (line, other))
        assert found == pytest.approx(wanted, abs=10 * tolerance)  # in percent


@pytest.mark.parametrize("checkpoint", SCRIPTS, indirect=True)
def test_old_checkpoints_are_described(checkpoint):
    """Their classes are unknown; segmentation masked the padding of all windows."""
    task, path, _ = checkpoint
    description = read_description(path)
    assert (description.task, list(description.classes)) == (task, [])
    assert description.options.get("window_padding") == ("mask" if task == "segmentation" else None)
