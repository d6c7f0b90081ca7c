"""Every option has an effect: with another value of it a run has other weights, metrics or files."""

import argparse
import copy
from dataclasses import fields
from functools import cache

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

import main
from core.distributed import Processes
from core.options import loader_options
from core.run_folder import RunFolder
from datasets import build_dataset, build_train_loader, build_val_loader
from dense.experiments import load_experiment
from dense.training import get_train_parser
from detection import data as detection_data
from detection import test as detection_test
from detection import train as detection_train
from detection.configs.recipes import Experiment as DetectionExperiment
from main import build_optimizer, build_scheduler, build_trained_model, get_args_parser
from models import Twins
from segmentation import data as segmentation_data
from segmentation import test as segmentation_test
from segmentation import train as segmentation_train
from segmentation.configs.recipes import Experiment as SegmentationExperiment
from tests.conftest import ROOT, TINY, assert_equal, read_log

CPU = torch.device("cpu")
BASE = [*TINY, "--data-set", "SHAPES", "--epochs", "1", "--warmup-epochs", "0", "--lr", "1e-2", "--unscale-lr"]

# Each option with a value other than its default, and options that it needs.
CHANGES = {
    "drop": ["--drop", "0.5"],
    "drop_path": ["--drop-path", "0.5"],
    "batch_size": ["--batch-size", "2"],
    "global_batch": ["--global-batch", "8"],
    "epochs": ["--epochs", "2"],
    "opt": ["--opt", "lion"],
    "opt_eps": ["--opt-eps", "1"],
    "opt_betas": ["--opt-betas", "0.5", "0.5"],
    "weight_decay": ["--weight-decay", "0.5"],
    "layer_decay": ["--layer-decay", "0.5"],
    "clip_grad": ["--clip-grad", "0.01"],
    "lr": ["--lr", "2e-2"],
    "sched": ["--sched", "tanh", "--epochs", "2"],
    "smoothing": ["--smoothing", "0.3"],
    "amp": ["--amp", "bf16"],
    "input_size": ["--input-size", "64"],
    "seed": ["--seed", "1"],
    "scale": ["--scale", "0.9", "1"],
    "aa": ["--aa", "none"],
    "repeated_aug": ["--repeated-aug"],
    "reprob": ["--reprob", "1"],
    "mixup": ["--mixup", "0"],
    "cutmix": ["--cutmix", "0"],
    "mixup_prob": ["--mixup-prob", "0"],
    "mixup_switch_prob": ["--mixup-switch-prob", "1"],
    "mixup_mode": ["--mixup-mode", "elem"],
}
# Options that only have an effect together with others: the others, then the option.
CHANGES_BESIDE = {
    "momentum": (["--opt", "sgd"], ["--momentum", "0.5"]),
    "train_interpolation": (["--aa", "none"], ["--train-interpolation", "bilinear"]),
    "color_jitter": (["--aa", "none"], ["--color-jitter", "0"]),
    "remode": (["--reprob", "1"], ["--remode", "const"]),
    "recount": (["--reprob", "1"], ["--recount", "3"]),
    "cutmix_minmax": (["--mixup-switch-prob", "1"], ["--cutmix-minmax", "0.2", "0.3"]),
    "warmup_epochs": (["--epochs", "2"], ["--warmup-epochs", "1"]),
}
# Options that another test covers, by the name of that test.
ELSEWHERE = {
    "recipe": "test_recipes_are_defaults_that_options_override",
    "model": "test_other_models_and_options_train",
    "pretrained": "test_bad_arguments_end_with_one_line",
    "model_ema": "test_training_writes_its_files",
    "finetune": "test_finetuning_loads_the_weights",
    "distillation_type": "test_distillation_and_cutmix_alone",
    "teacher_model": "test_distillation_and_cutmix_alone",
    "teacher_path": "test_distillation_and_cutmix_alone",
    "distillation_alpha": "test_distillation_uses_its_options",
    "distillation_tau": "test_distillation_uses_its_options",
    "model_ema_decay": "test_decay_of_the_moving_average",
    "grad_checkpointing": "test_checkpointing_and_compiling_are_enabled",
    "compile": "test_checkpointing_and_compiling_are_enabled",
    "warmup_lr": "test_learning_rates_follow_their_options",
    "min_lr": "test_learning_rates_follow_their_options",
    "decay_epochs": "test_learning_rates_follow_their_options",
    "decay_milestones": "test_learning_rates_follow_their_options",
    "unscale_lr": "test_the_learning_rate_follows_the_batch",
    "decay_rate": "test_learning_rates_follow_their_options",
    "lr_noise": "test_learning_rates_follow_their_options",
    "lr_noise_pct": "test_learning_rates_follow_their_options",
    "lr_noise_std": "test_learning_rates_follow_their_options",
    "data_path": "test_image_folder",
    "data_set": "test_embedded_shapes",
    "inat_category": "test_inaturalist",
    "nb_classes": "test_bad_arguments_end_with_one_line",
    "bad_image": "test_a_truncated_image_ends_the_run_or_is_skipped",
    "eval_crop_ratio": "test_the_evaluated_crop_follows_its_option",
    "num_workers": "test_loaders_follow_their_options",
    "loader_timeout": "test_loaders_follow_their_options",
    "pin_mem": "test_loaders_follow_their_options",
    "output_dir": "test_training_writes_its_files",
    "resume": "test_resuming_equals_an_uninterrupted_run",
    "auto_resume": "test_a_killed_run_ends_as_an_uninterrupted_one",
    "save_every": "test_checkpoints_are_written_within_an_epoch",
    "keep": "test_the_number_of_kept_checkpoints_follows_its_option",
    "on_nonfinite": "test_non_finite_steps_are_skipped_and_counted",
    "max_skipped": "test_non_finite_steps_are_skipped_and_counted",
    "print_freq": "test_log_lines_follow_their_option",
    "eval": "test_evaluation_of_a_checkpoint_repeats_the_metrics",
    "dist_eval": "test_a_distributed_evaluation_takes_a_part_of_the_images",
    "device": "test_unknown_device",
    "dist_url": "test_processes_use_the_given_rendezvous",
    "local_rank": "test_training_on_two_processes",
    "deterministic": "test_deterministic_algorithms",
    "traceback": "test_traceback_on_demand",
}
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
    "pretrained": "test_a_tiny_network_learns_from_a_classifiers_weights",
    "finetune": "test_fine_tuning_makes_new_heads_for_other_classes",
    "grad_checkpointing": "test_options_of_a_dense_training",
    "compile": "test_options_of_a_dense_training",
    "amp": "test_mixed_precision_reaches_the_evaluation",
    "device": "test_unknown_device",
    "dist_url": "test_processes_use_the_given_rendezvous",
    "local_rank": "test_training_on_two_processes",
    "deterministic": "test_deterministic_algorithms",
    "traceback": "test_traceback_on_demand",
}
# Tests of the options of test.py in the dense tasks.
DENSE_TEST = DENSE_TRAIN | {
    "checkpoint": "test_figures_equal_those_of_the_written_predictions",
    "eval": "test_weights_that_do_not_fit_are_refused",
    "aug_test": "test_figures_equal_those_of_the_written_predictions",
    "out": "test_figures_equal_pycocotools_on_the_written_results",
    "format_only": "test_a_set_without_annotations_has_results_but_no_figures",
    "show_dir": "test_the_figures_are_the_same_for_any_number_of_processes",
    "show_score_thr": "test_only_objects_above_the_threshold_are_shown",
}


