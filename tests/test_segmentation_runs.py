"""Training and testing of segmentation as its users run them: the published commands, configs, resuming, bad input."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from core.distributed import Processes, synchronise_norms
from dense.experiments import load_experiment
from dense.training import build_experiment, get_train_parser, log_norms, log_warmup
from segmentation import data as segmentation_data
from segmentation import test as test_script
from segmentation import train as train_script
from segmentation.configs.recipes import Experiment
from segmentation.data import build_dataset
from segmentation.network import Segmentor, build_segmentor
from tests import forks
from tests.helpers import (
    BACKBONES,
    DENSE_RUN_FILES,
    ROOT,
    Run,
    assert_same_run,
    fails,
    read_log,
    run_bash_in,
    run_processes,
)
from tests.small_data import ADE20K_SIZES, make_labels, write_ade20k, write_street_scenes

FOLDER = ROOT / "segmentation"
UPERNET = "configs/upernet_alt_gvt_s_512x512_160k_ade20k_swin_setting.py"
FPN = "configs/fpn_alt_gvt_s_512x512_80k_ade20k.py"
TINY = ["--device", "cpu", "--num_workers", "0"]
SMALL = ["backbone=alt_gvt_tiny", "pretrained=", "channels=16", "scale=(256, 64)", "crop_size=32", "iterations=6"]
SMALL += ["eval_interval=3", "batch_size=2", "global_batch=4", "warmup_iterations=2", "lr=1e-3", "window=0"]


run_bash = partial(run_bash_in, FOLDER)


@pytest.fixture(scope="session")
def trained(ade20k_folder, tmp_path_factory):
    """Six iterations on ADE20K's layout in two processes; return the folder and the output."""
    folder = tmp_path_factory.mktemp("segmentation") / "run"
    options = [*TINY, "--data-root", ade20k_folder, "--work-dir", folder, "--cfg-options", *SMALL]
    result = run_processes(2, ["segmentation/train.py", FOLDER / UPERNET, *options])
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.mark.slow
def test_a_training_leaves_what_is_promised(ade20k_folder, tmp_path):
    """The training is started by the published command."""
    folder = tmp_path / "run"
    options = [*TINY, "--data-root", ade20k_folder, "--work-dir", folder, "--print-freq", 1, "--cfg-options", *SMALL]
    result = run_bash("dist_train.sh", UPERNET, 2, *options)
    assert result.returncode == 0, result.stderr
    output = result.stdout
    assert {file.name for file in folder.iterdir()} == DENSE_RUN_FILES
    assert "batch: 2 images x 2 processes x 1 accumulated = global batch 4; lr 0.001; 3 steps per epoch" in output
    lines = read_log(folder)
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        assert {"train_decode", "train_aux", "train_lr", "test_mIoU", "test_mAcc", "test_aAcc"} < set(line)
        assert line["train_loss"] == pytest.approx(line["train_decode"] + line["train_aux"])
    rates = [1e-3 * (1 - i / 6) * min(1, 1e-6 + (1 - 1e-6) * i / 2) for i in range(6)]
    logged = [lines[0]["train_lr"], lines[1]["train_lr"]]
    assert logged == pytest.approx([np.mean(rates[:3]), np.mean(rates[3:])])
    assert f"mIoU {100 * lines[1]['test_mIoU']:.2f}" in output


