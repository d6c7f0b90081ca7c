"""Every option of the dense tasks' scripts and every field of their experiments has an effect."""

from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch

import main
from core import shapes
from core.distributed import Processes
from dense.experiments import load_experiment
from dense.training import REMEMBERED_FIELDS, get_train_parser
from detection import test as detection_test
from detection import train as detection_train
from detection.configs.recipes import Experiment as DetectionExperiment
from models import cpu
from segmentation import test as segmentation_test
from segmentation import train as segmentation_train
from segmentation.configs.recipes import Experiment as SegmentationExperiment
from tests.helpers import ROOT, read_log
from tests.test_options import BASE, CPU, differ, load_weights, options_of

pytestmark = pytest.mark.usefixtures("small_sets")

# Tests of the options of train.py in the dense tasks.
DENSE_TRAIN = {
    "config": "test_files_without_an_experiment_are_refused",
    "data_root": "test_a_training_leaves_what_is_promised",
    "cfg_options": "test_fields_are_changed_with_their_types",
    "num_workers": "test_loaders_follow_their_options",
    "loader_timeout": "test_loaders_follow_their_options",
    "pin_mem": "test_loaders_follow_their_options",
    "output_dir": "test_a_training_leaves_what_is_promised",
    "resume": "test_another_global_batch_continues_the_run",
    "auto_resume": "test_another_global_batch_continues_at_the_same_step",
    "save_every": "test_a_killed_run_ends_as_an_uninterrupted_one",
    "keep": "test_options_of_a_dense_training",
    "on_nonfinite": "test_options_of_a_dense_training",
    "max_skipped": "test_options_of_a_dense_training",
    "seed": "test_options_of_a_dense_training",
    "print_freq": "test_options_of_a_dense_training",
    "tensorboard": "test_tensorboard_shows_the_lines_of_the_logs",
    "pretrained": "test_a_tiny_network_learns_from_a_classifiers_weights",
    "finetune": "test_fine_tuning_makes_new_heads_for_other_classes",
    "freeze": "test_frozen_stages_of_a_backbone_keep_their_weights",
    "grad_checkpointing": "test_options_of_a_dense_training",
    "compile": "test_options_of_a_dense_training",
    "amp": "test_mixed_precision_reaches_the_evaluation",
    "tf32": "test_kernels_of_each_script",
    "device": "test_unknown_device",
    "dist_url": "test_processes_use_the_given_rendezvous",
    "local_rank": "test_training_on_two_processes",
    "deterministic": "test_deterministic_algorithms",
    "traceback": "test_traceback_on_demand",
}
# Tests of the options of test.py in the dense tasks.
DENSE_TEST = {
    "checkpoint": "test_figures_equal_those_of_the_written_predictions",
    "eval": "test_weights_that_do_not_fit_are_refused",
    "aug_test": "test_figures_equal_those_of_the_written_predictions",
    "out": "test_figures_equal_pycocotools_on_the_written_results",
    "format_only": "test_predictions_of_a_test_set_without_labels",
    "show_dir": "test_the_figures_are_the_same_for_any_number_of_processes",
    "show_score_thr": "test_only_objects_above_the_threshold_are_shown",
}


def test_every_option_has_a_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert options_of(get_train_parser("")) == set(DENSE_TRAIN)
    for script in (segmentation_test, detection_test):
        assert options_of(script.get_parser()) <= {*DENSE_TRAIN, *DENSE_TEST}
    for table in (DENSE_TRAIN, DENSE_TEST):
        assert not [name for name in table.values() if f"def {name}(" not in tests]


