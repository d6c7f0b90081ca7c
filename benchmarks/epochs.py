"""Measure whole epochs of training on the CPU: main.py's beside those of timm's training script, in turns.

    python -m benchmarks.epochs alt_gvt_small --images 96 --turns 2
    python -m benchmarks.epochs --data path_to_imagenet      # the six published models, on your own images

Data loading, augmentation, mixup, the model and the optimizer all count.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import FastCollateMixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, dispatch_clip_grad

from benchmarks.common import (
    add_measurement_options,
    add_models_argument,
    add_script_options,
    add_threads_option,
    build_parser,
    check_report,
    choose_models,
    name_peer,
    set_threads,
    time_in_turns,
    write_report,
)
from benchmarks.pipeline import (
    add_image_options,
    build_our_loader,
    build_timms_loader,
    check_image_options,
    parse_training,
    report_loops,
    training_images,
)
from core.distributed import Processes
from core.launch import run_script
from core.options import ArgumentParser, train_settings
from core.run import Run
from engine import train_one_epoch
from main import build_compute_losses, build_state, build_trained_model
from utils import UserError


class Epoch(NamedTuple):
    """An epoch of training.

    Attributes:
        train: Function that trains for one epoch.
        images: Number of images in the epoch.
    """

    train: Callable[[], Any]
    images: int


def build_our_epoch(args: argparse.Namespace) -> Epoch:
    """Build an epoch of main.py from its options."""
    device = torch.device("cpu")
    loader = build_our_loader(args)
    classes = len(loader.dataset.dataset.classes)
    model = build_trained_model(args, classes, new=True).to(memory_format=torch.channels_last)
    state = build_state(args, model, loader.sampler, device)
    compute_losses = build_compute_losses(args, classes, device)
    settings = dataclasses.replace(train_settings(args, device, accumulation=1), print_freq=len(loader))
    run = Run(vars(args))
    run.resume(state, same=())

    def train() -> None:
        state.meter.start_epoch()
        epoch = next(run.epochs(1, {}))  # always the first one
        state.sampler.set_epoch(epoch)
        train_one_epoch(model, compute_losses, loader, state, settings, run)

    return Epoch(train, len(loader) * args.batch_size)


def build_timms_epoch(args: argparse.Namespace) -> Epoch:
    """Build an epoch of timm's train.py, with timm's model and loader, from main.py's options."""
    classes = len(list(Path(args.data_path, "train").iterdir()))
    model = timm.create_model(name_peer(args.model), num_classes=classes, drop_path_rate=args.drop_path)
    mixup = FastCollateMixup(
        args.mixup, args.cutmix, prob=args.mixup_prob, label_smoothing=args.smoothing, num_classes=classes
    )
    loader, criterion = build_timms_loader(args, mixup), SoftTargetCrossEntropy()
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    losses = AverageMeter()

    def train() -> None:
        model.train()
        for images, targets in loader:
            loss = criterion(model(images), targets)
            losses.update(loss.item(), len(images))
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model.parameters(), args.clip_grad)
            optimizer.step()

    return Epoch(train, len(loader) * args.batch_size)


def run_epochs(root: Path, names: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the epochs of both in turns on the same files, print a table, and return its rows."""
    rows = []
    for name in names:
        options = parse_training(root, args.batch_size, args.workers, "--model", name)
        loops = {f"{name}, ours": build_our_epoch(options), "timm": build_timms_epoch(options)}
        steps = [epoch.train for epoch in loops.values()]
        times = time_in_turns(steps, args.turns, torch.device("cpu"), f"epochs of {name}")
        rows += report_loops(loops, times, [epoch.images for epoch in loops.values()])
    return rows


def get_parser() -> ArgumentParser:
    """Return the parser."""
    parser = build_parser("epochs", __doc__, "[MODEL ...] [options]")
    add_models_argument(parser, help="published models")
    add_image_options(parser)
    add_threads_option(add_measurement_options(parser))
    add_script_options(parser)
    return parser


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Measure the epochs and report the results."""
    names = choose_models(args.models, need_peers=True)
    check_image_options(args)
    if args.batch_size % 2:
        raise UserError(f"--batch-size {args.batch_size}: mixup pairs images; make it even")
    check_report(args.json)
    set_threads(args.threads)
    with training_images(args) as root:
        rows = run_epochs(root, names, args)
    write_report(args, processes.device, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; `core.launch.run_script` says how it ends."""
    parser = get_parser()
    run_script(parser.prog, run, parser.parse_args(argv))


if __name__ == "__main__":
    main()
