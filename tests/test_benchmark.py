"""The benchmark: what it counts, times and refuses."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import models as benchmark
from tests.conftest import fails
from utils import seed_generators

SMALL = ["--device", "cpu", "--turns", "2", "--batch-size", "2", "--input-size", "64"]


def run(capsys, *argv) -> str:
    """Run benchmark.py in this process and return what it prints."""
    threads = torch.get_num_threads()
    try:
        benchmark.main([str(each) for each in argv])
    finally:
        torch.set_num_threads(threads)
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_model_beside_timms(tmp_path, capsys):
    report = tmp_path / "report.json"
    output = run(capsys, "alt_gvt_small", "--compare", "timm", *SMALL, "--threads", "1", "--json", report)
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
    assert rows[1]["memory"] > 24_060_776 * 4  # of gradients
    assert rows[0]["images_per_second"] > rows[1]["images_per_second"]


@pytest.mark.slow
def test_backbones_of_dense_tasks(tmp_path, capsys):
    options = [*SMALL[:-2], "--input-size", "70", "100", "--features", "--mode", "inference"]
    run(capsys, "alt_gvt_small", "--compare", "timm", *options, "--json", tmp_path / "report.json")
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert row["output_difference"] < 1e-5
    assert row["parameters"] < 24_060_776  # without the classifier


def test_outputs_that_differ_are_not_compared():
    setting = benchmark.Setting(torch.device("cpu"), batch_size=1, input_size=(32, 32))
    ours = benchmark.Subject("alt_gvt_tiny", setting)
    other = benchmark.Subject("alt_gvt_tiny", setting)
    with pytest.raises(RuntimeError, match="the outputs of the two models differ by"):
        benchmark.check_outputs(ours, other)
    same = benchmark.Subject("alt_gvt_tiny", setting, ours.model.state_dict())
    assert benchmark.check_outputs(ours, same) == 0


@pytest.mark.slow
def test_times_are_those_of_one_call():
    calls = []

    def step(seconds):
        calls.append(seconds)
        time.sleep(seconds)

    times = benchmark.time_in_turns([lambda: step(0.02), lambda: step(0.4)], 3, torch.device("cpu"))
    assert [len(each) for each in times] == [3, 3]
    assert all(0.02 <= each < 0.2 for each in times[0])  # of one call, not of the 15 of a turn
    assert all(each >= 0.4 for each in times[1])
    runs = "".join("s" if each == 0.02 else "l" for each in calls)
    assert runs.lstrip("s").lstrip("l").count("sl") == 3  # in turns, after the warm-up


@pytest.mark.slow
def test_input_pipelines(image_folder, tmp_path, capsys):
    options = ["--data", image_folder, "--batch-size", "4", "--turns", "2", "--workers", "0", "--device", "cpu"]
    output = run(capsys, *options, "--json", tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["loop"] for row in rows] == ["ours", "timm", "torchvision"]
    assert rows[0]["ratio"] == 1
    assert "images/s" in output


def test_images_of_the_pipeline(tmp_path):
    benchmark.write_images(tmp_path / "drawn", (50, 40), count=8)
    benchmark.link_images(tmp_path / "drawn", tmp_path / "linked", count=6)
    for folder, batches in (("drawn", 4), ("linked", 3)):
        options = benchmark.parse_training(tmp_path / folder, 2, 0)
        for build in (benchmark.build_our_loader, benchmark.build_timms_loader, benchmark.build_torchvisions_loader):
            assert [sorted(getattr(batch[0], "pixels", batch[0]).shape) for batch in build(options)] == [
                [2, 3, 224, 224]
            ] * batches


@pytest.mark.slow
def test_epochs_of_training(tmp_path, capsys):
    benchmark.write_images(tmp_path / "images", (50, 40), count=2)
    options = ["--data", tmp_path / "images", "--epoch", "--batch-size", "2", "--turns", "1", "--workers", "0"]
    run(capsys, "alt_gvt_small", *options, "--device", "cpu", "--threads", "1", "--json", tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["loop"] for row in rows] == ["alt_gvt_small, ours", "timm"]
    assert rows[0]["ratio"] == 1
    assert rows[1]["images_per_second"] > 0


@pytest.mark.slow
def test_parts_have_the_same_results_both_ways(tmp_path, capsys):
    for part in benchmark.build_parts():
        found = []
        for way in (part.before, part.after):
            seed_generators(0)
            with torch.no_grad():
                found.append(way())
        tolerance = 0.3 if isinstance(found[0], Image.Image) else 1e-6
        before, after = (np.asarray(each, float).ravel() for each in found)
        assert before.std() > 0
        assert np.abs(before - after).mean() < tolerance
    output = run(capsys, "--parts", "--turns", "1", "--device", "cpu", "--json", tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["part"] for row in rows] == [part.what for part in benchmark.build_parts()]
    assert all(row["part"] in output for row in rows)


def test_broken_images_are_named_by_their_own_file(tmp_path, capsys):
    benchmark.write_images(tmp_path, (50, 40), count=8)
    broken = next(tmp_path.glob("train/*/7.jpg"))
    broken.write_bytes(broken.read_bytes()[:300])
    assert f"{broken}: cannot be read as an image" in fails(capsys, benchmark, "--data", str(tmp_path))


def test_folders_without_classes_are_named(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    assert f"--data {tmp_path}: Couldn't find any class folder" in fails(capsys, benchmark, "--data", str(tmp_path))
    (tmp_path / "train/empty").mkdir()
    assert "Found no valid file for the classes empty" in fails(capsys, benchmark, "--data", str(tmp_path))


@pytest.mark.slow
def test_what_timms_models_do_not_support_is_named(capsys):
    options = ["alt_gvt_small", "--compare", "timm", "--grad-checkpointing", "--device", "cpu"]
    assert "twins_svt_small does not support it" in fails(capsys, benchmark, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["alt_gvt_tiny", "--compare", "timm"], "timm has no twin of alt_gvt_tiny"),
        (["alt_gvt"], "model 'alt_gvt' is unknown; did you mean"),
        (["alt_gvt_tiny", "--input-size", "1", "2", "3"], "--input-size 1 2 3: give a side, or height and width"),
        (["alt_gvt_tiny", "--input-size", "16"], "16x16 pixels are too small"),
        (["--data", "/nowhere"], "--data /nowhere: has no folder train/"),
        (["alt_gvt_tiny", "--data", "--epoch"], "timm has no twin of alt_gvt_tiny"),
        (["--data", "--epoch", "--batch-size", "3"], "--batch-size 3: mixup needs an even one"),
        (["--data", "--images", "4"], "--batch-size 8: there are 4 images, fewer than a batch"),
        (["alt_gvt_tiny", "--json", "/"], "--json /: name a file"),
        (["--data", "--workers", "1000"], "--workers 1000: there are"),
        (["alt_gvt_small", "--data", "--amp", "bf16"], "--data has no use for --amp, MODEL"),
        (["--data", "--epoch", "--input-size", "64"], "--epoch has no use for --input-size"),
        (["--parts", "--threads", "2"], "--parts has no use for --threads"),
        (["--parts", "--epoch"], "--parts measures on data of its own"),
        (["alt_gvt_small", "--epoch"], "--epoch trains on the images of --data; pass that, too"),
        (
            ["alt_gvt_tiny", "--json", "/nowhere/report.json"],
            "--json /nowhere/report.json: name a file in a folder that exists",
        ),
        (["alt_gvt_tiny", "--threads", "-1"], "'-1' is no whole number of at least 0"),
    ],
)
def test_bad_input(options, message, capsys):
    assert message in fails(capsys, benchmark, *options, "--device", "cpu")
