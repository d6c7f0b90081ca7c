"""The benchmarks: what they count, time and refuse."""

import json
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import common, dense, epochs, models, pipeline, throughput
from core.distributed import Processes
from datasets import build_train_loader
from main import get_args_parser, parse_args
from tests import forks
from tests.helpers import ROOT, fails

SMALL = ["--device", "cpu", "--turns", "2", "--batch-size", "2", "--input-size", "64", "64"]
DETECTOR = "detection/configs/mask_rcnn_alt_gvt_tiny_shapes.py"
DETECTION_CONFIG = ROOT / "detection/configs/retinanet_pcpvt_s_fpn_1x_coco_pvt_setting.py"


@pytest.fixture(autouse=True)
def fast_processes(monkeypatch):
    """Let new processes be forks, which start faster."""
    monkeypatch.setattr(common, "run_in_new_process", forks.call)


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
    assert [row["model"] for row in rows] == ["alt_gvt_small, inference", "alt_gvt_small, training"]
    for row in rows:
        assert row["parameters"] == 24_060_776
        assert 0 < row["difference"] < 1e-5
        assert row["least"] <= row["ratio"] <= row["most"]
        assert row["least"] * 0.99 <= row["images/s"] / row["timm"] <= row["most"] * 1.01
        assert 0 < row["% of peak"] < 100
    assert rows[1]["MiB"] > 24_060_776 * 4 / 2**20  # gradients
    assert rows[0]["images/s"] > rows[1]["images/s"]


@pytest.mark.slow
def test_backbones_of_dense_tasks(tmp_path, capsys):
    options = [*SMALL[:-3], "--input-size", "70", "100", "--features", "--mode", "inference"]
    run(capsys, models, "alt_gvt_small", "--compare", "timm", *options, "--json", tmp_path / "report.json")
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert row["difference"] < 1e-5
    assert row["parameters"] < 24_060_776  # without the classifier


def test_different_outputs_are_not_compared():
    args = models.get_parser().parse_args(["--batch-size", "1", "--input-size", "32", "32"])
    ours, other = (models.Subject("alt_gvt_tiny", args, torch.device("cpu")) for _ in range(2))
    with pytest.raises(RuntimeError, match="the outputs of the two models differ by"):
        models.check_outputs(ours, other)
    other.model.load_state_dict(ours.model.state_dict())
    assert models.check_outputs(ours, other) == 0


@pytest.mark.slow
def test_times_are_those_of_one_call():
    calls = []

    def step(seconds):
        calls.append(seconds)
        time.sleep(seconds)

    times = common.time_in_turns([lambda: step(0.02), lambda: step(0.4)], 3, torch.device("cpu"), "steps")
    assert [len(step_times) for step_times in times] == [3, 3]
    assert all(0.02 <= seconds < 0.2 for seconds in times[0])  # one call, not the 15 of a turn
    assert all(seconds >= 0.4 for seconds in times[1])
    runs = "".join("s" if seconds == 0.02 else "l" for seconds in calls)
    assert runs.lstrip("s").lstrip("l").count("sl") == 3  # in turns, after the warm-up


def test_progress_goes_to_standard_error(capsys):
    common.time_in_turns([lambda: time.sleep(0.2)], 1, torch.device("cpu"), "a step")
    assert capsys.readouterr() == ("", "a step: warm-up and 1 turns\n")


@pytest.mark.slow
def test_input_pipelines(image_folder, tmp_path, capsys):
    options = ["--data", image_folder, "--batch-size", "4", "--turns", "2", "--workers", "0"]
    output = run(capsys, pipeline, *options, "--json", tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["loop"] for row in rows] == ["ours", "timm", "torchvision"]
    assert rows[0]["ratio"] == 1
    assert "images/s" in output


def test_images_of_the_pipeline(tmp_path):
    pipeline.draw_images(tmp_path / "drawn", 8, size=(50, 40))
    pipeline.link_images(tmp_path / "drawn", tmp_path / "linked", count=6)
    for folder, batches in (("drawn", 4), ("linked", 3)):
        options = pipeline.parse_loading(tmp_path / folder, 2, 0)
        ours = [images.normalise() for images, _ in build_train_loader(options, Processes(torch.device("cpu")), 2)]
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
    assert epochs.run_our_epoch("alt_gvt_small", loading, threads=1) == 2.5 / 12
    ((_, script, *argv),) = commands
    assert script == str(ROOT / "main.py")
    expected = {**vars(loading), **changed, "model": "alt_gvt_small", "epochs": 1}
    args = vars(parse_args(argv))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.slow
