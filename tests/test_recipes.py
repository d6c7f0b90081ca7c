"""Recipes by name, and how a run differs from the published one."""

import pytest
import timm
import torch

from core.recipes import NOT_IN_RECIPES, PUBLISHED, SHAPES, note_published
from core.run import choose_accumulation
from main import get_args_parser, parse_args

FP16 = torch.float16
NOTE = "note: differs from the recipe of the published alt_gvt_small: "


def parse(*argv):
    return get_args_parser().parse_args([str(arg) for arg in argv])


def test_differences_from_the_published_recipe():
    args = parse("--model", "alt_gvt_small", "--drop-path", 0.2, "--data-path", "x", "--batch-size", 256)
    assert note_published(args, 2048, FP16, vars(parse())) == []
    assert note_published(args, 1024, FP16, vars(parse())) == [NOTE + "global-batch 1024 (recipe: 2048)"]
    args = parse("--model", "pcpvt_large_v0", "--mixup", 0.5, "--data-set", "SHAPES")
    differing = " ".join(note_published(args, 1024, FP16, vars(parse())))
    for part in ("drop-path 0.1 (recipe: 0.5)", "mixup 0.5 (recipe: 0.8)", "data-set SHAPES (recipe: IMNET)"):
        assert part in differing
    assert note_published(parse("--model", "alt_gvt_tiny", "--lr", 1), 64, FP16, vars(parse())) == []


def test_another_precision_than_the_published_is_noted(image_folder, run_in_process, tmp_path):
    args = parse("--model", "alt_gvt_small", "--drop-path", 0.2, "--data-path", "x", "--batch-size", 256)
    for precision in (torch.bfloat16, torch.float32):
        expected = [f"{NOTE}precision {precision} (recipe: torch.float16)"]
        assert note_published(args, 2048, precision, vars(parse())) == expected
    model = timm.create_model("pcpvt_small", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    options = ["--data-path", image_folder, "--input-size", "32", "--device", "cpu", "--num_workers", "0"]
    output, _ = run_in_process("--eval", "--resume", tmp_path / "weights.pth", "--model", "pcpvt_small", *options)
    assert "note: computes in torch.float32; the published accuracy was measured on a GPU with --amp fp16" in output


def test_the_published_command_equals_the_published_recipe():
    command = "--model alt_gvt_base --batch-size 128 --data-path path_to_imagenet --dist-eval --drop-path 0.3"
    assert note_published(parse(*command.split()), 8 * 128, FP16, vars(parse())) == []


def test_recipes_are_defaults_that_options_override(monkeypatch, tmp_path, run_in_process):
    args = vars(parse_args(["--recipe", "shapes", "--lr", "1e-3", "--no-unscale-lr"]))
    expected = vars(parse()) | SHAPES | {"recipe": "shapes", "lr": 1e-3, "unscale_lr": False}
    assert args == expected
    args = vars(parse_args(["--recipe", "published", "--model", "alt_gvt_large", "--warmup-epochs", "3"]))
    assert (args["global_batch"], args["drop_path"], args["warmup_epochs"]) == (1024, 0.5, 3)
    _, error = run_in_process("--recipe", "published", "--model", "resnet18")
    assert "--recipe published: --model resnet18 is not one of pcpvt_small" in error
    monkeypatch.setattr("datasets.SHAPES_TRAIN", 8)
    monkeypatch.setattr("datasets.SHAPES_VAL", 4)
    small = ["--input-size", "32", "--batch-size", "4", "--epochs", "1", "--device", "cpu", "--num_workers", "0"]
    output, _ = run_in_process("--recipe", "shapes", *small)
    assert "recipe shapes, changed: input-size 32 (recipe: 64), epochs 1 (recipe: 5), batch-size 4" in output


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_published_recipe_needs_no_batch_size(name, processes):
    args = parse_args(["--recipe", "published", "--model", name])
    accumulation = choose_accumulation(args.batch_size, args.global_batch, processes)
    assert args.batch_size * processes * accumulation == PUBLISHED[name]["global_batch"]
    assert note_published(args, args.global_batch, FP16, vars(parse())) == []


def test_every_option_is_in_recipes_or_excluded():
    assert NOT_IN_RECIPES | set(SHAPES) | set(PUBLISHED["alt_gvt_large"]) <= set(vars(parse()))
    fixed = set(vars(parse())) - NOT_IN_RECIPES
    assert {"lr", "aa", "drop_path", "finetune", "data_set", "opt_betas", "recount", "mixup_mode"} <= fixed
    assert not fixed & {"output_dir", "seed", "device"}