WAYS = {"single-scale": [], "multi-scale": ["--aug-test"], "sliding": ["window=32", "stride=21"]}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_figures_equal_those_of_the_written_predictions(way, trained, ade20k_folder, tmp_path):
    """Counted anew from the PNG files, whose labels are those of ADE20K: 1 to 150, with 0 ignored in the truth."""
    folder, output = trained
    changes = [*SMALL, *(option for option in WAYS[way] if "=" in option)]
    flags = [option for option in WAYS[way] if "=" not in option]
    options = [*TINY, "--data-root", ade20k_folder, "--out", tmp_path, *flags, "--cfg-options", *changes]
    result = forks.run(
        ["segmentation/test.py", FOLDER / UPERNET, folder / "checkpoint.pth", "--eval", "mIoU", *options]
    )
    assert result.returncode == 0, result.stderr
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"ADE_valid_{i + 1:08}.png" for i in range(5)]
    hits, unions, labelled = np.zeros(151), np.zeros(151), np.zeros(151)
    for i, file in enumerate(files):
        predicted, truth = np.asarray(Image.open(file)), make_labels(ADE20K_SIZES[i], i)
        assert predicted.shape == truth.shape
        for label in range(1, 151):
            counted = truth != 0
            here, there = (predicted == label) & counted, truth == label
            hits[label] += (here & there).sum()
            unions[label] += (here | there).sum()
            labelled[label] += there.sum()
    miou = 100 * np.mean(hits[unions > 0] / unions[unions > 0])
    macc = 100 * np.mean(hits[labelled > 0] / labelled[labelled > 0])
    expected = f"mIoU {miou:.2f}  mAcc {macc:.2f}  aAcc {100 * hits.sum() / labelled.sum():.2f}"
    assert result.stdout.splitlines()[-1] == expected
    if way == "single-scale":
        assert f"mIoU {miou:.2f}  mAcc {macc:.2f}" in output  # what the training said about the same weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """File of a small network with random weights."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.manual_seed(0)
    model = build_segmentor(load_experiment(FOLDER / UPERNET, SMALL), 150, pretrained=False)
    torch.save(model.state_dict(), path)
    return path


def run_test(capsys, checkpoint, *options, changes=()) -> list[str]:
    """Run test.py and return the lines of its output."""
    command = [FOLDER / UPERNET, checkpoint, *TINY, *options, "--cfg-options", *SMALL, *changes]
    test_script.main([str(arg) for arg in command])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("flags", "changes", "expected"),
    [
        ([], [], (1, {"flip": False})),
        (["--aug-test"], ["test_ratios=1,2"], (2, {"flip": True})),
        ([], ["window=32", "stride=21"], (1, {"flip": False, "window": 32, "stride": 21})),
    ],
    ids=WAYS,
)
def test_options_of_a_test_reach_the_prediction(flags, changes, expected, weights, ade20k_folder, capsys, monkeypatch):
    seen = []

    def record(model, images, size, **options):
        assert not model.training
        seen.append((len(images), options))
        return torch.zeros(size, dtype=torch.int64)

    monkeypatch.setattr("segmentation.network.predict", record)
    run_test(capsys, weights, "--data-root", ade20k_folder, *flags, changes=changes)
    assert seen == [expected] * 5


def test_predictions_of_a_test_set_without_labels(weights, ade20k_folder, tmp_path, capsys):
    """As the benchmark of ADE20K takes them: PNG files with labels 1 to 150."""
    shutil.copytree(ade20k_folder / "images/validation", tmp_path / "data/images/testing")
    options = ["--data-root", tmp_path / "data", "--out", tmp_path / "out", "--format-only"]
    lines = run_test(capsys, weights, *options)
    assert lines[-1] == f"wrote predictions of 5 images to {tmp_path / 'out'}"
    assert not [line for line in lines if "mIoU" in line]
    run_test(capsys, weights, "--data-root", ade20k_folder, "--out", tmp_path / "val")
    for i, (width, height) in enumerate(ADE20K_SIZES):
        with Image.open(tmp_path / f"out/ADE_valid_{i + 1:08}.png") as image:
            labels = np.asarray(image)
            assert (image.mode, image.size) == ("L", (width, height))
        assert 1 <= labels.min() <= labels.max() <= 150
        assert np.array_equal(labels, np.asarray(Image.open(tmp_path / f"val/ADE_valid_{i + 1:08}.png")))
    line = fails(capsys, test_script, FOLDER / UPERNET, weights, *TINY, "--format-only")
    assert "--format-only: there is no folder to write to; name it with --out" in line


