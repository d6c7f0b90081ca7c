"""Train a segmentation network of configs/, evaluating and writing a checkpoint in intervals.

    bash dist_train.sh configs/upernet_pcpvt_l_512x512_160k_ade20k_swin_setting.py 8
    bash dist_train.sh configs/upernet_alt_gvt_tiny_shapes.py 1

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
from torch.utils.data import DataLoader

from core.distributed import Processes
from core.launch import run_script
from core.options import choose_amp, loader_options
from dense.optimisation import PolySchedule
from dense.training import Task, describe, get_train_parser, process_batch, run_training
from models.twins import MIN_INPUT_SIZE
from samplers import EndlessSampler, EvalSampler, SeededSet
from segmentation.configs.recipes import Experiment
from segmentation.data import build_dataset
from segmentation.metrics import evaluate
from segmentation.network import Segmentor, build_segmentor
from segmentation.transforms import EvalViews, TrainViews
from segmentation.weights import load_segmentor
from utils import UserError

logger = logging.getLogger("twins")


def build_train_loader(args: argparse.Namespace, experiment: Experiment, processes: Processes) -> DataLoader:
    """Build the loader of the training set; an epoch of it is one interval between evaluations."""
    dataset = build_dataset(experiment.dataset, experiment.data_root, True, max(experiment.scale))
    views = TrainViews(dataset, experiment.scale, experiment.scale_range, experiment.crop_size)
    sampler = EndlessSampler(
        len(views),
        steps=experiment.eval_interval,
        global_batch=experiment.global_batch,
        world_size=processes.world_size,
        rank=processes.rank,
        seed=args.seed,
    )
    loading = loader_options(args, processes.device)
    batch_size = process_batch(experiment, processes)
    return DataLoader(SeededSet(views, args.seed), batch_size=batch_size, sampler=sampler, **loading)


def build_eval_loader(
    args: argparse.Namespace, experiment: Experiment, processes: Processes, ratios: Sequence[float] = (1.0,)
) -> DataLoader:
    """Build the loader of this process's share of the validation set; it gives one image at a time."""
    dataset = build_dataset(experiment.dataset, experiment.data_root, False, max(experiment.scale))
    views = EvalViews(dataset, experiment.scale, ratios)
    sampler = EvalSampler(len(views), world_size=processes.world_size, rank=processes.rank)
    return DataLoader(views, batch_size=None, sampler=sampler, **loader_options(args, processes.device))


def build_task(args: argparse.Namespace, experiment: Experiment, processes: Processes, is_new: bool) -> Task:
    """Build the data and the network of an experiment; in a new run, with the weights that it starts from."""
    check_batch(experiment, processes)
    train_loader = build_train_loader(args, experiment, processes)
    eval_loader = build_eval_loader(args, experiment, processes)
    classes = eval_loader.dataset.dataset.classes
    model = build_segmentor(experiment, len(classes), is_new and not args.finetune)
    if args.finetune and is_new:
        logger.info("%s", load_segmentor(model, args.finetune, finetune=True))

    def evaluate_model(model: Segmentor) -> dict[str, float]:
        matrix = evaluate(
            model,
            eval_loader,
            processes.device,
            len(classes),
            amp_dtype=choose_amp(args.amp, processes.device),
            **inference_options(experiment),
        )
        figures = matrix.summary()
        logger.info("%s\n%s", matrix.table(classes), describe(figures))
        return {f"test_{name}": value for name, value in figures.items()}

    return Task(
        model=model,
        train_loader=train_loader,
        sampler=train_loader.sampler,
        epochs=experiment.iterations // experiment.eval_interval,
        schedule=build_schedule(experiment),
        evaluate=evaluate_model,
        best_figure="test_mIoU",
        same=("backbone", "head", "dataset", "eval_interval"),
    )


def check_batch(experiment: Experiment, processes: Processes) -> None:
    """Refuse single images where a BatchNorm sees nothing else of a map pooled to one pixel."""
    synchronised = processes.world_size > 1 and processes.device.type == "cuda"
    one_pixel = experiment.head == "upernet" or experiment.crop_size < 2 * MIN_INPUT_SIZE
    if one_pixel and process_batch(experiment, processes) == 1 and not synchronised:
        raise UserError(
            f"batch_size={experiment.batch_size}, global_batch={experiment.global_batch}: the BatchNorms of the head "
            "need two images of each process or more; raise them with --cfg-options, or start fewer processes"
        )


def build_schedule(experiment: Experiment) -> Callable[[torch.optim.Optimizer], PolySchedule]:
    """Return what builds the schedule of an optimizer."""
    return partial(
        PolySchedule,
        iterations=experiment.iterations,
        power=experiment.power,
        min_lr=experiment.min_lr,
        warmup_iterations=experiment.warmup_iterations,
        warmup_ratio=experiment.warmup_ratio,
    )


def inference_options(experiment: Experiment) -> dict:
    """Return how an experiment sees an image: whole, or through windows."""
    return {"window": experiment.window, "stride": experiment.stride} if experiment.window else {}


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; see `command_line.run_script` for how it ends."""
    parser = get_train_parser(__doc__)
    args = parser.parse_args(argv)
    run_script(parser.prog, partial(run_training, build_task=build_task, kind=Experiment), args, kept=True)


if __name__ == "__main__":
    main()
