"""The parsers of the dense tasks' scripts, and their training loop."""

import argparse
import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from core.checkpoint import TrainState
from core.description import Description, check_same_classes, find_task, read_description
from core.distributed import Processes, parallelise, synchronise_norms
from core.options import (
    ArgumentParser,
    add_compute_options,
    add_freeze_option,
    add_loader_options,
    add_process_options,
    add_training_options,
    choose_amp,
    compile_if_asked,
    train_settings,
)
from core.recipes import differences
from core.run import Run, choose_accumulation, describe_batch
from core.run_folder import BEST_CHECKPOINT
from dense.experiments import change_fields, load_experiment
from dense.networks import HUB
from dense.optimisation import IterationSchedule, build_scaler, parameter_groups
from engine import train_one_epoch
from models.cpu import accelerate
from samplers import EpochSampler
from utils import UserError, seed_everything

logger = logging.getLogger("twins")

# Fields of experiments that a test takes from the training: those that shape the network, the input and the labels.
# fmt: off
REMEMBERED_FIELDS = (
    "backbone", "channels", "neck_channels", "proposals", "window_padding", "window", "stride", "scale",
    "dataset", "val_images", "val_labels", "val_annotations", "val_split", "image_suffix", "label_suffix",
    "ignored_label",
)
# fmt: on
ON_ERRORS = (  # the end of the descriptions of the scripts
    "On bad input the script prints one line that names it and exits with a non-zero code; --traceback shows the "
    "traceback."
)


class ExperimentParser(ArgumentParser):
    """Parser of the scripts of a config, which names --cfg-options for an option that is a field of the experiment."""

    def parse_known_args(self, args=None, namespace=None):
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown and unknown[0].startswith("--") and Path(parsed.config).is_file():
            name = unknown[0][2:].partition("=")[0].replace("-", "_")
            try:
                fields = {field.name for field in dataclasses.fields(load_experiment(parsed.config))}
            except UserError:  # not a config
                fields = set()
            if name in fields:
                self.error(f"unknown argument {unknown[0]}; use --cfg-options {name}=...")
        return parsed, unknown


def get_train_parser(description: str) -> ArgumentParser:
    """Return the parser of a train.py."""
    parser = _config_parser("train", "CONFIG GPUS", description)
    group = add_training_options(parser, kept="by default in work_dirs/NAME_OF_CONFIG")
    group.add_argument(
        "--pretrained",
        nargs="?",
        const=HUB,
        metavar="FILE",
        help="ImageNet weights of the backbone; without FILE, the published ones on timm's hub",
    )
    group.add_argument(
        "--finetune",
        metavar="FILE",
        help="start from these weights of a whole network; heads for other classes are re-initialised",
    )
    add_freeze_option(group)
    group.add_argument("--grad-checkpointing", action="store_true", help="save memory, for about a third more time")
    add_compute_options(group, amp="published", tf32=True)
    add_process_options(parser)
    return parser


def get_test_parser(description: str) -> ArgumentParser:
    """Return the parser of a test.py, without the options of the task."""
    parser = _config_parser("test", "CONFIG CHECKPOINT GPUS", description)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="weights of a network, or results that --out wrote")
    add_compute_options(parser.add_argument_group("run"), amp="published")
    add_process_options(parser)
    return parser


def _config_parser(script: str, arguments: str, description: str) -> ArgumentParser:
    """Return the parser of a script with the options of an experiment."""
    usage = f"bash dist_{script}.sh {arguments} [options]"
    parser = ExperimentParser(prog=f"{script}.py", usage=usage, description=f"{description}\n{ON_ERRORS}\n")
    parser.add_argument("config", metavar="CONFIG", help="experiment file in configs/")
    group = parser.add_argument_group("experiment")
    group.add_argument("--data-root", metavar="FOLDER", help="folder of the data set")
    group.add_argument(
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="fields of the experiment to change; configs/recipes.py lists them",
    )
    add_loader_options(group, num_workers=4)
    return parser