def test_predictions_are_evaluated_again_without_the_network(weights, ade20k_folder, tmp_path, capsys, monkeypatch):
    expected = run_test(capsys, weights, "--data-root", ade20k_folder, "--out", tmp_path / "out")
    monkeypatch.setattr(test_script, "build_segmentor", None)
    options = ["--data-root", ade20k_folder]
    lines = run_test(capsys, tmp_path / "out", *options, "--show-dir", tmp_path / "shown")
    start = next(i for i, line in enumerate(lines) if line.startswith("class "))
    assert lines[start:] == expected[-len(lines[start:]) :]
    assert "mIoU" in lines[-1]
    assert len(list((tmp_path / "shown").iterdir())) == 5
    command = [FOLDER / UPERNET, tmp_path / "out", *TINY, *options]
    assert "predictions are only evaluated; remove --out" in fails(capsys, test_script, *command, "--out", tmp_path)
    path = tmp_path / "out/ADE_valid_00000002.png"
    for labels, message in (
        (np.ones((70, 91), np.uint8), "does not fit the image: a prediction has 90x70 pixels, each with a class"),
        (np.zeros((70, 90), np.uint8), "does not fit the image: a prediction has 90x70 pixels, each with a class"),
        (np.full((70, 90), 151, np.uint8), "has the label 151, but there are 150 classes"),
        (None, "cannot be read as an image"),
    ):
        path.unlink()
        if labels is not None:
            Image.fromarray(labels).save(path)
        line = fails(capsys, test_script, *command)
        assert f"{path}: " in line
        assert message in line


def test_ones_own_data_train_and_are_evaluated(tmp_path, capsys):
    """In folders of their own; the labels that are ignored are not classes. A test takes all that from the training."""
    fields = write_street_scenes(tmp_path / "data")
    changes = [*SMALL, *(f"{name}={value}" for name, value in fields.items()), "iterations=3"]
    options = [FOLDER / UPERNET, *TINY, "--data-root", tmp_path / "data", "--work-dir", tmp_path / "run"]
    train_script.main([str(arg) for arg in (*options, "--cfg-options", *changes)])
    (line,) = read_log(tmp_path / "run")
    assert 0 <= line["test_mIoU"] <= 1
    capsys.readouterr()
    command = [FOLDER / UPERNET, tmp_path / "run/checkpoint_best.pth", *TINY, "--data-root", tmp_path / "data"]
    test_script.main([str(arg) for arg in command])
    output = capsys.readouterr().out
    assert "note: ignored-label 3 (config: 255)" in output
    figures = [f"{name} {100 * line[f'test_{name}']:.2f}" for name in ("mIoU", "mAcc", "aAcc")]
    assert output.splitlines()[-1] == "  ".join(figures)
    test_script.main([str(arg) for arg in (*command, "--cfg-options", "dataset=folder", "ignored_label=3")])
    output = capsys.readouterr().out
    assert "note: dataset" not in output
    assert "note: ignored-label" not in output
    assert "note: label-suffix _gtFine_labelTrainIds.png (config: .png)" in output


@pytest.mark.slow
def test_the_figures_are_the_same_for_any_number_of_processes(trained, ade20k_folder, tmp_path):
    folder, _ = trained
    outputs, pictures = [], []
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        options = [*TINY, "--data-root", ade20k_folder, "--out", out, "--show-dir", out / "shown"]
        options += ["--cfg-options", *SMALL]
        if processes == 1:
            result = run_bash("dist_test.sh", UPERNET, folder / "checkpoint_best.pth", processes, *options)
        else:
            command = ["segmentation/test.py", FOLDER / UPERNET, folder / "checkpoint_best.pth", *options]
            result = run_processes(processes, command)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout[result.stdout.index("class ") :])
        pictures.append({file.relative_to(out): file.read_bytes() for file in out.rglob("*.png")})
    assert outputs[0] == outputs[1] == outputs[2]
    assert pictures[0] == pictures[1] == pictures[2]
    assert len(pictures[0]) == 10


