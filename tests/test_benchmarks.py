"""The benchmarks: what they count, time and refuse."""

import json
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import common, dense, epochs, models, parts, pipeline
from dense.experiments import load_experiment
from main import get_args_parser, parse_args
from tests import forks
from tests.conftest import ROOT, fails
from utils import seed_generators

SMALL = ["--device", "cpu", "--turns", "2", "--batch-size", "2", "--input-size", "64"]
SEGMENTATION_CONFIG = ROOT / "segmentation/configs/upernet_alt_gvt_s_512x512_160k_ade20k_swin_setting.py"
DETECTION_CONFIG = ROOT / "detection/configs/retinanet_pcpvt_s_fpn_1x_coco_pvt_setting.py"
SMALL_SEGMENTOR = ["backbone=alt_gvt_tiny", "pretrained=", "channels=16", "scale=(256, 64)", "crop_size=32"]


@pytest.fixture(autouse=True)
def fast_processes(monkeypatch):
    """Let new processes be forks, which start faster."""
    for script in (models, epochs, dense):
        monkeypatch.setattr(script, "run_in_new_process", forks.call)


def run(capsys, script, *argv) -> str:
    """Run a benchmark in this process and return what it prints."""
    threads = torch.get_num_threads()
    try:
        script.main([str(arg) for arg in argv])
    finally:
        torch.set_num_threads(threads)
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_model_beside_timms(tmp_path, capsys):
    report = tmp_path / "report.json"
    output = run(capsys, models, "alt_gvt_small", "--compare", "timm", *SMALL, "--threads", "1", "--json", report)
    assert "geometric mean" in output
    rows = json.loads(report.read_text())["rows"]
    assert [(row["model"], row["peer"], row["mode"]) for row in rows] == [
        ("alt_gvt_small", "twins_svt_small", mode) for mode in ("inference", "training")
    ]
    for row in rows:
        assert row["parameters"] == 24_060_776
        assert 0 < row["output_difference"] < 1e-5
        assert row["ratio_least"] <= row["ratio"] <= row["ratio_most"]
        quotient = row["images_per_second"] / row["peer_images_per_second"]
        assert row["ratio_least"] * 0.99 <= quotient <= row["ratio_most"] * 1.01
        assert 0 < row["share_of_peak"] < 1
    assert rows[1]["memory"] > 24_060_776 * 4  # gradients
    assert rows[0]["images_per_second"] > rows[1]["images_per_second"]


@pytest.mark.slow
def test_backbones_of_dense_tasks(tmp_path, capsys):
    options = [*SMALL[:-2], "--input-size", "70", "100", "--features", "--mode", "inference"]
    run(capsys, models, "alt_gvt_small", "--compare", "timm", *options, "--json", tmp_path / "report.json")
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert row["output_difference"] < 1e-5
    assert row["parameters"] < 24_060_776  # without the classifier


def test_different_outputs_are_not_compared():
    setting = models.Setting(torch.device("cpu"), batch_size=1, input_size=(32, 32))
    ours = models.Subject("alt_gvt_tiny", setting)
    other = models.Subject("alt_gvt_tiny", setting)
    with pytest.raises(RuntimeError, match="the outputs of the two models differ by"):
        models.check_outputs(ours, other)
    same = models.Subject("alt_gvt_tiny", setting, ours.model.state_dict())
    assert models.check_outputs(ours, same) == 0


@pytest.mark.slow
def test_times_are_those_of_one_call():
    calls = []

    def step(seconds):
        calls.append(seconds)
        time.sleep(seconds)

    times = common.time_in_turns([lambda: step(0.02), lambda: step(0.4)], 3, torch.device("cpu"))
    assert [len(step_times) for step_times in times] == [3, 3]
    assert all(0.02 <= seconds < 0.2 for seconds in times[0])  # one call, not the 15 of a turn
    assert all(seconds >= 0.4 for seconds in times[1])
    runs = "".join("s" if seconds == 0.02 else "l" for seconds in calls)
    assert runs.lstrip("s").lstrip("l").count("sl") == 3  # in turns, after the warm-up


def test_progress_goes_to_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(common, "TURN_SECONDS", 0)
    for seconds, turns in ((0, ["a step: turn 1 of 2", "a step: turn 2 of 2"]), (60, [])):
        monkeypatch.setattr(common, "PROGRESS_SECONDS", seconds)
        common.time_in_turns([lambda: None], 2, torch.device("cpu"), "a step")
        printed = capsys.readouterr()
        assert printed.err.splitlines() == ["a step: warm-up", *turns]
        assert not printed.out


@pytest.mark.slow
def test_input_pipelines(image_folder, tmp_path, capsys):
    options = ["--data", image_folder, "--batch-size", "4", "--turns", "2", "--workers", "0"]
    output = run(capsys, pipeline, *options, "--json", tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["loop"] for row in rows] == ["ours", "timm", "torchvision"]
    assert rows[0]["ratio"] == 1
    assert "images/s" in output


