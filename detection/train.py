"""Train a detector of configs/, evaluating and writing a checkpoint after each epoch.

    bash dist_train.sh configs/mask_rcnn_alt_gvt_s_fpn_1x_coco_pvt_setting.py 8
    bash dist_train.sh configs/mask_rcnn_alt_gvt_tiny_shapes.py 1

Bad input ends with one line that names it and a non-zero exit code; --traceback shows where it was found.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose file names might shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn
from torch.utils.data import DataLoader

from core.distributed import Processes
from core.launch import run_script
from core.options import choose_amp, loader_options
from dense.optimisation import StepSchedule
from dense.training import Task, get_train_parser, process_batch, run_training
from detection.configs.recipes import Experiment
from detection.data import GroupedBatches, build_dataset, collate
from detection.metrics import find_objects, summarise
from detection.network import build_detector
from detection.transforms import TrainViews, many_scales, one_scale
from detection.weights import load_detector
from samplers import EvalSampler, SeededSet

logger = logging.getLogger("twins")

KINDS = {"retinanet": ("bbox",), "mask_rcnn": ("bbox", "segm")}  # of results that are evaluated


def build_train_loader(args: argparse.Namespace, experiment: Experiment, processes: Processes) -> DataLoader:
    """Build the loader of the training set."""
    dataset = build_dataset(experiment.dataset, experiment.data_root, True, max(experiment.scale))
    augment = many_scales if experiment.many_scales else partial(one_scale, scale=experiment.scale)
    batches = GroupedBatches(
        dataset.sizes,
        batch_size=process_batch(experiment, processes),
        global_batch=experiment.global_batch,
        world_size=processes.world_size,
        rank=processes.rank,
        seed=args.seed,
    )
    views = SeededSet(TrainViews(dataset, augment), args.seed)
    return DataLoader(views, batch_sampler=batches, collate_fn=collate, **loader_options(args, processes.device))


def build_eval_loader(args: argparse.Namespace, experiment: Experiment, processes: Processes) -> DataLoader:
    """Build the loader of this process's share of the validation set, one image at a time: each is padded alone."""
    dataset = build_dataset(experiment.dataset, experiment.data_root, False, max(experiment.scale))
    sampler = EvalSampler(len(dataset), world_size=processes.world_size, rank=processes.rank)
    return DataLoader(dataset, sampler=sampler, collate_fn=collate, **loader_options(args, processes.device))


def build_task(args: argparse.Namespace, experiment: Experiment, processes: Processes, is_new: bool) -> Task:
    """Build the data and the detector of an experiment; in a new run, with the weights that it starts from."""
    train_loader = build_train_loader(args, experiment, processes)
    eval_loader = build_eval_loader(args, experiment, processes)
    dataset = eval_loader.dataset
    model = build_detector(experiment, len(dataset.classes), is_new and not args.finetune)
    if args.finetune and is_new:
        logger.info("%s", load_detector(model, args.finetune, finetune=True))

    def evaluate(model: nn.Module) -> dict[str, float]:
        amp_dtype = choose_amp(args.amp, processes.device)
        results = find_objects(model, eval_loader, processes.device, dataset.category_ids, amp_dtype=amp_dtype)
        figures = summarise(dataset.coco, dataset.ids, results, KINDS[experiment.detector])
        return {f"test_{name}": value for name, value in figures.items()}

    return Task(
        model=model,
        train_loader=train_loader,
        sampler=train_loader.batch_sampler,
        epochs=experiment.epochs,
        schedule=build_schedule(experiment, train_loader.batch_sampler.steps),
        evaluate=evaluate,
        best_figure=f"test_{KINDS[experiment.detector][-1]}_AP",
        same=("backbone", "detector", "dataset"),
    )


def build_schedule(experiment: Experiment, steps: int) -> Callable[[torch.optim.Optimizer], StepSchedule]:
    """Return what builds the schedule of an optimizer, for epochs of so many steps."""
    return partial(
        StepSchedule,
        milestones=[milestone * steps for milestone in experiment.milestones],
        warmup_iterations=experiment.warmup_iterations,
        warmup_ratio=experiment.warmup_ratio,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; see `command_line.run_script` for how it ends."""
    parser = get_train_parser(__doc__)
    args = parser.parse_args(argv)
    run_script(parser.prog, partial(run_training, build_task=build_task, kind=Experiment), args, kept=True)


if __name__ == "__main__":
    main()
