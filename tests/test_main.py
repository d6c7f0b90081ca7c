"""Tests of main.py: launchers, training, resuming, evaluation, schedules, recipes and bad input."""

import io
import json
import re
import shutil
from contextlib import redirect_stdout

import numpy as np
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import main
from core.optimizer import check_optimizer
from core.options import choose_amp
from core.recipes import PUBLISHED
from core.run import choose_accumulation
from main import (
    build_optimizer,
    build_scheduler,
    build_state,
    check_args,
    get_args_parser,
)
from samplers import TrainSampler
from tests import forks
from tests.helpers import (
    LAUNCHERS,
    ROOT,
    TINY,
    assert_same_run,
    damage_jpeg,
    free_port,
    launch,
    on_meta,
    one_thread,
    read_log,
    read_size,
    run_processes,
)
from tests.test_models import DATA

CPU = torch.device("cpu")


def parse(*argv):
    return get_args_parser().parse_args([str(arg) for arg in argv])


def final_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(("* Acc@1", "Accuracy of the"))][-2:]


# ----------------------------------------------------------------------------------------- training and evaluation


@pytest.fixture(scope="session")
def trained(image_folder, tmp_path_factory):
    """Run of two epochs on JPEG files with most options on; its folder, output and options."""
    folder = tmp_path_factory.mktemp("trained")
    options = ["--data-path", image_folder, "--epochs", 2, "--output_dir", folder, "--model-ema", "--repeated-aug"]
    options += ["--num_workers", "2", "--global-batch", "8", "--layer-decay", "0.8"]
    with one_thread(), redirect_stdout(io.StringIO()) as output:
        main.main([*TINY, *map(str, options)])
    return folder, output.getvalue(), options


def test_training_writes_its_files(trained):
    folder, output, _ = trained
    assert "batch: 4 images x 1 processes x 2 accumulated = global batch 8; lr 7.8125e-06" in output
    assert "(0.0005 x 8 / 512); 3 steps per epoch" in output
    assert final_lines(output)[1].startswith("Accuracy of the moving average on the 21 test images: ")
    files = {
        ".lock",
        "args.json",
        "checkpoint.1.pth",
        "checkpoint.pth",
        "checkpoint_best.pth",
        "checkpoint_best_ema.pth",
        "log.txt",
        "metrics.jsonl",
    }
    assert {file.name for file in folder.iterdir()} == files
    keys = {"train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"}
    keys |= {"test_ema_loss", "test_ema_acc1", "test_ema_acc5"}
    lines = read_log(folder)
    assert [set(line) for line in lines] == [keys, keys]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert [line["train_lr"] for line in lines] == pytest.approx([1e-6, 1e-6])
    saved = json.loads((folder / "args.json").read_text())
    assert saved["args"]["model"] == "alt_gvt_tiny"
    assert saved["versions"]["torch"] == torch.__version__
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] == 2
    assert checkpoint["best"]["test_acc1"] == max(line["test_acc1"] for line in lines)


def test_evaluation_of_a_checkpoint_repeats_the_metrics(trained, image_folder, run_in_process):
    folder, _, _ = trained
    command = ["--eval", "--resume", folder / "checkpoint.pth", *TINY, "--data-path", image_folder]
    for flags, prefix in (([], "test"), (["--model-ema"], "test_ema")):
        output, message = run_in_process(*command, *flags)
        assert message is None
        line = read_log(folder)[-1]
        acc1, acc5, loss = (line[f"{prefix}_{name}"] for name in ("acc1", "acc5", "loss"))
        expected = [f"* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}"]
        expected += [f"Accuracy of the network on the 21 test images: {acc1:.1f}%"]
        assert final_lines(output) == output.splitlines()[-2:] == expected