def build_experiment(args: argparse.Namespace, kind: type) -> Any:
    """Load the experiment of the config, of the class `kind`, and change it as the options say.

    `--amp published` is replaced by the precision of the experiment, and fields that depend on others are set.
    """
    experiment = load_experiment(args.config, kind=kind)
    checkpoint = Path(getattr(args, "checkpoint", ""))  # of test.py, which also takes results: a folder or a JSON file
    if checkpoint.is_file() and checkpoint.suffix != ".json":
        experiment = as_trained(experiment, args.checkpoint, args.cfg_options)
    else:
        experiment = change_fields(experiment, args.cfg_options)
    if args.data_root and experiment.dataset == "shapes":
        raise UserError(
            f"--data-root {args.data_root}: the shapes data set is generated and has no folder; for your own data, "
            "choose another data set with --cfg-options dataset=..."
        )
    if args.amp == "published":
        on_gpu = args.device != "cpu" and torch.cuda.is_available()
        args.amp = experiment.precision if on_gpu else "off"
    shortcuts = {name: getattr(args, name, None) for name in ("data_root", "pretrained")}
    changes = {name: value for name, value in shortcuts.items() if value is not None}
    return dataclasses.replace(experiment, **changes).resolve()


def as_trained(experiment: Any, path: str, changes: Sequence[str]) -> Any:
    """Return the experiment of a test: its `REMEMBERED_FIELDS` are as in the training, unless the user changes them.

    What differs from the training, and what differs from the config without having been set by the user, is logged.
    The training is known for checkpoints of this code alone.
    """
    options = read_description(path, find_task(dataclasses.asdict(experiment))).options
    trained = {name: options[name] for name in REMEMBERED_FIELDS if name in options and hasattr(experiment, name)}
    tested = change_fields(dataclasses.replace(experiment, **trained), changes)
    given = {change.partition("=")[0] for change in changes}
    kept = {name: getattr(experiment, name) for name in trained if name not in given}
    for difference in differences(tested, trained, "checkpoint") + differences(tested, kept, "config"):
        logger.info("note: %s", difference)
    return tested


def prepare_test(
    args: argparse.Namespace, model: nn.Module, load: Callable, classes: Sequence[str], device: torch.device
) -> None:
    """Load the weights of a test by `load(model, path)`, and move the network to a device.

    Raises a UserError if the classes of the data are not those of the weights.
    """
    logger.info("%s", load(model, args.checkpoint))
    check_same_classes(args.checkpoint, read_description(args.checkpoint).classes, classes)
    accelerate(model).to(device)
    compile_if_asked(model, args.compile)


@dataclasses.dataclass(frozen=True)
class Task:
    """The parts of a training run that differ between segmentation and detection."""

    model: nn.Module  # with its first weights; called with a batch, it returns its losses
    train_loader: DataLoader  # of this process's batches
    sampler: EpochSampler  # of the loader
    epochs: int
    lr_factor: Callable[[int], float]  # from an iteration, counted from 0, to the factor of the peak learning rate
    evaluate: Callable[[nn.Module], dict[str, float]]  # to the figures on the validation set; called by all processes
    best_figure: str  # name of the figure that selects the best epoch
    same: tuple[str, ...]  # fields of the experiment that must not change when the run is resumed
    description: Description  # task and classes


