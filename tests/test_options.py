"""Every option has an effect: with another value of it a run has other weights, metrics or files."""

import argparse
import copy
from functools import lru_cache

import pytest
import torch
from timm.scheduler import CosineLRScheduler, create_scheduler_v2
from torch import nn

import main
from core.distributed import Processes
from core.optimizer import note_schedule
from core.options import loader_options
from core.run_folder import RunFolder
from datasets import build_dataset, build_train_loader, build_val_loader
from main import build_optimizer, build_scheduler, build_trained_model, get_args_parser
from models import Twins
from tests.helpers import ROOT, TINY, assert_equal

pytestmark = pytest.mark.usefixtures("small_sets")
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
    "sched_on_updates": ["--sched-on-updates"],
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
    "tf32": "test_kernels_of_each_script",
    "recipe": "test_recipes_are_defaults_that_options_override",
    "model": "test_other_models_and_options_train",
    "pretrained": "test_bad_arguments_end_with_one_line",
    "model_ema": "test_training_writes_its_files",
    "finetune": "test_finetuning_loads_the_weights",
    "freeze": "test_frozen_stages_keep_their_weights",
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
    "tensorboard": "test_tensorboard_shows_the_lines_of_the_logs",
    "eval": "test_evaluation_of_a_checkpoint_repeats_the_metrics",
    "dist_eval": "test_a_distributed_evaluation_takes_a_part_of_the_images",
    "device": "test_unknown_device",
    "dist_url": "test_processes_use_the_given_rendezvous",
    "local_rank": "test_training_on_two_processes",
    "deterministic": "test_deterministic_algorithms",
    "traceback": "test_traceback_on_demand",
}


def parse(*argv) -> argparse.Namespace:
    return get_args_parser().parse_args([str(arg) for arg in argv])


@pytest.fixture(scope="module")
def run():
    """Return a function that trains with options of main.py and returns the weights, those of the EMA if there is one.

    They are those of the checkpoint, but without its file.
    """

    @lru_cache(maxsize=4)
    def run(*options) -> dict[str, torch.Tensor]:
        states, build_state = [], main.build_state
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(main, "build_state", lambda *args: states.append(build_state(*args)) or states[0])
            main.main([*BASE, *options])
        return (states[0].model_ema.module if states[0].model_ema else states[0].model).state_dict()

    return run


def load_weights(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pth", weights_only=True)["model"]


def differ(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


def options_of(parser) -> set[str]:
    return {action.dest for action in parser._actions} - {"help"}


def test_every_option_has_a_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert options_of(get_args_parser()) == {*CHANGES, *CHANGES_BESIDE, *ELSEWHERE}
    assert not [name for name in ELSEWHERE.values() if f"def {name}(" not in tests]


def test_the_same_options_give_the_same_weights(run, tmp_path):
    """Otherwise the tests below would pass for options without any effect."""
    main.main([*BASE, "--output_dir", str(tmp_path)])
    assert_equal(dict(run()), dict(load_weights(tmp_path)))


@pytest.mark.parametrize("option", CHANGES)
def test_an_option_changes_the_weights(option, run):
    assert differ(run(), run(*CHANGES[option]))


@pytest.mark.parametrize("option", CHANGES_BESIDE)
def test_an_option_beside_others_changes_the_weights(option, run):
    others, change = CHANGES_BESIDE[option]
    assert differ(run(*others), run(*others, *change))


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


@pytest.mark.slow
def test_decay_of_the_moving_average(run):
    averages = [run("--model-ema", "--model-ema-decay", decay) for decay in ("0", "0.5", "1")]
    assert not differ(averages[0], run())
    assert differ(averages[1], averages[0])
    assert differ(averages[2], averages[1])


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
    schedule = build_scheduler(args, optimizer, 1)
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


@pytest.mark.parametrize("name", ["cosine", "tanh", "step", "multistep", "poly"])
def test_a_schedule_by_updates_equals_that_of_timm(name):
    options = {"warmup_epochs": 2, "decay_epochs": 3, "decay_milestones": [4, 6], "decay_rate": 0.5, "warmup_lr": 1e-6}
    given = ["--warmup-epochs", 2, "--decay-epochs", 3, "--decay-milestones", 4, 6, "--decay-rate", 0.5]
    args = parse("--sched", name, "--epochs", 8, "--sched-on-updates", "--lr-noise", 0.5, "--seed", 3, *given)
    optimizers = [build_optimizer(args, nn.Linear(2, 2), 512) for _ in range(2)]
    expected, _ = create_scheduler_v2(
        optimizers[0],
        name,
        8,
        min_lr=1e-5,
        noise=[0.5],
        noise_seed=3,
        step_on_epochs=False,
        updates_per_epoch=5,
        **options,
    )
    schedule = build_scheduler(args, optimizers[1], 5)
    for step in range(40):
        expected.step_update(step)
        if step % 5 == 0:
            schedule.step(step // 5)  # the end of an epoch changes nothing
        schedule.step_update(step)
        assert optimizers[1].param_groups[0]["lr"] == optimizers[0].param_groups[0]["lr"]


def test_a_long_warm_up_is_noted():
    for options, noted in (((9, 3), True), ((9, 2), False), ((2, 1), True), ((5, 0), False), ((1, 5), True)):
        args = parse("--epochs", options[0], "--warmup-epochs", options[1])
        notes = [
            note for note in note_schedule(args, 512) if "--warmup-epochs" in note and "--sched-on-updates" in note
        ]
        assert len(notes) == noted


def test_stepped_schedules_decay_at_their_epochs():
    steps = rates("--sched", "step", "--decay-epochs", 7, "--decay-rate", 0.5)
    assert steps == pytest.approx([5e-4 * 0.5 ** (epoch // 7) for epoch in range(20)])
    milestones = rates("--sched", "multistep", "--decay-milestones", 3, 12)
    assert milestones == pytest.approx([5e-4 * 0.1 ** ((epoch + 1 >= 3) + (epoch + 1 >= 12)) for epoch in range(20)])


@pytest.mark.slow
def test_distillation_uses_its_options(run, tmp_path):
    main.main([*BASE, "--output_dir", str(tmp_path)])
    teacher = tmp_path / "checkpoint.pth"
    soft = ["--distillation-type", "soft", "--teacher-model", "alt_gvt_tiny", "--teacher-path", str(teacher)]
    plain = run(*soft)
    for change in (["--distillation-alpha", "0.9"], ["--distillation-tau", "3"], ["--distillation-type", "hard"]):
        assert differ(plain, run(*soft, *change))


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


def test_the_number_of_kept_checkpoints_follows_its_option(tmp_path):
    for keep, names in ((1, {"checkpoint.pth"}), (3, {"checkpoint.pth", "checkpoint.1.pth", "checkpoint.2.pth"})):
        folder = tmp_path / str(keep)
        main.main([*BASE, "--output_dir", str(folder), "--epochs", "2", "--keep", str(keep)])
        assert {file.name for file in folder.glob("checkpoint*.pth")} - {"checkpoint_best.pth"} == names


def test_log_lines_follow_their_option(tmp_path, capsys):
    for freq, lines in ((1, 4), (3, 2)):
        main.main([*BASE, "--batch-size", "2", "--print-freq", str(freq), "--output_dir", str(tmp_path / str(freq))])
        assert capsys.readouterr().out.count("epoch 0 [") == lines


def test_a_distributed_evaluation_takes_a_part_of_the_images():
    for flags, count in (([], 4), (["--dist-eval"], 2)):
        loader = build_val_loader(parse(*BASE, *flags), Processes(CPU, rank=1, world_size=2))
        assert len(loader.sampler) == count