def test_evaluation_remembers_the_training(trained, image_folder, tmp_path, run_in_process):
    """Model and input come from the checkpoint; what the command line says wins and is named."""
    folder, _, _ = trained
    assert torch.load(folder / "checkpoint.pth", weights_only=True)["description"] == {
        "task": "classification",
        "classes": ["n01440764", "n01443537", "n01484850"],
        "colours": (),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    weights = ["--eval", "--resume", folder / "checkpoint.pth", "--device", "cpu", "--num_workers", "0"]
    expected, _ = run_in_process(*weights, *TINY, "--data-path", image_folder)
    output, _ = run_in_process(*weights, "--data-path", image_folder)
    assert final_lines(output) == final_lines(expected)
    assert "note:" not in output
    output, _ = run_in_process(*weights, "--data-path", image_folder, "--input-size", "64")
    assert "note: input-size 64 (checkpoint: 32)" in output
    assert "evaluating alt_gvt_tiny at 64 pixels" in output


def test_data_of_other_classes_are_refused(trained, image_folder, tmp_path, run_in_process):
    folder, _, _ = trained
    for names, message in (
        (("n01440764", "n01443537", "ray"), "class 2 is 'n01484850', and 'ray' in the data"),
        (("n01440764", "n01443537"), "checkpoint.pth: has 3 classes, but the data have 2"),
    ):
        for split in ("train", "val"):
            shutil.rmtree(tmp_path / split, ignore_errors=True)
            for name in names:
                shutil.copytree(image_folder / split / "n01440764", tmp_path / split / name)
        for options in (["--eval"], ["--output_dir", tmp_path / "run", "--model-ema"]):
            _, error = run_in_process(*TINY, *options, "--resume", folder / "checkpoint.pth", "--data-path", tmp_path)
            assert message in error
            assert len(error.splitlines()) == 1


def test_resuming_equals_an_uninterrupted_run(trained, image_folder, tmp_path, run_in_process):
    """Resume the finished run for a third epoch and compare it with an uninterrupted run of three epochs."""
    folder, _, options = trained
    shutil.copytree(folder, tmp_path / "resumed")
    straight = [str(tmp_path / "straight") if option == folder else option for option in options]
    straight = ["3" if option == 2 else option for option in straight]
    resumed = [str(tmp_path / "resumed") if option == str(tmp_path / "straight") else option for option in straight]
    output, message = run_in_process(*TINY, *straight)
    assert message is None, output
    output, message = run_in_process(*TINY, *resumed, "--resume", tmp_path / "resumed/checkpoint.pth")
    assert message is None, output
    assert "2 epochs are done" in output
    assert_same_run(tmp_path / "straight", tmp_path / "resumed", ["checkpoint.pth"])


def test_a_longer_resumed_run_follows_its_new_options(image_folder, tmp_path, run_in_process):
    command = [*TINY, "--data-path", image_folder, "--warmup-epochs", "0", "--unscale-lr", "--output_dir", tmp_path]
    run_in_process(*command, "--epochs", "2", "--lr", "1e-3")
    resumed = ["--resume", tmp_path / "checkpoint.pth", "--epochs", "5", "--lr", "2e-3", "--weight-decay", "0.2"]
    output, message = run_in_process(*command, *resumed)
    assert message is None, output
    assert "option changed: epochs from 2 to 5" in output
    rates = [line["train_lr"] for line in read_log(tmp_path)]
    cosine = [1e-5 + (2e-3 - 1e-5) * (1 + np.cos(np.pi * t / 5)) / 2 for t in range(5)]
    assert rates[2:] == pytest.approx([cosine[1], cosine[2], cosine[3]])
    groups = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}


