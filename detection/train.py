"""Train a detector of configs/; evaluate it and save a checkpoint after each epoch.

bash dist_train.sh configs/mask_rcnn_alt_gvt_s_fpn_1x_coco_pvt_setting.py 8
bash dist_train.sh configs/mask_rcnn_alt_gvt_tiny_shapes.py 1
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # instead of this folder, whose file names would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import nn
from torch.utils.data import DataLoader

from core.description import Description
from core.distributed import Processes
from core.launch import RESUMABLE, run_script
from core.options import choose_amp, loader_options
from dense.optimisation import linear_warmup
from dense.training import Task, describe, get_train_parser, process_batch, run_training, sampling
from detection.configs.recipes import Experiment
from detection.data import GroupedBatches, build_dataset, collate
from detection.metrics import find_objects, summarise
from detection.network import build_detector
from detection.transforms import many_scales, one_scale
from detection.weights import load_detector
from samplers import SeededSet

logger = logging.getLogger("twins")

KINDS = {"retinanet": ("bbox",), "mask_rcnn": ("bbox", "segm")}  # the kinds of results to evaluate


def build_train_loader(args: argparse.Namespace, experiment: Experiment, processes: Processes) -> DataLoader:
    """Build the loader of the training set."""
    dataset = build_dataset(experiment, "train")
    augment = many_scales if experiment.many_scales else partial(one_scale, scale=experiment.scale)
    batch_size = process_batch(experiment, processes)
    batches = GroupedBatches(dataset.sizes, batch_size=batch_size, **sampling(args, experiment, processes))
    views = SeededSet(dataset, args.seed, augment)
    return DataLoader(views, batch_sampler=batches, collate_fn=collate, **loader_options(args, processes.device))


def build_eval_loader(
    args: argparse.Namespace, experiment: Experiment, processes: Processes, part: str = "val"
) -> DataLoader:
    """Build the loader of this process's share of a part: one image per batch, so padded by itself."""
    dataset = build_dataset(experiment, part)
    sampler = range(processes.rank, len(dataset), processes.world_size)
    return DataLoader(dataset, sampler=sampler, collate_fn=collate, **loader_options(args, processes.device))


def build_task(args: argparse.Namespace, experiment: Experiment, processes: Processes, is_new: bool) -> Task:
    """Build the data and the detector of an experiment; a new run loads its first weights."""
    train_loader = build_train_loader(args, experiment, processes)
    eval_loader = build_eval_loader(args, experiment, processes)
    dataset = eval_loader.dataset
    model = build_detector(experiment, len(dataset.classes), is_new and not args.finetune)
    if args.finetune and is_new:
        logger.info("%s", load_detector(model, args.finetune, finetune=True))

    def evaluate(model: nn.Module) -> dict[str, float]:
        amp_dtype = choose_amp(args.amp, processes.device)
        results = find_objects(model, eval_loader, processes.device, dataset.category_ids, amp_dtype=amp_dtype)
        figures = summarise(dataset.coco, dataset.ids, results, KINDS[experiment.detector], tables=False)
        logger.info("%s", describe(figures))
        return {f"test_{name}": value for name, value in figures.items()}

    return Task(
        model=model,
        train_loader=train_loader,
        sampler=train_loader.batch_sampler,
        epochs=experiment.epochs,
        lr_factor=partial(lr_factor, experiment=experiment, steps=train_loader.batch_sampler.steps),
        evaluate=evaluate,
        best_figure=f"test_{KINDS[experiment.detector][-1]}_AP",
        same=("backbone", "detector", "dataset"),
        description=Description("detection", dataset.classes),
    )


def lr_factor(iteration: int, experiment: Experiment, steps: int) -> float:
    """Return the factor of the peak learning rate at an iteration, counted from 0; an epoch has `steps` iterations."""
    decay = 0.1 ** sum(iteration >= milestone * steps for milestone in experiment.milestones)
    return decay * linear_warmup(iteration, experiment.warmup_iterations, experiment.warmup_ratio)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; see `core.launch.run_script` for the exit codes."""
    parser = get_train_parser(__doc__)
    args = parser.parse_args(argv)
    run_script(parser.prog, partial(run_training, build_task=build_task, kind=Experiment), args, when_stopped=RESUMABLE)


if __name__ == "__main__":
    main()