SURVIVING = [FOLDER / UPERNET, *TINY, "--save-every", "2", "--print-freq", "1"]


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(ade20k_folder, tmp_path, start):
    """Two processes, killed five times, also after log lines that no checkpoint has."""
    script = "segmentation/train.py"
    changes = ["--cfg-options", *SMALL, "iterations=12", "eval_interval=6", "drop_path=0.3"]
    command = [*SURVIVING, "--data-root", ade20k_folder, *changes]
    straight = Run(2, command, tmp_path / "straight", script=script)
    assert straight.end() == 0, straight.output
    command += ["--auto-resume"]
    first, second = r"epoch 0 \[{}/6\]", r"epoch 1 \[{}/6\]"
    for pattern in (first.format(1), first.format(3), first.format(6), second.format(1), second.format(4)):
        run = start(2, command, script=script)
        run.wait_for(lambda run, pattern=pattern: re.search(pattern, run.output), pattern)
        run.kill()
        assert run.process.exitcode < 0
    run = start(2, command, script=script)
    assert run.end() == 0, run.output
    assert "resumed" in run.output
    assert_same_run(tmp_path / "run", tmp_path / "straight", ("checkpoint.pth", "checkpoint_best.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("global_batch", [2, 8])
def test_another_global_batch_continues_at_the_same_step(global_batch, ade20k_folder, tmp_path, capsys):
    """The run is counted in steps, and so is its schedule."""
    command = [FOLDER / UPERNET, *TINY, "--data-root", ade20k_folder, "--work-dir", tmp_path, "--print-freq", "1"]
    changes = ["--cfg-options", *SMALL, "warmup_iterations=0"]
    train_script.main([str(arg) for arg in (*command, *changes)])
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    checkpoint |= {"epoch": 1, "position": 2 * 4, "history": checkpoint["history"][:1]}
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    capsys.readouterr()
    train_script.main([str(arg) for arg in (*command, "--auto-resume", *changes, f"global_batch={global_batch}")])
    output = capsys.readouterr().out
    message = f"the global batch changed from 4 to {global_batch}; epoch 1 continues"
    assert f"not an exact resume: {message} after step 2 of 3, and was at step 2" in output
    note = "note: BatchNorms see 2 of the 8 images of a step, because accumulated batches and CPU processes do not"
    assert (note in output) == (global_batch == 8)
    assert output.count("BatchNorms") == (global_batch == 8)
    line, summary = [line for line in output.splitlines() if line.startswith("epoch ")]
    assert line.startswith("epoch 1 [3/3]")
    assert f"lr {1e-3 * (1 - 5 / 6):.4g} " in line
    assert summary.startswith(f"epoch 1: {global_batch} images in ")
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]


def test_long_warm_ups_are_announced(ade20k_folder, tmp_path, capsys, caplog):
    command = [FOLDER / UPERNET, *TINY, "--data-root", ade20k_folder, "--work-dir", tmp_path, "--cfg-options", *SMALL]
    train_script.main([str(arg) for arg in (*command, "warmup_iterations=2", "iterations=6", "eval_interval=6")])
    warning = "warning: the warm-up takes 2 of 6 iterations; shorten it with --cfg-options warmup_iterations=0"
    assert warning in capsys.readouterr().out
    for length, is_long in ((0, False), (1, False), (2, True)):
        caplog.clear()
        log_warmup(length, 6)
        assert (f"the warm-up takes {length} of 6" in caplog.text) == is_long


def test_mixed_precision_reaches_the_evaluation(ade20k_folder, tmp_path, monkeypatch):
    seen = set()
    forward = Segmentor.forward
    monkeypatch.setattr(
        Segmentor,
        "forward",
        lambda self, *args: seen.add((self.training, torch.is_autocast_enabled("cpu"))) or forward(self, *args),
    )
    for amp in ("off", "bf16"):
        seen.clear()
        command = [FOLDER / UPERNET, *TINY, "--data-root", ade20k_folder, "--work-dir", tmp_path / amp, "--amp", amp]
        train_script.main([str(arg) for arg in (*command, "--cfg-options", *SMALL, "iterations=3")])
        assert seen == {(True, amp == "bf16"), (False, amp == "bf16")}


@pytest.mark.slow
@pytest.mark.parametrize("config", ["upernet_alt_gvt_tiny_shapes.py", "fpn_alt_gvt_tiny_shapes.py"])
def test_a_tiny_network_learns_from_a_classifiers_weights(config, tmp_path, capsys, monkeypatch):
    """By heart: eight images of shapes, on which it is evaluated, too."""
    monkeypatch.setattr(segmentation_data, "SHAPES_TRAIN", 8)
    monkeypatch.setattr(train_script, "build_dataset", lambda experiment, part: build_dataset(experiment, "train"))
    torch.manual_seed(0)
    torch.save(timm.create_model("alt_gvt_tiny", num_classes=10).state_dict(), tmp_path / "classifier.pth")
    changes = ["iterations=100", "eval_interval=100", "scale=(32, 32)", "crop_size=32", "warmup_iterations=10"]
    changes += ["batch_size=8", "global_batch=8"]
    options = ["--pretrained", tmp_path / "classifier.pth", "--work-dir", tmp_path / "run"]
    options = map(str, [FOLDER / "configs" / config, *TINY, *options, "--cfg-options", *changes, "lr=3e-3"])
    train_script.main(list(options))
    output = capsys.readouterr().out
    assert f"backbone from {tmp_path / 'classifier.pth'}: loaded 120 tensors; skipped" in output
    (line,) = read_log(tmp_path / "run")
    assert line["test_mIoU"] > 0.5  # background everywhere would be 0.1


@pytest.mark.slow
def test_fine_tuning_makes_new_heads_for_other_classes(trained, tmp_path, capsys):
    """From a file as the original's library writes it, with the classifier that its backbones carry."""
    folder, _ = trained
    released = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
    unused = {f"backbone.{name}": torch.zeros(3) for name in ("norm.weight", "norm.bias", "head.weight", "head.bias")}
    torch.save({"meta": {}, "state_dict": released | unused}, tmp_path / "released.pth")
    write_ade20k(tmp_path, high=4, count=4)
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    changes = ["--cfg-options", *SMALL, "dataset=folder", "iterations=3", "lr=1e-12"]
    options = ["--finetune", tmp_path / "released.pth", "--data-root", tmp_path, "--work-dir", tmp_path / "run"]
    train_script.main([str(arg) for arg in (FOLDER / UPERNET, *TINY, *options, *changes)])
    heads = [f"{head}.conv_seg.{kind}" for head in ("decode_head", "auxiliary_head") for kind in ("weight", "bias")]
    assert f"skipped {', '.join([*heads, *unused])}" in capsys.readouterr().out
    before, after = (torch.load(f / "checkpoint.pth", weights_only=True)["model"] for f in (folder, tmp_path / "run"))
    assert after["decode_head.conv_seg.weight"].shape[0] == 4
    for name, parameter in after.items():
        if name not in heads and "running" not in name and "num_batches" not in name:
            assert torch.allclose(parameter, before[name], atol=1e-9), name


@pytest.mark.slow
def test_half_precision_and_checkpointing_train(ade20k_folder, tmp_path):
    """To nearly the same losses as without."""
    losses = {}
    for name, options in {"plain": [], "saving": ["--amp", "bf16", "--grad-checkpointing"]}.items():
        folder = ["--data-root", ade20k_folder, "--work-dir", tmp_path / name]
        changes = ["--cfg-options", *SMALL, "drop_path=0.0", "iterations=3"]
        train_script.main([str(arg) for arg in (FOLDER / UPERNET, *TINY, *folder, *options, *changes)])
        losses[name] = read_log(tmp_path / name)[0]["train_loss"]
    assert losses["saving"] != losses["plain"]
    assert losses["saving"] == pytest.approx(losses["plain"], rel=0.02)


@pytest.mark.parametrize(
    ("device", "world_size", "batch_size", "message"),
    [
        ("cuda", 8, 2, ""),
        ("cuda", 1, 16, ""),
        ("cuda", 4, 2, "BatchNorms see 8 of the 16 images .* set batch_size=4 with 4 processes"),
        ("cuda", 1, 2, "BatchNorms see 2 of the 16 images .* set batch_size=16 with one process"),
        ("cpu", 8, 2, "BatchNorms see 2 of the 16 images .* set batch_size=16 with one process"),
        ("cpu", 1, 16, ""),
    ],
)
def test_batch_norms_that_do_not_see_the_whole_batch_are_announced(device, world_size, batch_size, message, caplog):
    processes = Processes(torch.device(device), world_size=world_size)
    with caplog.at_level("INFO", "twins"):
        log_norms(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), batch_size, 16, processes)
        assert re.search(message, caplog.text) if message else not caplog.text
        caplog.clear()
        log_norms(torch.nn.Sequential(torch.nn.LayerNorm(3)), batch_size, 16, processes)  # as detectors
        assert not caplog.text