def test_a_schedule_by_updates_counts_accumulated_steps(image_folder, tmp_path, run_in_process):
    """24 images in global batches of 8: three steps per epoch, of which the first has the warm-up."""
    command = [*TINY, "--data-path", image_folder, "--epochs", "3", "--warmup-epochs", "1", "--global-batch", "8"]
    rates = {}
    for flag in ("--sched-on-updates", "--no-sched-on-updates"):
        folder = tmp_path / flag
        output, message = run_in_process(*command, "--lr", "3e-3", "--unscale-lr", flag, "--output_dir", folder)
        assert message is None, output
        rates[flag] = [line["train_lr"] for line in read_log(folder)]
    steps = [1e-6 + (3e-3 - 1e-6) * t / 3 for t in range(3)]
    steps += [1e-5 + (3e-3 - 1e-5) * (1 + np.cos(np.pi * t / 9)) / 2 for t in range(3, 9)]
    assert rates["--sched-on-updates"] == pytest.approx(np.reshape(steps, (3, 3)).mean(axis=1), rel=1e-6)
    assert rates["--no-sched-on-updates"][:2] == pytest.approx([1e-6, 1e-6])  # as in the original


def test_the_state_in_parameter_groups_is_resumed(image_folder, tmp_path, run_in_process):
    command = [*TINY, "--data-path", image_folder, "--opt", "lookahead_adamw", "--output_dir", tmp_path, "--epochs"]
    run_in_process(*command, "1")
    steps = [torch.load(tmp_path / "checkpoint.pth", weights_only=True)["optimizer"]["param_groups"][0]]
    output, message = run_in_process(*command, "2", "--auto-resume")
    assert message is None, output
    steps += [torch.load(tmp_path / "checkpoint.pth", weights_only=True)["optimizer"]["param_groups"][0]]
    assert [group["lookahead_step"] for group in steps] == [6, 12]


@pytest.mark.parametrize("name", ["cosine", "tanh", "step", "multistep", "poly"])
def test_every_schedule_can_be_built(name):
    args = parse("--sched", name)
    schedule = build_scheduler(args, build_optimizer(args, torch.nn.Linear(2, 2), 512), 1)
    schedule.step(0)