@pytest.fixture(scope="module", autouse=True)
def small_sets():
    """Use few shapes, and one thread, so that equal runs are equal bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.SHAPES_TRAIN", 8)
        patch.setattr("datasets.SHAPES_VAL", 4)
        for module in (segmentation_data, detection_data):
            patch.setattr(module, "SHAPES_TRAIN", 8)
            patch.setattr(module, "SHAPES_VAL", 2)
        yield
    torch.set_num_threads(threads)


def parse(*argv) -> argparse.Namespace:
    return get_args_parser().parse_args([str(arg) for arg in argv])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a function that trains with options of main.py and returns the folder of the run."""

    @cache
    def run(*options):
        folder = tmp_path_factory.mktemp("run")
        main.main([*BASE, "--output_dir", str(folder), *options])
        return folder

    return run


def load_weights(folder, key: str = "model") -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pth", weights_only=True)[key]


def differ(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


def options_of(parser) -> set[str]:
    return {action.dest for action in parser._actions} - {"help"}


def test_every_option_has_a_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert options_of(get_args_parser()) == {*CHANGES, *CHANGES_BESIDE, *ELSEWHERE}
    assert options_of(get_train_parser("")) == set(DENSE_TRAIN)
    for script in (segmentation_test, detection_test):
        assert options_of(script.get_parser()) <= set(DENSE_TEST)
    for table in (ELSEWHERE, DENSE_TRAIN, DENSE_TEST):
        assert not [name for name in table.values() if f"def {name}(" not in tests]


def test_the_same_options_give_the_same_weights(run, tmp_path):
    """Otherwise the tests below would pass for options without any effect."""
    main.main([*BASE, "--output_dir", str(tmp_path)])
    assert_equal(load_weights(run()), load_weights(tmp_path))


@pytest.mark.parametrize("option", CHANGES)
def test_an_option_changes_the_weights(option, run):
    assert differ(load_weights(run()), load_weights(run(*CHANGES[option])))


@pytest.mark.parametrize("option", CHANGES_BESIDE)
def test_an_option_beside_others_changes_the_weights(option, run):
    others, change = CHANGES_BESIDE[option]
    assert differ(load_weights(run(*others)), load_weights(run(*others, *change)))


def test_the_learning_rate_follows_the_batch():
    for flags, expected in (([], 1e-3 * 256 / 512), (["--unscale-lr"], 1e-3)):
        optimizer = build_optimizer(parse("--lr", 1e-3, *flags), nn.Linear(2, 2), 256)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected] * 2)


