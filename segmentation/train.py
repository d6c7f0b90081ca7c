"""Train a segmentation network of configs/; evaluate it and save a checkpoint after each interval.

bash dist_train.sh configs/upernet_pcpvt_l_512x512_160k_ade20k_swin_setting.py 8
bash dist_train.sh configs/upernet_alt_gvt_tiny_shapes.py 1
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # instead of this folder, whose file names would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch.utils.data import DataLoader

from core.description import Description
from core.distributed import Processes
from core.launch import RESUMABLE, run_script
from core.options import choose_amp, loader_options
from dense.optimisation import linear_warmup
from dense.training import Task, describe, get_train_parser, process_batch, run_training, sampling
from models.twins import MIN_INPUT_SIZE
from samplers import EndlessSampler, SeededSet
from segmentation.configs.recipes import Experiment
from segmentation.data import build_dataset
from segmentation.metrics import evaluate
from segmentation.network import Segmentor, build_predictor, build_segmentor
from segmentation.transforms import EvalViews, augment
from segmentation.weights import load_segmentor
from utils import UserError

logger = logging.getLogger("twins")


def build_train_loader(args: argparse.Namespace, experiment: Experiment, processes: Processes) -> DataLoader:
    """Build the loader of the training set; its epoch is the interval between evaluations."""
    dataset = build_dataset(experiment, "train")
    crop = partial(augment, scale=experiment.scale, scale_range=experiment.scale_range, crop_size=experiment.crop_size)
    views = SeededSet(dataset, args.seed, crop)
    sampler = EndlessSampler(len(views), steps=experiment.interval, **sampling(args, experiment, processes))
    batch_size = process_batch(experiment, processes)
    return DataLoader(views, batch_size=batch_size, sampler=sampler, **loader_options(args, processes.device))


def build_eval_loader(
    args: argparse.Namespace,
    experiment: Experiment,
    processes: Processes,
    ratios: Sequence[float] = (1.0,),
    part: str = "val",
) -> DataLoader:
    """Build the loader of this process's share of the `"val"` or `"test"` part of a data set, one image at a time."""
    views = EvalViews(build_dataset(experiment, part), experiment.scale, ratios)
    sampler = range(processes.rank, len(views), processes.world_size)
    return DataLoader(views, batch_size=None, sampler=sampler, **loader_options(args, processes.device))


def build_task(args: argparse.Namespace, experiment: Experiment, processes: Processes, is_new: bool) -> Task:
    """Build the data and the network of an experiment; a new run loads its first weights."""
    check_batch(experiment, processes)
    train_loader = build_train_loader(args, experiment, processes)
    eval_loader = build_eval_loader(args, experiment, processes)
    classes = eval_loader.dataset.dataset.classes
    model = build_segmentor(experiment, len(classes), is_new and not args.finetune)
    if args.finetune and is_new:
        logger.info("%s", load_segmentor(model, args.finetune, finetune=True))

    def evaluate_model(model: Segmentor) -> dict[str, float]:
        predict_image = build_predictor(model, experiment, choose_amp(args.amp, processes.device))
        matrix = evaluate(predict_image, eval_loader, processes.device, len(classes))
        figures = matrix.summary()
        logger.info("%s\n%s", matrix.table(classes), describe(figures))
        return {f"test_{name}": value for name, value in figures.items()}

    return Task(
        model=model,
        train_loader=train_loader,
        sampler=train_loader.sampler,
        epochs=experiment.iterations // experiment.interval,
        lr_factor=partial(lr_factor, experiment=experiment),
        evaluate=evaluate_model,
        best_figure="test_mIoU",
        same=("backbone", "head", "dataset", "eval_interval"),
        description=Description("segmentation", classes, eval_loader.dataset.dataset.colours),
    )


def check_batch(experiment: Experiment, processes: Processes) -> None:
    """Raise a UserError if a BatchNorm would see a single value per channel: one image, pooled to one pixel."""
    one_pixel = experiment.head == "upernet" or experiment.crop_size < 2 * MIN_INPUT_SIZE
    if one_pixel and process_batch(experiment, processes) * processes.norm_processes == 1:
        raise UserError(
            f"batch_size={experiment.batch_size}, global_batch={experiment.global_batch}: the BatchNorms of the head "
            "need at least two images per process; raise the fields with --cfg-options, or start fewer processes"
        )


def lr_factor(iteration: int, experiment: Experiment) -> float:
    """Return the factor of the peak learning rate at an iteration, counted from 0."""
    min_ratio = experiment.min_lr / experiment.lr
    decay = min_ratio + (1 - min_ratio) * (1 - iteration / experiment.iterations) ** experiment.power
    return decay * linear_warmup(iteration, experiment.warmup_iterations, experiment.warmup_ratio)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; see `core.launch.run_script` for the exit codes."""
    parser = get_train_parser(__doc__)
    args = parser.parse_args(argv)
    run_script(parser.prog, partial(run_training, build_task=build_task, kind=Experiment), args, when_stopped=RESUMABLE)


if __name__ == "__main__":
    main()