TASKS = {
    "segmentation": (
        segmentation_train,
        "segmentation/configs/upernet_alt_gvt_tiny_shapes.py",
        "channels=8 scale=(64,64) crop_size=48 batch_size=2 global_batch=2 iterations=2 eval_interval=2 "
        "warmup_iterations=0 lr=1e-2",
    ),
    "detection": (
        detection_train,
        "detection/configs/mask_rcnn_alt_gvt_tiny_shapes.py",
        "channels=8 scale=(64,64) batch_size=4 global_batch=4 epochs=1 milestones=() warmup_iterations=0 lr=1e-2 "
        "proposals=20 roi_samples=8",
    ),
}
EXPERIMENTS = {"segmentation": SegmentationExperiment, "detection": DetectionExperiment}
FIELDS = {
    "segmentation": {
        "backbone": ["backbone=pcpvt_tiny"],
        "head": ["head=fpn"],
        "channels": ["channels=16"],
        "window_padding": ["window_padding=zero"],
        "drop_path": ["drop_path=0.5"],
        "scale": ["scale=(96, 96)"],
        "scale_range": ["scale_range=(0.5, 2.0)"],
        "crop_size": ["crop_size=32"],
        "global_batch": ["global_batch=4"],
        "lr": ["lr=2e-2"],
        "weight_decay": ["weight_decay=0.5"],
        "not_decayed": ["not_decayed=('norm', 'pos_block', 'head')"],
        "iterations": ["iterations=4"],
        "warmup_iterations": ["warmup_iterations=2"],
        "power": ["power=3.0"],
        "min_lr": ["min_lr=5e-3"],
    },
    "detection": {
        "backbone": ["backbone=pcpvt_tiny"],
        "detector": ["detector=retinanet"],
        "channels": ["channels=16"],
        "proposals": ["proposals=5"],
        "roi_samples": ["roi_samples=16"],
        "drop_path": ["drop_path=0.5"],
        "scale": ["scale=(96, 96)"],
        "batch_size": ["batch_size=2"],
        "global_batch": ["global_batch=8", "batch_size=8"],
        "lr": ["lr=2e-2"],
        "weight_decay": ["weight_decay=0.5"],
        "not_decayed": ["not_decayed=('norm', 'pos_block')"],
        "epochs": ["epochs=2"],
        "warmup_iterations": ["warmup_iterations=2"],
    },
}
FIELDS_BESIDE = {
    "segmentation": {
        "batch_size": (["head=fpn", "crop_size=64"], ["batch_size=1"]),
        "neck_channels": (["head=fpn"], ["neck_channels=8"]),
        "warmup_ratio": (["warmup_iterations=2"], ["warmup_ratio=0.5"]),
    },
    "detection": {
        "milestones": (["epochs=2"], ["milestones=(1,)"]),
        "head_std": (["detector=retinanet"], ["head_std=0.01"]),
        "warmup_ratio": (["warmup_iterations=2"], ["warmup_ratio=0.5"]),
    },
}
FIELDS_ELSEWHERE = {
    "segmentation": {
        "train_images": "test_other_folders_suffixes_lists_and_an_ignored_label",
        "train_labels": "test_other_folders_suffixes_lists_and_an_ignored_label",
        "train_split": "test_other_folders_suffixes_lists_and_an_ignored_label",
        "val_images": "test_other_folders_suffixes_lists_and_an_ignored_label",
        "val_labels": "test_other_folders_suffixes_lists_and_an_ignored_label",
        "val_split": "test_other_folders_suffixes_lists_and_an_ignored_label",
        "test_images": "test_a_test_part_has_no_labels",
        "test_split": "test_a_test_part_has_no_labels",
        "image_suffix": "test_other_folders_suffixes_lists_and_an_ignored_label",
        "label_suffix": "test_other_folders_suffixes_lists_and_an_ignored_label",
        "ignored_label": "test_other_folders_suffixes_lists_and_an_ignored_label",
        "eval_interval": "test_a_training_leaves_what_is_promised",
        "evaluations": "test_any_number_of_iterations_is_divided_into_intervals",
        "test_ratios": "test_figures_equal_those_of_the_written_predictions",
        "window": "test_figures_equal_those_of_the_written_predictions",
        "stride": "test_figures_equal_those_of_the_written_predictions",
    },
    "detection": {
        "train_annotations": "test_data_may_lie_in_other_folders",
        "train_images": "test_data_may_lie_in_other_folders",
        "val_annotations": "test_data_may_lie_in_other_folders",
        "val_images": "test_data_may_lie_in_other_folders",
        "test_annotations": "test_data_may_lie_in_other_folders",
        "test_images": "test_data_may_lie_in_other_folders",
        "schedule": "test_schedules_are_chosen_by_one_field",
        "score_threshold": "test_objects_are_chosen_by_the_thresholds_of_the_experiment",
        "nms_threshold": "test_objects_are_chosen_by_the_thresholds_of_the_experiment",
        "detections": "test_objects_are_chosen_by_the_thresholds_of_the_experiment",
        "test_scales": "test_saved_results_are_evaluated_without_the_network",
        "many_scales": "test_an_experiment_chooses_its_scales",
    },
    "both": {
        "pretrained": "test_a_tiny_network_learns_from_a_classifiers_weights",
        "dataset": "test_fine_tuning_makes_new_heads_for_other_classes",
        "data_root": "test_a_training_leaves_what_is_promised",
        "precision": "test_experiments_are_run_in_their_precision_on_a_gpu",
        "loss_scale": "test_a_published_loss_scale_reaches_the_training",
    },
}