def test_batch_norms_are_synchronised_between_gpus_alone():
    gpus = Processes(torch.device("cuda", 0), world_size=2)
    for processes in (gpus, Processes(torch.device("cuda", 0)), Processes(torch.device("cpu"), world_size=2)):
        model = build_segmentor(load_experiment(FOLDER / UPERNET, SMALL), 3, pretrained=False)
        names = list(model.state_dict())
        kinds = [type(module) for module in synchronise_norms(model, processes).modules()]
        plain, together = kinds.count(torch.nn.BatchNorm2d), kinds.count(torch.nn.SyncBatchNorm)
        assert (plain, together) == ((0, 13) if processes is gpus else (13, 0))
        assert list(model.state_dict()) == names


# -------------------------------------------------------------------------------------------------------- experiments


def test_every_config_says_what_it_reproduces():
    configs = sorted(set((FOLDER / "configs").glob("*.py")) - {FOLDER / "configs/recipes.py"})
    assert len(configs) == 14
    for config in configs:
        docstring = config.read_text().split('"""')[1]
        assert f"bash dist_train.sh configs/{config.name} " in docstring
        assert f"bash dist_test.sh configs/{config.name} checkpoint_file" in docstring
        assert "To expect: " in docstring
        assert load_experiment(config).backbone in docstring or "Twins-" in docstring