def test_epochs_of_training(tmp_path, capsys):
    pipeline.draw_images(tmp_path / "images", 2, size=(50, 40))
    options = ["--data", tmp_path / "images", "--batch-size", "2", "--turns", "1", "--workers", "0", "--threads", "1"]
    run(capsys, epochs, "alt_gvt_small", *options, "--json", tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["loop"] for row in rows] == ["alt_gvt_small, ours", "timm"]
    assert rows[0]["ratio"] == 1
    assert rows[1]["images/s"] > 0


@pytest.mark.slow
def test_counts_of_segmentors(monkeypatch, capsys):
    monkeypatch.setattr(dense, "PUBLISHED_G", {"pcpvt_s": 234, "alt_gvt_b": 261})
    _, pcpvt, alt_gvt = run(capsys, dense, "segmentation", "--device", "cpu").splitlines()
    assert pcpvt.split()[:2] == ["pcpvt_s", "54,080,044"]
    assert float(pcpvt.split()[2]) == pytest.approx(234, abs=0.5)
    # The published figures count padded windows of SVT, which ours do not have.
    assert float(alt_gvt.split()[2]) == pytest.approx(261, abs=2.6)


@pytest.mark.slow
def test_time_and_memory_of_a_segmentor(tmp_path, monkeypatch, capsys):
    built, build = [], dense.build_segmentor

    def time_once(step):
        return common.time_calls(step, 1, torch.device("cpu"))

    def build_and_record(*args, **kwargs):
        model = build(*args, **kwargs)
        built.append((model, model.decode_head.conv_seg.weight.clone()))
        return model

    monkeypatch.setattr(dense, "build_segmentor", build_and_record)
    monkeypatch.setattr(common, "time_in_turns", lambda steps, *_: [[time_once(step)] for step in steps])
    monkeypatch.setattr(common, "run_in_new_process", lambda function, *args: function(*args))
    config = tmp_path / "small.py"
    config.write_text(
        "from segmentation.configs.recipes import upernet_swin_setting\n"
        "config = upernet_swin_setting('alt_gvt_tiny', channels=16, pretrained='')\n"
    )
    _, *lines = run(capsys, dense, "segmentation", "--time", config, "--device", "cpu").splitlines()
    assert [line.split(",")[0] for line in lines] == ["training", "inference"]
    assert all(float(line.split()[-1]) > 100 for line in lines)
    unchanged = [torch.equal(model.decode_head.conv_seg.weight, weight) for model, weight in built]
    assert unchanged == [False, True]


@pytest.mark.slow
def test_counts_and_memory_of_detectors(monkeypatch, capsys):
    monkeypatch.setattr(dense, "PUBLISHED", ("pcpvt_small", "alt_gvt_small"))
    lines = run(capsys, dense, "detection", "--device", "cpu").splitlines()
    layers = {line.rsplit(maxsplit=3)[0]: float(line.split()[-2]) for line in lines[1:]}
    assert len(layers) == 4
    # Counted for the networks of the original, without norms.
    assert layers["RetinaNet, pcpvt_small"] == pytest.approx(226.5, rel=0.01)
    assert layers["Mask R-CNN, alt_gvt_small"] == pytest.approx(228.5, rel=0.01)
    monkeypatch.setattr(dense, "MEASURED_BACKBONES", ("alt_gvt_tiny",))
    _, line = run(capsys, dense, "detection", "--memory", "--device", "cpu").splitlines()
    name, memory = line.split()
    assert name == "alt_gvt_tiny"
    assert float(memory) > 50