def train_dense(task: str, folder: Path, *changes: str) -> None:
    """Train the small experiment of a task with some fields changed."""
    script, config, setting = TASKS[task]
    options = ["--device", "cpu", "--num_workers", "0", "--work-dir", str(folder)]
    script.main([str(ROOT / config), *options, "--cfg-options", *setting.split(), *changes])


@pytest.fixture(scope="module")
def run_dense(tmp_path_factory):
    """Return a function that trains an experiment of a task and returns the folder of the run."""

    @cache
    def run(task: str, *changes: str):
        folder = tmp_path_factory.mktemp(task)
        train_dense(task, folder, *changes)
        return folder

    return run


@pytest.fixture
def fast_calls(monkeypatch):
    """List of the calls of the fast CPU layers, which small layers make, too."""
    calls = []

    def count(*args):
        calls.append(args)
        return multiply(*args)

    multiply = cpu._multiply
    monkeypatch.setattr(cpu, "LEAST_PRODUCTS", 1)
    monkeypatch.setattr(cpu, "_multiply", count)
    return calls


@pytest.mark.parametrize("task", ["classification", *TASKS])
def test_trainings_use_the_fast_layers(task, tmp_path, fast_calls):
    if task == "classification":
        main.main([*BASE, "--batch-size", "8", "--output_dir", str(tmp_path)])
    else:
        train_dense(task, tmp_path)
    assert fast_calls


@pytest.mark.parametrize("task", TASKS)
def test_tests_of_dense_tasks_use_the_fast_layers(task, run_dense, fast_calls):
    checkpoint = run_dense(task) / "checkpoint.pth"
    fast_calls.clear()
    run_test(task, checkpoint)
    assert fast_calls


def run_test(task: str, checkpoint: Path, *changes: str) -> None:
    """Test a checkpoint of `run_dense` with the config as it is, and some fields changed."""
    script = {"segmentation": segmentation_test, "detection": detection_test}[task]
    options = ["--device", "cpu", "--num_workers", "0", "--cfg-options", *changes]
    script.main([str(ROOT / TASKS[task][1]), str(checkpoint), *options[: None if changes else -1]])


@pytest.mark.parametrize("task", TASKS)
def test_a_test_remembers_the_training(task, run_dense, capsys):
    """The network and its input are those of the checkpoint; what the command line says wins and is named."""
    folder = run_dense(task)
    best = {"segmentation": "mIoU", "detection": "segm_AP"}[task]
    expected = f"{best} {100 * read_log(folder)[-1][f'test_{best}']:.2f}"
    description = torch.load(folder / "checkpoint.pth", weights_only=True)["description"]
    assert description["task"] == task
    background = ["background"] if task == "segmentation" else []
    assert description["classes"] == [*background, *shapes.CLASSES]
    assert len(description["colours"]) == (len(description["classes"]) if task == "segmentation" else 0)
    capsys.readouterr()
    run_test(task, folder / "checkpoint.pth")
    output = capsys.readouterr().out
    assert "note: channels 8 (config: " in output
    assert expected in output
    run_test(task, folder / "checkpoint.pth", "scale=(128,128)")
    output = capsys.readouterr().out
    assert "note: scale (128, 128) (checkpoint: (64, 64))" in output
    assert "(config: (" not in output


