"""The optimizer and the learning-rate schedule of main.py's options, both timm's."""

import argparse
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler
from torch import nn

from core.launch import one_line
from utils import UserError

FUSED = ("adam", "adamw")  # with an implementation of one pass over all weights, which is used on GPUs


def peak_lr(args: argparse.Namespace, global_batch: int) -> float:
    """Return the peak learning rate, reached at the end of the warm-up."""
    return args.lr if args.unscale_lr else args.lr * global_batch / 512


def build_optimizer(args: argparse.Namespace, model: nn.Module, global_batch: int) -> torch.optim.Optimizer:
    """Build the optimizer; biases, norms, other 1-D parameters and the PEGs have no weight decay."""
    options = {"lr": peak_lr(args, global_batch), "weight_decay": args.weight_decay, "momentum": args.momentum}
    if args.opt_eps is not None:
        options["eps"] = args.opt_eps
    if args.opt_betas is not None:
        options["betas"] = tuple(args.opt_betas)
    check_optimizer(args.opt, options)
    if args.opt in FUSED and next(model.parameters()).is_cuda:
        options["fused"] = True
    return create_optimizer_v2(model, opt=args.opt, layer_decay=args.layer_decay, **options)


def check_optimizer(name: str, options: dict[str, Any]) -> None:
    """Reject an optimizer or its options if they cannot train a model."""
    betas = options.get("betas", ())
    given = f"--opt {name}"
    if betas:
        given += f" --opt-betas {' '.join(map(str, betas))}"
    parameter = nn.Parameter(torch.zeros(2, 2))
    try:
        others = {option: value for option, value in options.items() if option != "betas"}
        default = create_optimizer_v2([parameter], opt=name, **others).param_groups[0].get("betas", ())
        if betas and len(betas) != len(default):
            raise UserError(f"{given}: this optimizer has {len(default)} betas; give as many, or omit the option")
        optimizer = create_optimizer_v2([parameter], opt=name, **options)
    except UserError:
        raise
    except Exception as error:  # optimizers raise many kinds of errors
        raise UserError(f"{given} cannot be built: {one_line(error)}; choose another one, such as adamw") from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"{given}: second-order optimizers are not supported; choose another one, such as adamw")


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int):
    """Build the schedule: stepped after each epoch of `steps` steps, or with --sched-on-updates before each step."""
    return create_scheduler(args, optimizer, updates_per_epoch=steps)[0]


def note_schedule(args: argparse.Namespace, global_batch: int) -> list[str]:
    """Return notes on a schedule that is probably not intended."""
    notes = []
    if 3 * args.warmup_epochs >= args.epochs:
        by_epoch = "" if args.sched_on_updates else "; --sched-on-updates raises the learning rate within each epoch"
        notes.append(
            f"note: --warmup-epochs {args.warmup_epochs} is a third or more of this run of {args.epochs} epochs, which "
            f"may learn little{by_epoch}"
        )
    if peak_lr(args, global_batch) <= args.min_lr:
        notes.append(
            f"note: the peak learning rate is not above --min-lr {args.min_lr:g}; raise --lr, or use --unscale-lr"
        )
    return notes