def test_docstrings_and_readme_state_the_published_figures():
    published = json.loads((ROOT / "tests/data/published_miou.json").read_text())["figures"]
    sources = {
        "paper": "mIoU {} (table 2 of the paper, arXiv 2104.13840)",
        "readme": "mIoU {} at one scale",
        "readme_aug_test": "{} with --aug-test (README of the paper's repository)",
        "log": "{} at the end of its training log",
    }
    both = sources | {"paper": "{} at one scale in table 2 of the paper (arXiv 2104.13840)"}
    readme = (ROOT / "README.md").read_text()
    assert len(published) == 12
    for name, figures in published.items():
        docstring = " ".join((FOLDER / f"configs/{name}.py").read_text().split('"""')[1].split())
        for source, figure in figures.items():
            assert (sources if len(figures) == 1 else both)[source].format(figure) in docstring
        backbone = re.search("(alt_gvt|pcpvt)_[sbl]", name)[0]
        shown = " / ".join(str(figures[source]) for source in ("readme", "readme_aug_test") if source in figures)
        assert f"| `{backbone}` | {shown or figures['paper']} |" in readme


@pytest.mark.parametrize("iterations", [20_000, 40_000, 80_000, 160_000])
@pytest.mark.parametrize("name", BACKBONES)
def test_one_field_sets_a_schedule(name, iterations):
    """The rates end at that iteration, and there are ten evaluations."""
    for config in (f"upernet_{name}_512x512_160k_ade20k_swin_setting.py", f"fpn_{name}_512x512_80k_ade20k.py"):
        args = get_train_parser("").parse_args([str(FOLDER / "configs" / config)])
        args.cfg_options = [f"iterations={iterations}"]
        experiment = build_experiment(args, Experiment)
        assert (experiment.iterations, experiment.eval_interval) == (iterations, iterations // 10)
        half, last = (train_script.lr_factor(i, experiment) for i in (iterations // 2, iterations))
        assert half == pytest.approx(0.5 if "upernet" in config else 0.01 + 0.99 * 0.5**0.9)
        assert last == pytest.approx(experiment.min_lr / experiment.lr)
        args.cfg_options.append("eval_interval=2000")
        assert build_experiment(args, Experiment).eval_interval == 2000


@pytest.mark.parametrize("name", ["upernet_alt_gvt_tiny_shapes", UPERNET[8:-3], FPN[8:-3]])
def test_any_number_of_iterations_is_divided_into_intervals(name):
    for iterations in (1, 2, 7, 19, 25, 99, 1300, 1301, 1700, 20_000, 12_345, 160_000):
        experiment = load_experiment(FOLDER / f"configs/{name}.py", [f"iterations={iterations}"])
        evaluations, rest = divmod(iterations, experiment.resolve().eval_interval)
        assert rest == 0
        assert 1 <= evaluations <= (2 if "shapes" in name else 10)
        if iterations in (1300, 1700, 20_000, 160_000):
            assert evaluations == (2 if "shapes" in name else 10)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--cfg-options", "chanels=64"],
            "--cfg-options chanels: there is no such key; configs/recipes.py lists them; did you mean channels",
        ),
        (["--cfg-options", "channels=wide"], "channels='wide' is not of type int"),
        (["--cfg-options", "head=uper"], "head='uper' is unknown; choose upernet or fpn"),
        (["--cfg-options", "iterations=7"], "iterations=7 is not a multiple of eval_interval=3"),
        (["--cfg-options", "window=32"], "stride=0 is not between 1 and window=32"),
        (["--cfg-options", "global_batch=5"], "global batch 5 is not a multiple of 2 (2 images x 1 processes)"),
        (
            ["--data-root", "/nowhere"],
            "/nowhere: there is no such folder; set the folder of the data set with --data-root",
        ),
        (["--pretrained", "/nowhere.pth"], "/nowhere.pth: there is no such file"),
        (["--cfg-options", "backbone=resnet50"], "backbone 'resnet50' is unknown; choose one of alt_gvt_base"),
        (["--cfg-options", "drop_path=1.5"], "drop_path=1.5 is not at least 0 and below 1"),
        (["--cfg-options", "test_ratios=()"], "test_ratios=(): at least one factor is needed"),
        (["--cfg-options", "batch_size=1"], "the BatchNorms of the head need at least two images per process"),
        (
            ["--cfg-options", "batch_size=1", "head=fpn"],
            "the BatchNorms of the head need at least two images per process",
        ),
        (["--cfg-options", "crop_size=(128, 96)"], "crop_size=(128, 96) is not of type int"),
        (["--finetune", "a.pth", "--resume", "b.pth"], "each set the first weights; choose one of them"),
        (["--save-evry", "3"], "unknown argument --save-evry; did you mean --save-every"),
    ],
)
def test_bad_options_of_a_training(options, message, ade20k_folder, tmp_path, capsys):
    changes = [*SMALL, *(options[1:] if options[0] == "--cfg-options" else [])]
    options = [*(options if options[0] != "--cfg-options" else []), "--cfg-options", *changes]
    command = [FOLDER / UPERNET, *TINY, "--data-root", ade20k_folder, "--work-dir", tmp_path / "run", *options]
    assert message in fails(capsys, train_script, *command)
    assert not list(tmp_path.iterdir())