def test_images_of_the_pipeline(tmp_path):
    pipeline.write_images(tmp_path / "drawn", (50, 40), count=8)
    pipeline.link_images(tmp_path / "drawn", tmp_path / "linked", count=6)
    for folder, batches in (("drawn", 4), ("linked", 3)):
        options = pipeline.parse_loading(tmp_path / folder, 2, 0)
        ours = [images.normalise() for images, _ in pipeline.build_our_loader(options)]
        assert [tuple(images.shape) for images in ours] == [(2, 3, 224, 224)] * batches
        for build in (pipeline.build_timms_loader, pipeline.build_torchvisions_loader):
            assert [tuple(batch[0].shape) for batch in build(options)] == [(2, 3, 224, 224)] * batches


def test_timms_pipeline_posterises_on_0_bits(image_folder):
    dataset = pipeline.build_timms_loader(pipeline.parse_loading(image_folder, 2, 0)).dataset
    (policy,) = [change for change in dataset.transform.transforms if hasattr(change, "ops")]
    operations = [operation for operation in policy.ops if operation.name.startswith("Posterize")]
    assert operations
    for operation in operations:
        assert not np.asarray(operation.aug_fn(Image.new("RGB", (8, 8), "red"), 0)).any()


def test_loaders_have_the_published_augmentation(tmp_path):
    loading = vars(pipeline.parse_loading(tmp_path, 2, 0))
    published = vars(get_args_parser().parse_args(["--data-path", str(tmp_path), "--num_workers", "0"]))
    assert loading == {name: published[name] for name in loading} | {"batch_size": 2}


def test_epochs_of_main_have_the_options_of_timms(tmp_path, monkeypatch):
    changed = {"opt": "sgd", "lr": 0.5, "weight_decay": 0.1, "clip_grad": 2.0, "drop_path": 0.3}
    changed |= {"mixup": 0.2, "cutmix": 0.5, "smoothing": 0.0}
    assert set(changed) == set(epochs.RECIPE)
    defaults = vars(get_args_parser().parse_args([]))
    assert {name: defaults[name] for name in epochs.RECIPE} == epochs.RECIPE
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "epoch 0 [6/6]  loss 1\nepoch 0: 12 images in 2.50 s\n")

    monkeypatch.setattr(epochs, "RECIPE", changed)
    monkeypatch.setattr(subprocess, "run", run)
    loading = pipeline.parse_loading(tmp_path, 2, 1)
    assert epochs.run_our_epoch("alt_gvt_small", loading) == (2.5, 12)
    ((_, script, *argv),) = commands
    assert script == str(ROOT / "main.py")
    expected = {**vars(loading), **changed, "model": "alt_gvt_small", "epochs": 1}
    args = vars(parse_args(argv))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.slow
def test_epochs_of_training(tmp_path, capsys):
    pipeline.write_images(tmp_path / "images", (50, 40), count=2)
    options = ["--data", tmp_path / "images", "--batch-size", "2", "--turns", "1", "--workers", "0", "--threads", "1"]
    run(capsys, epochs, "alt_gvt_small", *options, "--json", tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["loop"] for row in rows] == ["alt_gvt_small, ours", "timm"]
    assert rows[0]["ratio"] == 1
    assert rows[1]["images_per_second"] > 0


@pytest.mark.slow
def test_parts_have_the_same_results_both_ways(tmp_path, capsys):
    for part in parts.build_parts():
        results = []
        for way in (part.before, part.after):
            seed_generators(0)
            with torch.no_grad():
                results.append(way())
        tolerance = 0.3 if isinstance(results[0], Image.Image) else 1e-6
        before, after = (np.asarray(result, float).ravel() for result in results)
        assert before.std() > 0
        assert np.abs(before - after).mean() < tolerance
    output = run(capsys, parts, "--turns", "1", "--json", tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["part"] for row in rows] == [part.what for part in parts.build_parts()]
    assert all(row["part"] in output for row in rows)


@pytest.mark.slow
def test_the_measured_steps_run(capsys):
    model = dense.build_untrained_segmentor(load_experiment(SEGMENTATION_CONFIG, SMALL_SEGMENTOR))
    before = model.decode_head.conv_seg.weight.clone()
    dense.build_training_step(model, torch.device("cpu"))()
    assert not torch.equal(model.decode_head.conv_seg.weight, before)
    logits = dense.build_inference(model, torch.device("cpu"))()
    assert logits.shape == (1, 150, 512, 2048)
    lines = run(capsys, dense, "segmentation", "--device", "cpu").splitlines()
    # The published figures count padded windows of SVT, which ours do not have.
    for line, published in zip(lines[1:], (234, 250, 269, 228, 261, 297), strict=True):
        assert float(line.split()[2]) == pytest.approx(published, abs=0.5 if "pcpvt" in line else 2.6)


@pytest.mark.slow
def test_time_and_memory_of_a_segmentor(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dense, "STEPS", 2)
    monkeypatch.setattr(dense, "run_in_new_process", lambda function, *args: function(*args))
    config = tmp_path / "small.py"
    config.write_text(
        "from segmentation.configs.recipes import upernet_swin_setting\n"
        "config = upernet_swin_setting('alt_gvt_tiny', channels=16, pretrained='')\n"
    )
    lines = run(capsys, dense, "segmentation", "--time", config, "--device", "cpu").splitlines()
    assert [line.split(",")[0] for line in lines] == ["training step", "inference"]
    assert all("MiB peak   (cpu)" in line for line in lines)