def test_gradients_are_clipped_to_the_given_norm(run, monkeypatch):
    """A step of SGD without momentum changes the weights by the gradient norm times the learning rate."""
    models, initial_models = [], []
    build_state = main.build_state

    def build_and_record(*args):
        state = build_state(*args)
        models.append(state.model)
        initial_models.append(copy.deepcopy(state.model))
        return state

    monkeypatch.setattr(main, "build_state", build_and_record)
    plain = ["--opt", "momentum", "--momentum", "0", "--weight-decay", "0", "--lr", "1", "--global-batch", "8"]
    for norm in ("0.01", "0"):
        run(
            *plain, "--drop-path", "0.11", "--clip-grad", norm
        )  # options that no other test uses, so that the run is not cached
        pairs = zip(models[-1].parameters(), initial_models[-1].parameters(), strict=True)
        change = torch.stack([(after - before).norm() for after, before in pairs]).norm().item()
        if norm == "0":
            assert change > 0.1
        else:
            assert change == pytest.approx(0.01, rel=1e-3)


def test_rates_of_drop_path_and_dropout_follow_their_options():
    model = build_trained_model(parse("--model", "alt_gvt_tiny", "--drop-path", 0.3, "--drop", 0.2), 10, new=True)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.blocks for block in stage]
    assert rates == pytest.approx([0.3 * i / 6 for i in range(7)])
    assert model.head_drop.p == 0.2


def test_repeated_augmentation_uses_each_image_three_times():
    for flags, images in (([], 6), (["--repeated-aug"], 2)):
        loader = build_train_loader(parse(*BASE, *flags), Processes(CPU), 6)
        keys = list(loader.sampler)
        assert len(keys) == 6
        assert len({key.index for key in keys}) == images


def test_seeds_reach_the_order_and_the_augmentation():
    loaders = [build_train_loader(parse(*BASE, "--seed", seed), Processes(CPU), 4) for seed in (0, 1)]
    assert list(loaders[0].sampler) != list(loaders[1].sampler)
    key = next(iter(loaders[0].sampler))
    assert not torch.equal(*(loader.dataset[key][0].pixels for loader in loaders))


def test_mixed_precision_reaches_the_evaluation(tmp_path, monkeypatch):
    seen = set()
    forward = Twins.forward

    def forward_and_record(self, x):
        seen.add((self.training, torch.is_autocast_enabled("cpu")))
        return forward(self, x)

    monkeypatch.setattr(Twins, "forward", forward_and_record)
    for amp in ("off", "bf16"):
        seen.clear()
        main.main([*BASE, "--output_dir", str(tmp_path / amp), "--amp", amp])
        assert seen == {(True, amp == "bf16"), (False, amp == "bf16")}


