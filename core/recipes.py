"""Recipes of main.py: named sets of option values."""

from argparse import Namespace
from typing import Any

import torch
from timm.models import get_arch_name

from utils import UserError

# Recipe of each released model, where it differs from the defaults. The single published command of the original
# does not reproduce most of these weights. The peak learning rate is --lr x global batch / 512.
PUBLISHED = {
    "pcpvt_small": {"batch_size": 160, "global_batch": 1280, "drop_path": 0.2},
    "pcpvt_base": {"batch_size": 128, "global_batch": 1024, "drop_path": 0.3},
    "pcpvt_large": {"batch_size": 128, "global_batch": 1024, "drop_path": 0.5},
    "alt_gvt_small": {"batch_size": 256, "global_batch": 2048, "drop_path": 0.2},
    "alt_gvt_base": {"batch_size": 128, "global_batch": 1024, "drop_path": 0.3},
    "alt_gvt_large": {"batch_size": 128, "global_batch": 1024, "drop_path": 0.5, "warmup_epochs": 20},
}
PUBLISHED_PRECISION = torch.float16  # of autocast, in training and in the evaluation of the published accuracies
# The tiny model on the embedded shapes; it takes two to three minutes on two CPU cores.
# fmt: off
SHAPES = {
    "model": "alt_gvt_tiny", "data_set": "SHAPES", "input_size": 64,
    "epochs": 5, "batch_size": 32, "lr": 1.2e-3, "unscale_lr": True, "warmup_epochs": 0, "sched_on_updates": True,
    "drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0,
    "aa": "none", "color_jitter": 0.0, "reprob": 0.0, "scale": [1.0, 1.0], "print_freq": 50,
}
# fmt: on
RECIPES = ("published", "shapes")
# Options that are not compared with the published recipe: they do not change what is trained, or the recipe contains
# them in another form, as `batch_size` in `global_batch`.
# fmt: off
NOT_IN_RECIPES = {
    "recipe", "model", "batch_size", "grad_checkpointing", "compile", "amp", "data_path", "inat_category",
    "nb_classes", "bad_image", "eval_crop_ratio", "num_workers", "loader_timeout", "pin_mem", "output_dir", "resume",
    "auto_resume", "save_every", "keep", "on_nonfinite", "max_skipped", "seed", "print_freq", "eval", "dist_eval",
    "device", "dist_url", "local_rank", "deterministic", "traceback", "tensorboard",
}
# fmt: on


def get_recipe(name: str, model: str) -> dict[str, Any]:
    """Return the options of a recipe of `RECIPES`; a UserError if there are no released weights of the model."""
    if name == "shapes":
        return SHAPES
    recipe = PUBLISHED.get(published_name(model))
    if recipe is None:
        raise UserError(f"--recipe published: --model {model} is not one of {', '.join(PUBLISHED)}; choose one")
    return recipe


def published_name(model: str) -> str:
    """Return the name of a model without its tag and without the suffix `_v0` of the original's names."""
    return get_arch_name(model).removesuffix("_v0")


def differences(args: Namespace, recipe: dict[str, Any], source: str = "recipe") -> list[str]:
    """Return a description of each option that differs from a recipe or another source of options."""
    return [
        f"{name.replace('_', '-')} {getattr(args, name)} ({source}: {value})"
        for name, value in recipe.items()
        if getattr(args, name) != value
    ]


def note_recipe(args: Namespace) -> list[str]:
    """Return a note on the recipe in use and the options that override it."""
    if not args.recipe:
        return []
    changed = differences(args, get_recipe(args.recipe, args.model))
    return [f"recipe {args.recipe}" + (f", changed: {', '.join(changed)}" if changed else "")]


def note_published(args: Namespace, global_batch: int, precision: torch.dtype, defaults: dict[str, Any]) -> list[str]:
    """Return a note if the options of a run differ from the recipe of the published model; none for other models.

    `precision` is the data type of autocast, float32 without autocast; `defaults` holds those of all options.
    """
    name = published_name(args.model)
    if name not in PUBLISHED:
        return []
    recipe = {option: value for option, value in (defaults | PUBLISHED[name]).items() if option not in NOT_IN_RECIPES}
    run = Namespace(**vars(args) | {"global_batch": global_batch, "precision": precision})
    changed = differences(run, recipe | {"precision": PUBLISHED_PRECISION})
    return [f"note: differs from the recipe of the published {args.model}: {', '.join(changed)}"] if changed else []


def note_precision(model: str, precision: torch.dtype) -> list[str]:
    """Return a note if a published model is evaluated in another precision than its published accuracy."""
    if published_name(model) not in PUBLISHED or precision == PUBLISHED_PRECISION:
        return []
    return [f"note: computes in {precision}; the published accuracy was measured on a GPU with --amp fp16"]
