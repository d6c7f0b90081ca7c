"""The parsers of the dense tasks' scripts, and their training run."""

import argparse
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from core.checkpoint import TrainState
from core.distributed import Processes, parallelise, synchronise_norms
from core.options import (
    ArgumentParser,
    add_compute_options,
    add_loader_options,
    add_process_options,
    add_training_options,
    choose_amp,
    compile_if_asked,
    train_settings,
)
from core.run import Run, choose_accumulation, describe_batch
from core.run_folder import BEST_CHECKPOINT
from dense.experiments import load_experiment
from dense.networks import HUB
from dense.optimisation import parameter_groups
from engine import train_one_epoch
from samplers import EpochSampler
from utils import UserError, seed_everything

logger = logging.getLogger("twins")


# -------------------------------------------------------------------------------------------------------- scripts


def get_train_parser(description: str) -> ArgumentParser:
    """Return the parser of a train.py."""
    parser = ArgumentParser(prog="train.py", usage="bash dist_train.sh CONFIG GPUS [options]", description=description)
    parser.add_argument("config", metavar="CONFIG", help="an experiment of configs/")
    _add_experiment_options(parser)
    group = add_training_options(parser, kept="by default in work_dirs/NAME_OF_CONFIG")
    group.add_argument(
        "--pretrained",
        nargs="?",
        const=HUB,
        metavar="FILE",
        help="ImageNet weights of the backbone; without a file the published ones on timm's hub",
    )
    group.add_argument(
        "--finetune",
        metavar="FILE",
        help="start from these weights of the whole network; heads for other classes are made anew",
    )
    group.add_argument("--grad-checkpointing", action="store_true", help="less memory for about a third more time")
    add_compute_options(group, amp="off")
    add_process_options(parser)
    return parser


def get_test_parser(description: str) -> ArgumentParser:
    """Return the parser of a test.py, less the options of the task."""
    parser = ArgumentParser(
        prog="test.py", usage="bash dist_test.sh CONFIG CHECKPOINT GPUS [options]", description=description
    )
    parser.add_argument("config", metavar="CONFIG", help="an experiment of configs/")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="weights of the network: ours or the published ones")
    _add_experiment_options(parser)
    add_compute_options(parser.add_argument_group("run"), amp="off")
    add_process_options(parser)
    return parser


def _add_experiment_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("experiment")
    group.add_argument("--data-root", metavar="FOLDER", help="where the data set is")
    group.add_argument(
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="fields of the experiment to change; configs/recipes.py has them all",
    )
    add_loader_options(group, num_workers=4)


def build_experiment(args: argparse.Namespace, kind: type) -> Any:
    """Return the experiment, of the class of a task, that the options ask for."""
    experiment = load_experiment(args.config, args.cfg_options, kind)
    if args.data_root and experiment.dataset == "shapes":
        raise UserError(
            f"--data-root {args.data_root}: shapes are drawn, not read; for your own data set choose another data set "
            "with --cfg-options dataset=..."
        )
    shortcuts = {name: getattr(args, name, None) for name in ("data_root", "pretrained")}
    return dataclasses.replace(experiment, **{name: value for name, value in shortcuts.items() if value is not None})


@dataclasses.dataclass(frozen=True)
class Task:
    """What segmentation or detection brings to its training.

    Attributes:
        model: The network, with the weights to start from; called with a batch, it returns its losses.
        train_loader: Of this process.
        sampler: That of the loader.
        epochs: Of the whole run.
        schedule: Builds the schedule of an optimizer.
        evaluate: Returns the figures of a network on the validation set. All processes call it together.
        best_figure: The one of them that tells the best epoch.
        same: Fields of the experiment that may not change in a run.
    """

    model: nn.Module
    train_loader: DataLoader
    sampler: EpochSampler
    epochs: int
    schedule: Callable[[torch.optim.Optimizer], Scheduler]
    evaluate: Callable[[nn.Module], dict[str, float]]
    best_figure: str
    same: tuple[str, ...]


def run_training(
    args: argparse.Namespace,
    processes: Processes,
    build_task: Callable[[argparse.Namespace, Any, Processes, bool], Task],
    kind: type,
) -> None:
    """Train an experiment, evaluating after each epoch and keeping the newest and the best checkpoints.

    Args:
        args: Options of `get_train_parser`.
        processes: The processes of the run.
        build_task: `(args, experiment, processes, is_new)`; only a new run needs weights to start from.
        kind: Class of the task's experiments.
    """
    if sum(option is not None for option in (args.pretrained, args.finetune, args.resume)) > 1:
        raise UserError("--pretrained, --finetune and --resume each give the first weights; choose one of them")
    experiment = build_experiment(args, kind)
    args.output_dir = args.output_dir or f"work_dirs/{Path(args.config).stem}"
    with Run({**vars(args), **dataclasses.asdict(experiment)}) as run:
        device = processes.device
        batch_size = process_batch(experiment, processes)
        accumulation = choose_accumulation(batch_size, experiment.global_batch, processes.world_size)
        settings = train_settings(args, device, accumulation)
        seed_everything(args.seed)  # the same weights on every process
        task = build_task(args, experiment, processes, run.is_new)
        model = synchronise_norms(task.model, processes).to(device, memory_format=torch.channels_last)
        if args.grad_checkpointing:
            model.backbone.set_grad_checkpointing()
        state = build_state(args, experiment, model, task.schedule, task.sampler, device)
        seed_everything(args.seed + processes.rank)  # but other drop path and dropout on each
        run.resume(state, task.same)
        compile_if_asked(model, args.compile)
        parallel_model = parallelise(model, processes)
        logger.info("%s: %d parameters on %s", Path(args.config).stem, state.n_parameters, device)
        logger.info("%s", describe_batch(batch_size, accumulation, f"{experiment.lr:g}", state.sampler.steps))
        for epoch in run.epochs(task.epochs, {task.best_figure: BEST_CHECKPOINT}):
            state.sampler.set_epoch(epoch, state.meter.step)
            train_stats = train_one_epoch(parallel_model, compute_losses, task.train_loader, state, settings, run)
            run.finish_epoch(train_stats, task.evaluate(model))


def compute_losses(model: nn.Module, batch: tuple) -> dict[str, Tensor]:
    """Return the losses of a batch; the networks of both tasks compute them where they are given targets."""
    return model(*batch)


def process_batch(experiment: Any, processes: Processes) -> int:
    """Return the images of one process and batch: those of the experiment, or fewer where many share a step."""
    return min(experiment.batch_size, max(1, experiment.global_batch // processes.world_size))


def describe(figures: dict[str, float]) -> str:
    """Return the figures of an evaluation in percent, as a line of text; `-` for those below 0, which do not exist."""
    return "  ".join(f"{name} {100 * value:.2f}" if value >= 0 else f"{name} -" for name, value in figures.items())


def build_state(
    args: argparse.Namespace,
    experiment: Any,
    model: nn.Module,
    schedule: Callable[[torch.optim.Optimizer], Scheduler],
    sampler: EpochSampler,
    device: torch.device,
) -> TrainState:
    """Build what a run changes as it goes: AdamW, the schedule and the scaler of fp16."""
    groups = parameter_groups(model, experiment.weight_decay, experiment.not_decayed)
    optimizer = torch.optim.AdamW(groups, lr=experiment.lr, betas=(0.9, 0.999))
    return TrainState(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule(optimizer),
        scaler=torch.amp.GradScaler(device.type, enabled=choose_amp(args.amp, device) == torch.float16),
        sampler=sampler,
    )