def test_decay_of_the_moving_average(run):
    plain, averages = load_weights(run("--model-ema")), []
    for decay in ("0", "0.5", "1"):
        averages.append(load_weights(run("--model-ema", "--model-ema-decay", decay), "model_ema"))
    assert not differ(averages[0], plain)
    assert differ(averages[1], averages[0])
    assert differ(averages[2], averages[1])


@pytest.fixture
def compiled(monkeypatch) -> list[nn.Module]:
    """List of the modules that are compiled."""
    modules = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *_, **__: modules.append(self))
    return modules


@pytest.fixture
def recomputed(monkeypatch) -> list[nn.Module]:
    """List of the blocks that use gradient checkpointing, in each step."""
    blocks = []

    def checkpoint(block, x, **_):
        blocks.append(block)
        return block(x)

    monkeypatch.setattr("models.layers.checkpoint", checkpoint)
    return blocks


def test_checkpointing_and_compiling_are_enabled(compiled, recomputed, tmp_path):
    main.main([*BASE, "--output_dir", str(tmp_path / "plain")])
    assert not compiled
    assert not recomputed
    main.main([*BASE, "--output_dir", str(tmp_path / "other"), "--compile", "--grad-checkpointing"])
    assert len(compiled) == 1
    assert len(recomputed) == 2 * 7  # steps x blocks


RATES = {
    "warmup_lr": (["--warmup-epochs", 5], ["--warmup-lr", 1e-4]),
    "min_lr": ([], ["--min-lr", 1e-4]),
    "decay_epochs": (["--sched", "step"], ["--decay-epochs", 7]),
    "decay_milestones": (["--sched", "multistep"], ["--decay-milestones", 3, 12]),
    "decay_rate": (["--sched", "step", "--decay-epochs", 5], ["--decay-rate", 0.5]),
    "lr_noise": ([], ["--lr-noise", 0.2, 0.8]),
    "lr_noise_pct": (["--lr-noise", 0.2, 0.8], ["--lr-noise-pct", 0.01]),
    "lr_noise_std": (["--lr-noise", 0.2, 0.8], ["--lr-noise-std", 0.1]),
}


def rates(*options) -> list[float]:
    args = parse("--epochs", 20, "--warmup-epochs", 0, *options)
    optimizer = build_optimizer(args, nn.Linear(2, 2), 512)
    schedule = build_scheduler(args, optimizer)
    found = []
    for epoch in range(20):
        schedule.step(epoch)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def timm_uses_the_deviation() -> bool:
    found = []
    for std in (1.0, 0.1):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = CosineLRScheduler(optimizer, 10, noise_range_t=(0, 10), noise_std=std)
        schedule.step(3)
        found.append(optimizer.param_groups[0]["lr"])
    return found[0] != found[1]


@pytest.mark.parametrize("option", RATES)
def test_learning_rates_follow_their_options(option):
    others, change = RATES[option]
    if option == "lr_noise_std" and not timm_uses_the_deviation():
        pytest.skip("this timm ignores the deviation")
    assert rates(*others) == rates(*others)
    assert rates(*others) != rates(*others, *change)