def test_a_worse_epoch_does_not_replace_the_best_checkpoint(trained, image_folder, tmp_path, run_in_process):
    folder, _, options = trained
    shutil.copytree(folder, tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    checkpoint["best"] = {"test_acc1": 101.0, "test_ema_acc1": 101.0}
    torch.save(checkpoint, tmp_path / "run/checkpoint.pth")
    best = (tmp_path / "run/checkpoint_best.pth").read_bytes()
    options = [tmp_path / "run" if option == folder else option for option in options]
    options[options.index("--epochs") + 1] = 3
    output, message = run_in_process(*TINY, *options, "--resume", tmp_path / "run/checkpoint.pth")
    assert message is None, output
    assert (tmp_path / "run/checkpoint_best.pth").read_bytes() == best
    assert torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["best"]["test_acc1"] == 101.0


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_training_on_two_processes(launcher, image_folder, tmp_path):
    options = ["--data-path", image_folder, "--epochs", 1, "--output_dir", tmp_path, "--dist-eval"]
    result = launch(launcher, 2, *TINY, *options)
    assert result.returncode == 0, result.stderr
    assert "4 images x 2 processes x 1 accumulated = global batch 8" in result.stdout
    assert result.stdout.count("Accuracy of the network on the 21 test images") == 1
    assert len(read_log(tmp_path)) == 1
    assert len(torch.load(tmp_path / "checkpoint.pth", weights_only=True)["random_states"]) == 2


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(image_folder, tmp_path):
    """Without randomness that depends on the process, a run equals one of a single process with twice the batch."""
    plain = ["--data-path", image_folder, "--epochs", "1", "--warmup-epochs", "0", "--drop-path", "0", "--mixup", "0"]
    plain += ["--cutmix", "0", "--opt", "sgd", "--lr", "0.1", "--unscale-lr", "--model-ema", "--model-ema-decay", "0.5"]
    two = run_processes(2, ["main.py", *TINY, *plain, "--dist-eval", "--output_dir", tmp_path / "two"])
    one = forks.run(["main.py", *TINY, *plain, "--batch-size", 8, "--output_dir", tmp_path / "one"])
    assert two.returncode == one.returncode == 0, two.stderr + one.stderr
    states = [torch.load(tmp_path / run / "checkpoint.pth", weights_only=True) for run in ("two", "one")]
    for key in ("model", "model_ema"):
        for name, tensor in states[0][key].items():
            torch.testing.assert_close(tensor, states[1][key][name], atol=1e-6, rtol=1e-5, msg=f"{key} {name}")
    two_line, one_line = (read_log(tmp_path / run)[0] for run in ("two", "one"))
    assert two_line == pytest.approx(one_line, rel=1e-5)


@pytest.mark.slow
def test_evaluation_is_exact_for_any_number_of_processes(trained, image_folder):
    folder, _, _ = trained
    command = ["--eval", "--resume", folder / "checkpoint.pth", *TINY, "--data-path", image_folder]
    outputs = [forks.run(["main.py", *command]).stdout]
    for processes in (2, 3):
        outputs.append(run_processes(processes, ["main.py", *command, "--dist-eval"]).stdout)
    outputs.append(run_processes(2, ["main.py", *command]).stdout)  # each process evaluates all images
    lines = [final_lines(output) for output in outputs]
    assert lines[0][1].startswith("Accuracy of the network on the 21 test images: ")
    assert lines == [lines[0]] * 4


def test_finetuning_loads_the_weights(trained, tmp_path, monkeypatch, run_in_process):
    folder, _, _ = trained
    frozen = ["--lr", "1e-30", "--warmup-lr", "1e-30", "--weight-decay", "0", "--epochs", "1"]
    command = [*TINY, "--data-set", "SHAPES", *frozen, "--finetune", folder / "checkpoint.pth"]
    monkeypatch.setattr("datasets.SHAPES_TRAIN", 8)
    monkeypatch.setattr("datasets.SHAPES_VAL", 10)
    output, message = run_in_process(*command, "--output_dir", tmp_path)
    assert message is None, output
    assert "skipped head.weight, head.bias" in output
    source, tuned = (torch.load(run / "checkpoint.pth", weights_only=True)["model"] for run in (folder, tmp_path))
    assert tuned["head.weight"].shape == (10, 128)
    for name in set(source) - {"head.weight", "head.bias"}:
        torch.testing.assert_close(tuned[name], source[name], atol=1e-6, rtol=1e-6)


def test_distillation_and_cutmix_alone(trained, image_folder, tmp_path, run_in_process):
    folder, _, _ = trained
    teacher = ["--teacher-model", "alt_gvt_tiny", "--teacher-path", folder / "checkpoint.pth"]
    command = [*TINY, "--data-path", image_folder, "--epochs", "1", "--mixup", "0"]
    for kind in ("soft", "hard"):
        run = tmp_path / kind
        output, message = run_in_process(*command, *teacher, "--distillation-type", kind, "--output_dir", run)
        assert message is None, output
        assert "teacher" in output
        line = read_log(run)[0]
        assert line["train_loss"] == pytest.approx(line["train_base"] + line["train_distillation"])


@pytest.mark.slow
def test_other_models_and_options_train(image_folder, run_in_process):
    """Train a timm model, and use options of the loop that the other tests do not cover."""
    command = ["--data-path", image_folder, "--epochs", "1", "--device", "cpu", "--num_workers", "0"]
    command += ["--batch-size", "4", "--input-size", "64"]
    resnet = ["--model", "resnet18", "--opt", "sgd", "--mixup", "0", "--cutmix", "0"]
    output, message = run_in_process(*command, *resnet)
    assert message is None, output
    loop = ["--grad-checkpointing", "--amp", "bf16", "--sched", "step", "--clip-grad", "0", "--aa", "none"]
    output, message = run_in_process(*command, "--model", "pcpvt_tiny", *loop)
    assert message is None, output
    assert "torch.bfloat16 on cpu" in output


# --------------------------------------------------------------------------------------- schedule and recipes


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedule_equals_the_published_logs(name):
    published = json.loads((DATA / "published_lr.json").read_text())[name]
    recipe = PUBLISHED[name]
    args = parse("--model", name, "--warmup-epochs", recipe.get("warmup_epochs", 5))
    with on_meta():
        model = timm.create_model(name)
    optimizer = build_optimizer(args, model, recipe["global_batch"])
    schedule = build_scheduler(args, optimizer, 625)
    rates = []
    for epoch in range(args.epochs):
        rates.append(max(group["lr"] for group in optimizer.param_groups))
        schedule.step(epoch)
    np.testing.assert_allclose(np.array(rates)[published["epoch"]], published["train_lr"], rtol=1e-12, atol=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == published["n_parameters"]


def test_biases_norms_and_positional_encodings_are_not_decayed():
    model = timm.create_model("alt_gvt_tiny")
    optimizer = build_optimizer(parse(), model, 512)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decay) == set(names.values())
    for name, parameter in model.named_parameters():
        assert decay[name] == (0.0 if parameter.ndim == 1 or name.startswith("pos_block") else 0.05), name


def test_layer_decay():
    model = timm.create_model("alt_gvt_tiny")
    optimizer = build_optimizer(parse("--layer-decay", 0.5), model, 512)
    names = {parameter: name for name, parameter in model.named_parameters()}
    scale = {names[p]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale["head.weight"] == 1.0
    assert scale["blocks.3.0.mlp.fc1.weight"] == scale["norm.weight"] == 0.5
    assert scale["blocks.0.0.attn.qkv.weight"] == pytest.approx(0.5 * scale["blocks.1.0.attn.qkv.weight"])


def test_accumulation_follows_the_global_batch():
    assert choose_accumulation(batch_size=4, global_batch=8, world_size=2) == 1
    assert choose_accumulation(batch_size=4, global_batch=32, world_size=2) == 4
    with pytest.raises(ValueError, match=r"global batch 20 is not a multiple of 8 \(4 images x 2 .*; choose 16"):
        choose_accumulation(batch_size=4, global_batch=20, world_size=2)


def test_choice_of_mixed_precision(monkeypatch):
    gpu = torch.device("cuda", 0)
    assert choose_amp("auto", CPU) is None
    assert choose_amp("bf16", CPU) is torch.bfloat16
    for supported, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        assert choose_amp("auto", gpu) is expected
    assert choose_amp("off", gpu) is None
    with pytest.raises(ValueError, match="--amp fp16 needs a GPU"):
        choose_amp("fp16", CPU)


@pytest.mark.parametrize(("dtype", "scales"), [(torch.float16, True), (torch.bfloat16, False), (None, False)])
def test_only_fp16_scales_its_losses(monkeypatch, dtype, scales):
    monkeypatch.setattr(main, "choose_amp", lambda name, device: dtype)
    state = build_state(parse(), timm.create_model("alt_gvt_tiny"), TrainSampler(64, global_batch=64), CPU)
    assert state.scaler.is_enabled() == scales


# ------------------------------------------------------------------------------------------------- arguments


def test_options_accept_hyphens_and_underscores():
    args = parse("--data_path", "x", "--output-dir=y", "--num-workers", "3", "--drop_path=0.3", "--dist_eval")
    found = args.data_path, args.output_dir, args.num_workers, args.drop_path, args.dist_eval
    assert found == ("x", "y", 3, 0.3, True)


def test_defaults_are_the_published_recipe():
    args = parse()
    expected = dict(epochs=300, opt="adamw", lr=5e-4, weight_decay=0.05, clip_grad=5.0, sched="cosine", min_lr=1e-5)
    expected |= dict(warmup_lr=1e-6, warmup_epochs=5, mixup=0.8, cutmix=1.0, smoothing=0.1, color_jitter=0.4)
    expected |= dict(aa="rand-m9-mstd0.5-inc1", reprob=0.25, remode="pixel", repeated_aug=False, input_size=224)
    assert {name: getattr(args, name) for name in expected} == expected


def test_help_names_each_group():
    text = get_args_parser().format_help()
    for group in ("model:", "optimisation:", "schedule:", "augmentation:", "mixup:", "distillation:", "data:", "run:"):
        assert f"\n{group}" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch-size", "0"], "argument --batch-size: '0' is not a whole number of at least 1"),
        (["--batch-size", "-8"], "argument --batch-size: '-8' is not a whole number of at least 1"),
        (
            ["--batch-size", "7"],
            "--batch-size 7: mixup and CutMix need an even batch size; change it, or pass --mixup 0",
        ),
        (["--input-size", "31"], "argument --input-size: '31' is not a whole number of at least 32"),
        (["--drop-path", "1.5"], "argument --drop-path: '1.5' is not a number of at least 0 and at most 0.99"),
        (["--model", "alt_gvt_smal"], "--model 'alt_gvt_smal' is unknown; did you mean alt_gvt_small"),
        (["--drop-pth", "0.1"], "unknown argument --drop-pth; did you mean --drop-path"),
        (["--data-set", "COCO"], "argument --data-set: invalid choice: 'COCO'"),
        (["--distillation-type", "hard"], "--distillation-type hard needs --teacher-path"),
        (["--pretrained", "--finetune", "x.pth"], "choose one of them"),
        (["--auto-resume", "--output_dir", ""], "--auto-resume needs --output_dir"),
        (["--save-every", "5", "--output_dir", ""], "--save-every needs --output_dir"),
        (
            ["--auto-resume", "--eval"],
            "--auto-resume continues a training run; name the weights to evaluate with --resume",
        ),
        (["--save-every", "0"], "argument --save-every: '0' is not a whole number of at least 1"),
        (["--eval"], "--eval needs weights: --resume FILE"),
        (["--data-path", "/nowhere"], "--data-path '/nowhere' is not a folder"),
        ([], "--data-path is missing; pass the folder of IMNET"),
        (["--data-set", "SHAPES", "--aa", "nonsense"], "--aa 'nonsense' is not a policy of timm"),
        (["--data-set", "SHAPES", "--resume", str(ROOT)], "this is a folder; name a file in it"),
        (["--data-set", "SHAPES", "--model", "densenet121"], "model 'densenet121' cannot be built (TypeError"),
        (["--data-set", "SHAPES", "--model", "twins_svt_small.bogus"], "model 'twins_svt_small.bogus' cannot be built"),
        (["--data-set", "SHAPES", "--device", "mps"], "--device 'mps' is not supported"),
        (
            ["--data-set", "SHAPES", "--pretrained", "--model", "alt_gvt_tiny"],
            "--pretrained: the weights of alt_gvt_tiny",
        ),
        (["--cutmix-minmax", "0.8", "0.2"], "--cutmix-minmax 0.8 0.2: give the smaller number first"),
        (["--seed", "1" + "0" * 23], "argument --seed: '100000000000000000000000' is not a whole number"),
        (["--data-set", "SHAPES", "--global-batch", "100"], "global batch 100 is not a multiple of 64"),
        (["--data-set", "SHAPES", "--batch-size", "16000"], "the training set has 10000 images, fewer than one global"),
        (["--data-set", "SHAPES", "--nb-classes", "12"], "--nb-classes 12: the data have 10 classes"),
        (["--data-set", "SHAPES", "--resume", "none.pth"], "none.pth: there is no such file"),
        (["--data-set", "SHAPES", "--amp", "fp16"], "--amp fp16 needs a GPU"),
        (["--data-set", "SHAPES", "--device", "gpu"], "--device 'gpu' is unknown"),
        (["--data-set", "SHAPES", "--opt", "adamm"], "--opt adamm cannot be built"),
        (["--data-set", "SHAPES", "--opt-betas", "0.9"], "--opt adamw --opt-betas 0.9: this optimizer has 2 betas"),
        (["--data-set", "SHAPES", "--opt-betas", "0.9", "0.9", "0.9"], "this optimizer has 2 betas; give as many"),
        (["--data-set", "SHAPES", "--opt", "sgd", "--opt-betas", "0.9"], "--opt-betas 0.9: this optimizer has 0 betas"),
        (
            ["--data-set", "SHAPES", "--opt", "adahessian"],
            "adahessian: second-order optimizers are not supp",
        ),
        (["--lr-noise", "0.9", "0.1"], "--lr-noise 0.9 0.1: give the smaller number first"),
        (["--lr-noise", "0.1", "0.2", "0.3"], "--lr-noise: takes at most two numbers"),
        (["--decay-milestones", "3", "1"], "--decay-milestones 3 1: give them in ascending order"),
        (["--epochs", "1" + "0" * 400], "is not a whole number of at least 1"),
        (["--data-path", "x" * 5000], "is not a folder"),
        (["--data-set", "SHAPES", "--resume", "x" * 5000], "there is no such file"),
        (["--data-set", "SHAPES", "--output_dir", "x" * 300], "cannot be written to (File name too long)"),
        (["--smoothing", "1"], "argument --smoothing: '1' is not a number of at least 0 and at most 0.99"),
        (
            ["--data-set", "SHAPES", "--model", "vit_tiny_patch16_224", "--input-size", "64"],
            "--input-size 64: vit_tiny_patch16_224 takes images of 224 pixels; pass that size",
        ),
        (["--lr", "inf"], "argument --lr: 'inf' is not a number above 0"),
    ],
)
def test_bad_arguments_end_with_one_line(argv, message, run_in_process, tmp_path):
    command = ["--model", "alt_gvt_tiny", "--device", "cpu", "--num_workers", "0", "--output_dir", tmp_path / "run"]
    _, error = run_in_process(*command, *argv)
    assert message in error
    assert error.startswith("main.py: error: ")
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_bad_checkpoints_end_with_one_line(trained, image_folder, tmp_path, run_in_process):
    folder, _, _ = trained
    torch.save(timm.create_model("alt_gvt_tiny", num_classes=3).state_dict(), tmp_path / "bare.pth")
    (tmp_path / "text.pth").write_text("text")
    whole = (folder / "checkpoint.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    data = ["--data-path", image_folder, "--output_dir", tmp_path / "run", "--epochs", "3"]
    cases = {
        "its run used model alt_gvt_tiny; use the same, not pcpvt_tiny": [
            *("--resume", folder / "checkpoint.pth", "--model", "pcpvt_tiny", "--model-ema"),
        ],
        "its run had a moving average (EMA); add --model-ema": ["--resume", folder / "checkpoint.pth"],
        "checkpoint.pth: has 3 classes, but the data have 10": [
            *("--resume", folder / "checkpoint.pth", "--model-ema", "--data-set", "SHAPES"),
        ],
        "no training state to resume": ["--resume", tmp_path / "bare.pth"],
        "text.pth: cannot be read as weights": ["--resume", tmp_path / "text.pth"],
        "cut.pth: cannot be read as weights": ["--finetune", tmp_path / "cut.pth"],
        "contains no moving average": ["--eval", "--resume", tmp_path / "bare.pth", "--model-ema"],
        "in the file, (10,) in the model": ["--eval", "--resume", tmp_path / "bare.pth", "--data-set", "SHAPES"],
    }
    for message, argv in cases.items():
        _, error = run_in_process(*TINY, *data, *argv)
        assert message in error, argv
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_new_run_does_not_overwrite_an_old_one(trained, image_folder, run_in_process):
    folder, _, _ = trained
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}
    other = folder.parent / "other.pth"
    shutil.copy(folder / "checkpoint.pth", other)
    for argv in ([], ["--resume", other]):
        _, error = run_in_process(*TINY, "--data-path", image_folder, "--output_dir", folder, *argv)
        assert "checkpoint.pth exists, and this run would overwrite it; continue that run with --auto-resume" in error
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"} == before