def run_training(
    args: argparse.Namespace,
    processes: Processes,
    build_task: Callable[[argparse.Namespace, Any, Processes, bool], Task],
    kind: type,
) -> None:
    """Train the network of an experiment of the class `kind`; evaluate it and save checkpoints after each epoch.

    `build_task` is a function of `(args, experiment, processes, is_new)`; only a new run loads first weights.
    """
    if sum(option is not None for option in (args.pretrained, args.finetune, args.resume)) > 1:
        raise UserError("--pretrained, --finetune and --resume each set the first weights; choose one of them")
    experiment = build_experiment(args, kind)
    output_dir = args.output_dir or f"work_dirs/{Path(args.config).stem}"
    with Run(vars(args) | dataclasses.asdict(experiment) | {"output_dir": output_dir}) as run:
        device = processes.device
        batch_size = process_batch(experiment, processes)
        accumulation = choose_accumulation(batch_size, experiment.global_batch, processes.world_size)
        settings = train_settings(args, device, accumulation)
        seed_everything(args.seed)  # the same initial weights in all processes
        task = build_task(args, experiment, processes, run.is_new)
        model = synchronise_norms(accelerate(task.model), processes).to(device, memory_format=torch.channels_last)
        model.backbone.freeze_stages(args.freeze)
        if args.grad_checkpointing:
            model.backbone.set_grad_checkpointing()
        state = build_state(args, experiment, model, task, device)
        seed_everything(args.seed + processes.rank)  # different drop path and dropout in each process
        run.resume(state, task.description, task.same)
        compile_if_asked(model, args.compile)
        parallel_model = parallelise(model, processes)
        logger.info("%s: %d parameters on %s", Path(args.config).stem, state.n_parameters, device)
        logger.info("%s", describe_batch(batch_size, accumulation, f"{experiment.lr:g}", state.sampler.steps))
        log_norms(model, batch_size, experiment.global_batch, processes)
        log_warmup(experiment.warmup_iterations, task.epochs * state.sampler.steps)
        for epoch in run.epochs(task.epochs, {task.best_figure: BEST_CHECKPOINT}):
            state.sampler.set_epoch(epoch, state.meter.step)
            train_stats = train_one_epoch(parallel_model, compute_losses, task.train_loader, state, settings, run)
            run.finish_epoch(train_stats, task.evaluate(model))


def log_norms(model: nn.Module, batch_size: int, global_batch: int, processes: Processes) -> None:
    """Log a note if the BatchNorms of a model do not see all images of a step; in the published runs they did."""
    sharing = processes.norm_processes
    has_norms = any(isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) for module in model.modules())
    if has_norms and batch_size * sharing < global_batch:
        logger.info(
            f"note: BatchNorms see {batch_size * sharing} of the {global_batch} images of a step, because accumulated "
            "batches and CPU processes do not share statistics; to show them all, set "
            f"batch_size={global_batch // sharing} with {'one process' if sharing == 1 else f'{sharing} processes'} "
            "(--grad-checkpointing saves memory)"
        )


def log_warmup(length: int, iterations: int) -> None:
    """Log a warning if the warm-up takes a third of the iterations of a run or more."""
    if 3 * length >= iterations:
        logger.info(
            f"warning: the warm-up takes {length} of {iterations} iterations; shorten it with --cfg-options "
            f"warmup_iterations={iterations // 10}"
        )


def build_state(
    args: argparse.Namespace, experiment: Any, model: nn.Module, task: Task, device: torch.device
) -> TrainState:
    """Build the training state of an experiment, with AdamW, the schedule, and the gradient scaler for fp16."""
    is_fp16 = choose_amp(args.amp, device) == torch.float16
    groups = parameter_groups(model, experiment.weight_decay, experiment.not_decayed)
    fused = device.type == "cuda"  # one pass over all weights
    optimizer = torch.optim.AdamW(groups, lr=experiment.lr, betas=(0.9, 0.999), fused=fused)
    return TrainState(
        model=model,
        optimizer=optimizer,
        lr_scheduler=IterationSchedule(optimizer, task.lr_factor),
        scaler=build_scaler(device, experiment.loss_scale, is_fp16),
        sampler=task.sampler,
    )


def compute_losses(model: nn.Module, batch: tuple) -> dict[str, Tensor]:
    """Return the losses of a batch of images and targets, which the networks of both tasks compute themselves."""
    return model(*batch)


def process_batch(experiment: Any, processes: Processes) -> int:
    """Return the number of images per process per batch: `batch_size`, or less if many processes share a step."""
    return min(experiment.batch_size, max(1, experiment.global_batch // processes.world_size))


def sampling(args: argparse.Namespace, experiment: Any, processes: Processes) -> dict[str, int]:
    """Return the arguments of the sampler of a training set that both tasks share."""
    place = {"world_size": processes.world_size, "rank": processes.rank}
    return place | {"global_batch": experiment.global_batch, "seed": args.seed}


def describe(figures: dict[str, float]) -> str:
    """Return the figures of an evaluation in percent, as one line; `-` for a figure below 0, which is undefined."""
    return "  ".join(f"{name} {100 * value:.2f}" if value >= 0 else f"{name} -" for name, value in figures.items())