def test_faults_in_the_data_end_a_training_with_one_line(tmp_path, capsys):
    write_ade20k(tmp_path / "data")
    path = tmp_path / "data/annotations/training/ADE_train_00000003.png"
    Image.fromarray(np.full((80, 50), 200, np.uint8)).save(path)
    for workers in (0, 1):
        options = [*TINY[:2], "--num_workers", workers, "--data-root", tmp_path / "data", "--cfg-options", *SMALL]
        line = fails(capsys, train_script, FOLDER / UPERNET, *options, "--work-dir", tmp_path / f"run{workers}")
        assert f"{path}: has the label 200, but there are 150 classes, labelled 1 to 150" in line
    path.unlink()
    line = fails(capsys, train_script, FOLDER / UPERNET, *options, "--work-dir", tmp_path / "run")
    assert f"ADE_train_00000003.jpg: has no labels; {path} is missing" in line


@pytest.mark.slow
def test_weights_of_another_network_are_refused(trained, ade20k_folder, tmp_path, capsys):
    folder, _ = trained
    options = [*TINY, "--data-root", ade20k_folder, "--cfg-options", *SMALL]
    line = fails(capsys, test_script, FOLDER / UPERNET, folder / "checkpoint.pth", *options, "backbone=pcpvt_tiny")
    assert "checkpoint.pth: these weights do not fit the model; " in line
    line = fails(capsys, test_script, FOLDER / FPN, folder / "checkpoint.pth", *options)
    assert "missing: neck.lateral_convs.0.conv.weight" in line
    classifier = timm.create_model("alt_gvt_tiny", num_classes=3)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    line = fails(capsys, test_script, FOLDER / UPERNET, tmp_path / "classifier.pth", *options)
    assert "does not hold a segmentation network; pass weights of a backbone with --pretrained" in line
    command = [FOLDER / UPERNET, "--pretrained", folder / "checkpoint.pth", "--work-dir", tmp_path / "new", *options]
    assert "contains a whole network, not a classifier; start from it with --finetune" in fails(
        capsys, train_script, *command
    )
    line = fails(capsys, test_script, FOLDER / UPERNET, tmp_path / "none.pth", *options)
    assert "none.pth: there is no such file" in line
    shutil.copytree(folder, tmp_path / "run")
    resumed = ["--work-dir", tmp_path / "run"]
    line = fails(capsys, train_script, FOLDER / UPERNET, *resumed, "--auto-resume", *options, "backbone=pcpvt_tiny")
    assert "its run used backbone alt_gvt_tiny; use the same, not pcpvt_tiny" in line
    options.append("eval_interval=2")
    line = fails(capsys, train_script, FOLDER / UPERNET, *resumed, "--auto-resume", *options)
    assert "its run used eval_interval 3; use the same, not 2" in line
    line = fails(capsys, train_script, FOLDER / UPERNET, *resumed, *options)
    assert "exists, and this run would overwrite it; continue that run with --auto-resume" in line


@pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh"])
def test_launch_scripts_say_how_they_are_used(script):
    result = run_bash(script)
    assert result.returncode == 2
    assert result.stderr.startswith(f"usage: bash {script} CONFIG ")
    result = run_bash(script, UPERNET, *(["x.pth"] if "test" in script else []), "many")
    assert (result.returncode, result.stderr) == (2, "launch.sh: many is not a number of processes\n")