@pytest.mark.slow
def test_a_truncated_image_ends_the_run_or_is_skipped(image_folder, tmp_path):
    """Data-loading processes are used, whose errors contain tracebacks."""
    shutil.copytree(image_folder, tmp_path / "data")
    path = tmp_path / "data/val/n01443537/3.JPEG"
    assert read_size(path) == (90, 87)
    damage_jpeg(path)
    command = ["main.py", *TINY, "--data-path", tmp_path / "data", "--epochs", 1, "--num_workers", 2]
    result = forks.run(command)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert re.match(rf"main\.py: error: {re.escape(str(path))}: cannot be read as an image \(.*\); repair", line)
    result = forks.run([*command, "--bad-image", "skip"])
    assert result.returncode == 0, result.stderr
    assert "Accuracy of the network on the 20 test images" in result.stdout
    assert f"skipped: {path}" in result.stdout


@pytest.mark.slow
def test_more_processes_than_images(image_folder, tmp_path):
    result = run_processes(3, ["main.py", *TINY, "--batch-size", "10", "--data-path", image_folder])
    assert result.returncode != 0
    message = "error: the training set has 24 images, fewer than one global batch of 30; lower --batch-size"
    assert f"main.py: {message}" in result.stderr


@pytest.mark.slow
def test_processes_use_the_given_rendezvous(image_folder, tmp_path, monkeypatch):
    """Start two processes without a launcher."""
    command = ["main.py", *TINY, "--data-path", image_folder, "--epochs", 1, "--output_dir", tmp_path / "run"]
    command += ["--dist_url", f"tcp://127.0.0.1:{free_port()}"]
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    outputs = [tmp_path / rank for rank in ("0", "1")]
    processes = [forks.start(command, output, output, WORLD_SIZE="2", RANK=output.name) for output in outputs]
    for process in processes:
        process.join(120)
        process.kill()  # if it still runs
    assert [process.exitcode for process in processes] == [0, 0]
    assert "4 images x 2 processes x 1 accumulated = global batch 8" in outputs[0].read_text()