def test_broken_images_are_named_by_their_own_file(tmp_path, capsys):
    pipeline.draw_images(tmp_path, 8, size=(50, 40))
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
        (models, ["alt_gvt_tiny", "--input-size", "64"], "argument --input-size: expected 2 arguments"),
        (models, ["alt_gvt_tiny", "--input-size", "16", "16", "--device", "cpu"], "16x16 pixels are too small"),
        (models, ["alt_gvt_tiny", "--json", "/"], "argument --json: /: name a file in a folder that exists"),
        (models, ["alt_gvt_tiny", "--json", "/nowhere/report.json"], "--json: /nowhere/report.json: name a file"),
        (models, ["alt_gvt_tiny", "--threads", "0"], "argument --threads: '0' is no"),
        (models, ["--workers", "2"], "unknown argument --workers"),
        (pipeline, ["--data", "/nowhere"], "--data /nowhere: "),
        (pipeline, ["--images", "4"], "--batch-size 8: there are 4 images, fewer than a batch"),
        (pipeline, ["--workers", "1000"], "argument --workers: '1000' is no"),
        (pipeline, ["--json", "/"], "argument --json: /: name a file"),
        (pipeline, ["alt_gvt_small"], "unknown argument alt_gvt_small"),
        (pipeline, ["--amp", "bf16"], "unknown argument --amp"),
        (pipeline, ["--threads", "2"], "unknown argument --threads"),
        (epochs, ["alt_gvt_tiny"], "timm has no model like alt_gvt_tiny"),
        (epochs, ["alt_gvt"], "model 'alt_gvt' is unknown; did you mean"),
        (epochs, ["--batch-size", "3"], "--batch-size 3: mixup pairs images; make it even"),
        (epochs, ["--data", "/nowhere"], "--data /nowhere: "),
        (epochs, ["--workers", "1000"], "argument --workers: '1000' is no"),
        (epochs, ["--json", "/"], "argument --json: /: name a file"),
        (epochs, ["--input-size", "64"], "unknown argument --input-size"),
        (dense, [], "the following arguments are required"),
        (dense, ["detection", "--time", "config.py", "--memory"], "--memory: measures backbones"),
        (dense, ["segmentation", "--memory"], "--memory: measures backbones of detection"),
        (dense, ["segmentation", "--time", "/nowhere.py"], "/nowhere.py: there is no such config"),
        (dense, ["segmentation", "--time", DETECTION_CONFIG], "is an experiment of another task"),
    ],
)
def test_bad_input(script, options, message, capsys):
    assert message in fails(capsys, script, *options)


# ------------------------------------------------------------------------------------------------ tables of GPUs


@pytest.mark.slow
def test_throughput_of_the_papers_models(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = ["--device", "cpu", "--batch-size", "1", "--turns", "1", "--json", str(tmp_path / "table.json")]
    names = ["alt_gvt_small", "regnety_040", "alt_gvt_tiny"]
    run(capsys, throughput, *names, *options, "--picture", tmp_path / "p.png")
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["model"] for row in rows] == names
    assert [(row["V100, paper"], row["top-1, paper"]) for row in rows] == [(1059, 81.7), (1157, 80.0), (None, None)]
    assert all(row["images/s"] > 0 for row in rows)
    assert Image.open(tmp_path / "p.png").width > 1000


@pytest.mark.slow
def test_a_profile_of_a_training_step(tmp_path, capsys):
    options = ["--device", "cpu", "--batch-size", "2", "--turns", "1", "--mode", "training"]
    run(capsys, models, "alt_gvt_tiny", *options, "--input-size", 64, 64, "--profile", tmp_path / "profile.txt")
    table = (tmp_path / "profile.txt").read_text()
    assert "Self CPU" in table
    assert "aten::_fused_adamw_" in table


@pytest.mark.slow
def test_time_of_detectors(monkeypatch, capsys):
    sizes = []

    def build(experiment, mode):
        images = [torch.rand(3, 64, 96)] * (2 if mode == "training" else 1)
        masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
        masks[0, 10:40, 10:40] = 1
        target = {"boxes": torch.tensor([[10.0, 10, 40, 40]]), "labels": torch.tensor([1]), "masks": masks}
        sizes.append(mode)
        return dense.build_detector(experiment, 3, pretrained=False), images, [target] * len(images)

    monkeypatch.setattr(dense, "build_detection", build)
    monkeypatch.setattr(common, "run_in_new_process", lambda function, *args: function(*args))
    output = run(capsys, dense, "detection", "--device", "cpu", "--time", ROOT / DETECTOR)
    assert sizes == ["training", "inference"]
    assert "training, 2 x 64x96" in output
