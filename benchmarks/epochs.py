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
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch
from timm.data import FastCollateMixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad

from benchmarks import common
from benchmarks.pipeline import build_images_parser, build_timms_loader, compare_loops, training_images
from core.distributed import Processes
from core.launch import run_script
from utils import UserError

# Options of main.py and their values, for both loops; the augmentation is that of `pipeline.parse_loading`.
RECIPE = {"opt": "adamw", "lr": 5e-4, "weight_decay": 0.05, "clip_grad": 5.0, "drop_path": 0.1}
RECIPE |= {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}


def run_our_epoch(name: str, loading: argparse.Namespace, threads: int) -> float:
    """Train a model for an epoch with main.py, and return the seconds per image that it logs."""
    used = ("data_path", "input_size", "batch_size", "num_workers")
    options = RECIPE | {option: getattr(loading, option) for option in used}
    options |= {"model": name, "epochs": 1, "device": "cpu"}
    main = Path(__file__).resolve().parents[1] / "main.py"
    command = [sys.executable, str(main), *(f"--{option}={value}" for option, value in options.items())]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    images, seconds = re.search(r"^epoch 0: (\d+) images in (\S+) s$", run.stdout, re.MULTILINE).groups()
    return float(seconds) / int(images)


def run_timms_epoch(name: str, loading: argparse.Namespace, threads: int) -> float:
    """Train timm's model for an epoch, as timm's train.py does, and return the seconds per image."""
    torch.set_num_threads(threads)
    recipe = argparse.Namespace(**RECIPE)
    classes = len(list(Path(loading.data_path, "train").iterdir()))
    model = timm.create_model(name, num_classes=classes, drop_path_rate=recipe.drop_path).train()
    mixup = FastCollateMixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)
    loader, criterion = build_timms_loader(loading, mixup), SoftTargetCrossEntropy()
    optimizer = create_optimizer_v2(model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)
    count, start = 0, time.perf_counter()
    for images, targets in loader:
        loss = criterion(model(images), targets)
        count += len(images)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), recipe.clip_grad)
        optimizer.step()
    return (time.perf_counter() - start) / count


def measure_epochs(name: str, peer: str, loading: argparse.Namespace, args: argparse.Namespace) -> Iterator[common.Row]:
    """Return a row for main.py's epochs of a model and one for timm's, which are measured in turns."""
    ours, timms = [], []
    for turn in range(1, args.turns + 1):
        print(f"epochs of {name}: turn {turn} of {args.turns}", file=sys.stderr, flush=True)
        ours.append(run_our_epoch(name, loading, args.threads))
        timms.append(common.run_in_new_process(run_timms_epoch, peer, loading, args.threads))
    return compare_loops({f"{name}, ours": ours, "timm": timms})


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Measure the epochs and print a table."""
    models = common.name_models(args.models, peers=True)
    if args.batch_size % 2:
        raise UserError(f"--batch-size {args.batch_size}: mixup pairs images; make it even")
    torch.set_num_threads(args.threads)
    with training_images(args) as loading:
        Path(loading.data_path, "val").symlink_to("train")  # main.py evaluates after the epoch, untimed
        rows = common.print_table(row for pair in models for row in measure_epochs(*pair, loading, args))
    common.write_report(args, processes.device, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; `core.launch.run_script` says how it ends."""
    run_script("epochs.py", run, build_images_parser("epochs", __doc__, "published models").parse_args(argv))


if __name__ == "__main__":
    main()