@pytest.mark.skipif(not hasattr(timm.optim, "list_optimizers"), reason="this timm has no list of its optimizers")
def test_every_optimizer_of_timm_is_accepted():
    for name in timm.optim.list_optimizers():
        try:
            create_optimizer_v2([torch.nn.Parameter(torch.zeros(2, 2))], opt=name, lr=1e-3, momentum=0.9)
        except Exception:  # it needs another package
            continue
        if name != "adahessian":
            check_optimizer(name, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.05})


def test_internal_errors_of_our_models_keep_their_traceback(monkeypatch):
    def fail(*_, **__):
        raise KeyError("internal")

    monkeypatch.setattr("models.twins.Twins.__init__", fail)
    for name in ("alt_gvt_tiny", "alt_gvt_small.in1k"):
        with pytest.raises(KeyError, match="internal"):
            main.build_model(name, 10)


def test_internal_errors_of_transforms_and_states_keep_their_traceback(image_folder, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ValueError("internal")

    command = [*TINY, "--data-path", str(image_folder), "--epochs", "1", "--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr("transforms.create_transform", fail)
        with pytest.raises(ValueError, match=r"^internal"):
            main.main(command)
    main.main(command)
    monkeypatch.setattr("core.meters.EpochMeter.load_state_dict", fail)
    with pytest.raises(ValueError, match=r"^internal"):
        main.main([*command, "--auto-resume"])


def test_models_of_timm_may_have_a_tag():
    check_args(get_args_parser(), parse("--model", "twins_svt_small.in1k"))


def test_commands_of_the_readme_are_valid():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"main\.py (--(?!help)[^`\n]*)", text)
    assert len(commands) > 12
    for command in commands:
        parse(*command.split("&&")[0].split())