def test_stepped_schedules_decay_at_their_epochs():
    steps = rates("--sched", "step", "--decay-epochs", 7, "--decay-rate", 0.5)
    assert steps == pytest.approx([5e-4 * 0.5 ** (epoch // 7) for epoch in range(20)])
    milestones = rates("--sched", "multistep", "--decay-milestones", 3, 12)
    assert milestones == pytest.approx([5e-4 * 0.1 ** ((epoch + 1 >= 3) + (epoch + 1 >= 12)) for epoch in range(20)])


def test_distillation_uses_its_options(run, tmp_path):
    teacher = run() / "checkpoint.pth"
    soft = ["--distillation-type", "soft", "--teacher-model", "alt_gvt_tiny", "--teacher-path", str(teacher)]
    plain = load_weights(run(*soft))
    for change in (["--distillation-alpha", "0.9"], ["--distillation-tau", "3"], ["--distillation-type", "hard"]):
        assert differ(plain, load_weights(run(*soft, *change)))


def test_the_evaluated_crop_follows_its_option(image_folder):
    images = []
    for ratio in (0.875, 0.5):
        args = parse("--data-path", image_folder, "--input-size", 32, "--eval-crop-ratio", ratio)
        images.append(build_dataset(False, args)[0][0])
    assert images[0].shape == images[1].shape == (3, 32, 32)
    assert not torch.equal(*images)


def test_loaders_follow_their_options(monkeypatch):
    monkeypatch.setattr("core.options.cores_per_process", lambda: 4)
    gpu = torch.device("cuda", 0)
    options = loader_options(parse("--num_workers", 3, "--loader-timeout", 50), gpu)
    assert (options["num_workers"], options["timeout"], options["pin_memory"]) == (3, 50, True)
    options = loader_options(parse("--num_workers", 8, "--no-pin-mem"), gpu)
    assert (options["num_workers"], options["timeout"], options["pin_memory"]) == (4, 600, False)
    options = loader_options(parse("--num_workers", 0), CPU)
    assert (options["num_workers"], options["timeout"], options["pin_memory"]) == (0, 0, False)


def test_checkpoints_are_written_within_an_epoch(monkeypatch, tmp_path):
    steps = []
    monkeypatch.setattr(RunFolder, "save", lambda self, content: steps.append(content["meters"][0]["step"]))
    main.main([*BASE, "--batch-size", "2", "--output_dir", str(tmp_path), "--save-every", "1"])
    assert steps == [1, 2, 3, 4, 0]  # within the epoch, and after the evaluation


def test_the_number_of_kept_checkpoints_follows_its_option(run):
    for keep, names in ((1, {"checkpoint.pth"}), (3, {"checkpoint.pth", "checkpoint.1.pth", "checkpoint.2.pth"})):
        folder = run("--epochs", "2", "--keep", str(keep))
        assert {file.name for file in folder.glob("checkpoint*.pth")} - {"checkpoint_best.pth"} == names


def test_log_lines_follow_their_option(tmp_path, capsys):
    for freq, lines in ((1, 4), (3, 2)):
        main.main([*BASE, "--batch-size", "2", "--print-freq", str(freq), "--output_dir", str(tmp_path / str(freq))])
        assert capsys.readouterr().out.count("epoch 0 [") == lines


def test_a_distributed_evaluation_takes_a_part_of_the_images():
    for flags, count in (([], 4), (["--dist-eval"], 2)):
        loader = build_val_loader(parse(*BASE, *flags), Processes(CPU, rank=1, world_size=2))
        assert len(loader.sampler) == count


# -------------------------------------------------------------------------------------- experiments of the dense tasks

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
    "precision": "test_experiments_are_run_in_their_precision_on_a_gpu",
    "loss_scale": "test_a_published_loss_scale_reaches_the_training",
    "pretrained": "test_a_tiny_network_learns_from_a_classifiers_weights",
    "dataset": "test_fine_tuning_makes_new_heads_for_other_classes",
    "data_root": "test_a_training_leaves_what_is_promised",
    "many_scales": "test_an_experiment_chooses_its_scales",
    "eval_interval": "test_a_training_leaves_what_is_promised",
    "test_ratios": "test_figures_equal_those_of_the_written_predictions",
    "window": "test_figures_equal_those_of_the_written_predictions",
    "stride": "test_figures_equal_those_of_the_written_predictions",
}


@pytest.fixture(scope="module")
def run_dense(tmp_path_factory):
    """Return a function that trains an experiment of a task and returns the folder of the run."""

    @cache
    def run(task: str, *changes: str):
        script, config, setting = TASKS[task]
        folder = tmp_path_factory.mktemp(task)
        options = ["--device", "cpu", "--num_workers", "0", "--work-dir", str(folder)]
        script.main([str(ROOT / config), *options, "--cfg-options", *setting.split(), *changes])
        return folder

    return run


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


def test_every_field_of_an_experiment_has_a_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for task, experiment in EXPERIMENTS.items():
        names = {field.name for field in fields(experiment)}
        tested = {*FIELDS[task], *FIELDS_BESIDE[task]}
        assert names - tested <= set(FIELDS_ELSEWHERE)
        assert tested <= names
    assert not [name for name in FIELDS_ELSEWHERE.values() if f"def {name}(" not in tests]


@pytest.mark.parametrize(("task", "field"), [(task, field) for task in FIELDS for field in FIELDS[task]])
def test_a_field_changes_the_weights(task, field, run_dense):
    before, after = load_weights(run_dense(task)), load_weights(run_dense(task, *FIELDS[task][field]))
    assert set(before) != set(after) or any(before[n].shape != after[n].shape for n in before) or differ(before, after)


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