@pytest.mark.parametrize("task", TASKS)
def test_a_test_refuses_data_of_other_classes(task, run_dense, tmp_path, capsys):
    content = torch.load(run_dense(task) / "checkpoint.pth", weights_only=True)
    content["description"]["classes"].reverse()
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(SystemExit):
        run_test(task, tmp_path / "other.pth")
    assert "other.pth: its classes are not those of the data, but the same in another order" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_a_test_refuses_other_checkpoints(task, run_dense, tmp_path, capsys):
    path = run_dense(task) / "checkpoint.pth"
    other = {"segmentation": "detection", "detection": "segmentation"}[task]
    with pytest.raises(SystemExit):
        run_test(other, path)
    assert f"is a checkpoint of {task}, not of {other}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["--eval", "--resume", str(path), "--data-set", "SHAPES", "--device", "cpu"])
    assert f"is a checkpoint of {task}, not of classification" in capsys.readouterr().err
    torch.save({**torch.load(path, weights_only=True), "format": 99}, tmp_path / "newer.pth")
    with pytest.raises(SystemExit):
        run_test(task, tmp_path / "newer.pth")
    assert "newer.pth: has format 99, but this code reads formats up to" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_options_of_a_dense_training(task, run_dense, compiled, recomputed, tmp_path, capsys):
    script, config, setting = TASKS[task]
    options = ["--device", "cpu", "--num_workers", "0", "--work-dir", str(tmp_path), "--seed", "1", "--keep", "1"]
    options += ["--print-freq", "1", "--compile", "--grad-checkpointing", "--on-nonfinite", "skip"]
    script.main([str(ROOT / config), *options, "--cfg-options", *setting.split()])
    assert capsys.readouterr().out.count("epoch 0 [") == 2
    assert {file.name for file in tmp_path.glob("checkpoint.*")} == {"checkpoint.pth"}
    assert read_log(tmp_path)[0]["train_skipped"] == 0
    assert compiled
    assert len(recomputed) == 2 * 7  # steps x blocks
    assert differ(load_weights(tmp_path), load_weights(run_dense(task)))
    keys = []
    for seed in ("0", "1"):
        args = get_train_parser("").parse_args(["x", "--num_workers", "0", "--seed", seed])
        loader = script.build_train_loader(args, load_experiment(ROOT / config, setting.split()), Processes(CPU))
        sampler = loader.sampler if task == "segmentation" else loader.batch_sampler
        keys.append((list(sampler), loader.dataset.seed))
    assert keys[0][0] != keys[1][0]
    assert (keys[0][1], keys[1][1]) == (0, 1)


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_shares_are_exact(task, tmp_path):
    script, config, setting = TASKS[task]
    args = get_train_parser("").parse_args(["x", "--num_workers", "0"])
    experiment = load_experiment(ROOT / config, setting.split())
    loaders = [script.build_eval_loader(args, experiment, Processes(CPU, rank, 7)) for rank in range(7)]
    shares = [list(loader.sampler) for loader in loaders]
    assert sorted(index for share in shares for index in share) == list(range(len(loaders[0].dataset)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# Fields that a test does not take from the training: those that training alone reads, and the choices of a test.
# fmt: off
NOT_REMEMBERED = {
    "head", "detector", "head_std", "roi_samples", "drop_path", "pretrained", "data_root", "train_images",
    "train_labels", "train_split", "train_annotations", "test_images", "test_split", "test_annotations", "scale_range",
    "crop_size", "many_scales", "batch_size", "global_batch", "lr", "weight_decay", "not_decayed", "iterations",
    "epochs", "milestones", "schedule", "warmup_iterations", "warmup_ratio", "power", "min_lr", "precision",
    "loss_scale", "eval_interval", "evaluations", "test_ratios", "score_threshold", "nms_threshold", "detections",
    "test_scales",
}
# fmt: on


def test_every_field_is_remembered_or_a_choice():
    """What shapes the network, its input and the labels is remembered."""
    names = {field.name for experiment in EXPERIMENTS.values() for field in fields(experiment)}
    assert names == NOT_REMEMBERED ^ set(REMEMBERED_FIELDS)


def test_every_field_of_an_experiment_has_a_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for task, experiment in EXPERIMENTS.items():
        names = {field.name for field in fields(experiment)}
        tested = {*FIELDS[task], *FIELDS_BESIDE[task]}
        elsewhere = FIELDS_ELSEWHERE[task] | FIELDS_ELSEWHERE["both"]
        assert names == tested | set(elsewhere)
        assert not [name for name in elsewhere.values() if f"def {name}(" not in tests]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "field"), [(task, field) for task in FIELDS for field in FIELDS[task]])
def test_a_field_changes_the_weights(task, field, run_dense):
    before, after = load_weights(run_dense(task)), load_weights(run_dense(task, *FIELDS[task][field]))
    assert set(before) != set(after) or any(before[n].shape != after[n].shape for n in before) or differ(before, after)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "field"), [(task, field) for task in FIELDS_BESIDE for field in FIELDS_BESIDE[task]])
def test_a_field_beside_others_changes_the_weights(task, field, run_dense):
    others, change = FIELDS_BESIDE[task][field]
    before, after = load_weights(run_dense(task, *others)), load_weights(run_dense(task, *others, *change))
    assert any(before[n].shape != after[n].shape for n in before) or differ(before, after)


def test_an_experiment_chooses_its_scales():
    for change, sizes in (("many_scales=False", {96}), ("many_scales=True", set(range(480, 801, 32)))):
        config = ROOT / "detection/configs/mask_rcnn_alt_gvt_tiny_shapes.py"
        args = get_train_parser("").parse_args(["x", "--num_workers", "0"])
        loader = detection_train.build_train_loader(args, load_experiment(config, [change]), Processes(CPU))
        (images, _), *_ = loader
        found = {min(image.shape[1:]) for image in images}
        assert found <= sizes
        assert len(found) == 1 if len(sizes) == 1 else len(found) > 1