@pytest.mark.slow
def test_counts_and_memory_of_detectors(monkeypatch, capsys):
    lines = run(capsys, dense, "detection", "--device", "cpu").splitlines()
    layers = {tuple(line.rsplit(maxsplit=4)[:2]): float(line.split()[-2]) for line in lines[1:]}
    assert len(layers) == 12
    # Counted for the networks of the original, without norms.
    assert layers["RetinaNet", "pcpvt_small"] == pytest.approx(226.5, rel=0.01)
    assert layers["Mask R-CNN", "alt_gvt_small"] == pytest.approx(228.5, rel=0.01)
    monkeypatch.setattr(dense, "MEASURED_BACKBONES", ("alt_gvt_tiny",))
    (line,) = run(capsys, dense, "detection", "--memory", "--device", "cpu").splitlines()
    name, memory, *rest = line.split()
    assert (name, rest) == ("alt_gvt_tiny", ["MiB", "on", "cpu"])
    assert int(memory) > 50


def test_broken_images_are_named_by_their_own_file(tmp_path, capsys):
    pipeline.write_images(tmp_path, (50, 40), count=8)
    broken = next(tmp_path.glob("train/*/7.jpg"))
    broken.write_bytes(broken.read_bytes()[:300])
    assert f"{broken}: cannot be read as an image" in fails(capsys, pipeline, "--data", str(tmp_path))


def test_folders_without_classes_are_named(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    assert f"--data {tmp_path}: Couldn't find any class folder" in fails(capsys, pipeline, "--data", str(tmp_path))
    (tmp_path / "train/empty").mkdir()
    assert "Found no valid file for the classes empty" in fails(capsys, pipeline, "--data", str(tmp_path))


@pytest.mark.slow
def test_what_timms_models_do_not_support_is_named(capsys):
    options = ["alt_gvt_small", "--compare", "timm", "--grad-checkpointing", "--device", "cpu"]
    assert "twins_svt_small does not support it" in fails(capsys, models, *options)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (models, ["alt_gvt_tiny", "--compare", "timm"], "timm has no model like alt_gvt_tiny"),
        (models, ["alt_gvt"], "model 'alt_gvt' is unknown; did you mean"),
        (models, ["alt_gvt_tiny", "--input-size", "1", "2", "3"], "--input-size 1 2 3: give a side length, or height"),
        (models, ["alt_gvt_tiny", "--input-size", "16", "--device", "cpu"], "16x16 pixels are too small"),
        (models, ["alt_gvt_tiny", "--json", "/"], "--json /: name a file"),
        (
            models,
            ["alt_gvt_tiny", "--json", "/nowhere/report.json"],
            "--json /nowhere/report.json: name a file in a folder that exists",
        ),
        (models, ["alt_gvt_tiny", "--threads", "-1"], "argument --threads: '-1' is no"),
        (models, ["--workers", "2"], "unknown argument --workers"),
        (pipeline, ["--data", "/nowhere"], "--data /nowhere: has no folder train/"),
        (pipeline, ["--images", "4"], "--batch-size 8: there are 4 images, fewer than a batch"),
        (pipeline, ["--workers", "1000"], "--workers 1000: there are"),
        (pipeline, ["--json", "/"], "--json /: name a file"),
        (pipeline, ["alt_gvt_small"], "unknown argument alt_gvt_small"),
        (pipeline, ["--amp", "bf16"], "unknown argument --amp"),
        (pipeline, ["--threads", "2"], "unknown argument --threads"),
        (epochs, ["alt_gvt_tiny"], "timm has no model like alt_gvt_tiny"),
        (epochs, ["alt_gvt"], "model 'alt_gvt' is unknown; did you mean"),
        (epochs, ["--batch-size", "3"], "--batch-size 3: mixup pairs images; make it even"),
        (epochs, ["--data", "/nowhere"], "--data /nowhere: has no folder train/"),
        (epochs, ["--workers", "1000"], "--workers 1000: there are"),
        (epochs, ["--json", "/"], "--json /: name a file"),
        (epochs, ["--input-size", "64"], "unknown argument --input-size"),
        (parts, ["--threads", "2"], "unknown argument --threads"),
        (parts, ["--data", "/nowhere"], "unknown argument --data"),
        (parts, ["--json", "/"], "--json /: name a file"),
        (dense, [], "the following arguments are required"),
        (dense, ["detection", "--time", "config.py"], "unknown argument --time"),
        (dense, ["segmentation", "--time", "/nowhere.py"], "/nowhere.py: there is no such config"),
        (dense, ["segmentation", "--time", DETECTION_CONFIG], "is an experiment of another task"),
    ],
)
def test_bad_input(script, options, message, capsys):
    assert message in fails(capsys, script, *options)
