"""Measure whole epochs of training on the CPU: main.py beside the loop of timm's training script, in turns.

    python -m benchmarks.epochs alt_gvt_small --images 96 --turns 2
    python -m benchmarks.epochs --data path_to_imagenet      # the six published models, on your own images

Data loading, augmentation, mixup, the model and the optimizer all count. Each epoch is the first of a new process.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
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
    print_progress,
    run_in_new_process,
    set_threads,
    write_report,
)
from benchmarks.pipeline import (
    add_image_options,
    build_timms_loader,
    check_image_options,
    parse_loading,
    report_loops,
    training_images,
)
from core.distributed import Processes
from core.launch import run_script
from core.options import ArgumentParser
from utils import UserError

MAIN = Path(__file__).resolve().parents[1] / "main.py"
# Options of main.py and their values, for both loops; the augmentation is that of `parse_loading`.
RECIPE = {
    "opt": "adamw",
    "lr": 5e-4,
    "weight_decay": 0.05,
    "clip_grad": 5.0,
    "drop_path": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
}


class Epoch(NamedTuple):
    """Seconds and images of an epoch of training."""

    seconds: float
    images: int


def run_our_epoch(name: str, loading: argparse.Namespace) -> Epoch:
    """Train a model for an epoch with main.py, which logs the seconds and the images.

    Args:
        name: Name of the model.
        loading: Options of the loader.
    """
    used = ("data_path", "input_size", "batch_size", "num_workers")
    options = RECIPE | {option: getattr(loading, option) for option in used} | {"model": name}
    options |= {"epochs": 1, "device": "cpu"}
    command = [sys.executable, str(MAIN), *(f"--{option}={value}" for option, value in options.items())]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True)
    images, seconds = re.search(r"^epoch 0: (\d+) images in (\S+) s$", run.stdout, re.MULTILINE).groups()
    return Epoch(float(seconds), int(images))


def run_timms_epoch(name: str, loading: argparse.Namespace, threads: int) -> Epoch:
    """Train a model of timm for an epoch, as timm's train.py does, with timm's loader.

    Args:
        name: timm's name of the model.
        loading: Options of the loader.
        threads: Number of CPU threads.
    """
    set_threads(threads)
    recipe = argparse.Namespace(**RECIPE)
    classes = len(list(Path(loading.data_path, "train").iterdir()))
    model = timm.create_model(name, num_classes=classes, drop_path_rate=recipe.drop_path).train()
    mixup = FastCollateMixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)
    loader, criterion = build_timms_loader(loading, mixup), SoftTargetCrossEntropy()
    optimizer = create_optimizer_v2(model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)
    losses = AverageMeter()
    start = time.perf_counter()
    for images, targets in loader:
        loss = criterion(model(images), targets)
        losses.update(loss.item(), len(images))
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), recipe.clip_grad)
        optimizer.step()
    return Epoch(time.perf_counter() - start, losses.count)


def run_epochs(root: Path, names: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the epochs of both in turns on the same files, print a table, and return its rows."""
    rows = []
    loading, threads = parse_loading(root, args.batch_size, args.workers), torch.get_num_threads()
    for name in names:
        ours, timms = [], []
        for turn in range(1, args.turns + 1):
            print_progress(f"epochs of {name}: turn {turn} of {args.turns}")
            ours.append(run_our_epoch(name, loading))
            timms.append(run_in_new_process(run_timms_epoch, name_peer(name), loading, threads))
        times = [[epoch.seconds for epoch in epochs] for epochs in (ours, timms)]
        rows += report_loops((f"{name}, ours", "timm"), times, (ours[0].images, timms[0].images))
    return rows


def link_validation_images(root: Path) -> None:
    """Link one image of each class in `root/train` into `root/val`: main.py evaluates after the epoch, untimed."""
    for folder in (root / "train").iterdir():
        image = next(folder.iterdir())
        link = root / "val" / folder.name / image.name
        link.parent.mkdir(parents=True)
        link.symlink_to(image)


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
        link_validation_images(root)
        rows = run_epochs(root, names, args)
    write_report(args, processes.device, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; `core.launch.run_script` says how it ends."""
    parser = get_parser()
    run_script(parser.prog, run, parser.parse_args(argv))


if __name__ == "__main__":
    main()
