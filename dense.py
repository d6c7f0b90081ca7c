"""What segmentation and detection share: experiment files, backbones, AdamW, schedules by iteration, a training run.

An experiment file is a Python file whose `config` is a frozen dataclass: all that a published result depends on.
`--cfg-options key=value` changes single fields of it.
"""

import argparse
import ast
import dataclasses
import logging
import math
import os
import re
import runpy
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import DataLoader

import models
import utils
from checkpoints import BEST_CHECKPOINT, RunFolder, TrainState
from command_line import (
    ArgumentParser,
    add_compute_options,
    add_loader_options,
    add_process_options,
    add_training_options,
    choose_amp,
    engine_options,
    nearest,
    one_line,
)
from engine import train_one_epoch
from models.twins import MIN_INPUT_SIZE
from runs import choose_accumulation, choose_checkpoint, compile_if_asked, describe_batch, resume, run_epochs
from samplers import EpochSampler
from utils import Processes, UserError

logger = logging.getLogger("twins")

E = TypeVar("E")

HUB = "hub"  # in place of a file of ImageNet weights: the published ones on timm's hub


# ---------------------------------------------------------------------------------------------------- experiments


def load_experiment(path: str | Path, changes: Sequence[str] = (), kind: type | None = None) -> Any:
    """Load the experiment of a file and change single fields of it.

    Args:
        path: A Python file that defines `config`; it is executed.
        changes: `key=value` each, with the value as in Python; quotes around text may be left out.
        kind: Class that the experiment must have; None for any.

    Raises:
        UserError: If there is no experiment in the file, or no such field, or a value is of another type.
    """
    if not os.path.isfile(path):
        folder = Path(path).parent
        others = sorted(file.name for file in folder.glob("*_*.py")) if os.path.isdir(folder) else []
        raise UserError(f"{path}: there is no such config{nearest(Path(path).name, others)}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # the file may do anything
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown:
            raise UserError(f"{path}: there is no such key: {unknown[1]}") from error
        if isinstance(error, SyntaxError) or traceback.extract_tb(error.__traceback__)[-1].filename == str(path):
            raise UserError(f"{path}: {type(error).__name__}: {one_line(error)}") from error
        raise  # not in the file itself: an internal error
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UserError(f"{path}: defines no experiment; it should end with config = one of the recipes")
    if kind is not None and not isinstance(config, kind):
        raise UserError(
            f"{path}: is an experiment of another task; choose one of {kind.__module__.split('.')[0]}/configs"
        )
    return change_fields(config, changes)


def change_fields(config: E, changes: Sequence[str]) -> E:
    """Return a dataclass with fields changed by texts `key=value`; see `load_experiment`."""
    hints = typing.get_type_hints(type(config))
    values = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"--cfg-options {change!r} is no key=value")
        if key not in hints:
            raise UserError(f"--cfg-options {key}: there is no such key{nearest(key, hints)}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if hints[key] is str and not isinstance(value, str):
            value = text  # a name that reads like a number
        values[key] = _as_type(value, hints[key])
        if values[key] is NotImplemented:
            raise UserError(f"--cfg-options {key}: {text!r} is not of type {_type_name(hints[key])}")
    return dataclasses.replace(config, **values)


def check_types(experiment: Any) -> None:
    """Check that each field of a dataclass has a value of its declared type; ints pass as floats, lists as tuples.

    Raises:
        UserError: If one has not; its name, value and type are given.
    """
    for name, hint in typing.get_type_hints(type(experiment)).items():
        value = getattr(experiment, name)
        if _as_type(value, hint) is NotImplemented:
            raise UserError(f"{name}={value!r} is not of type {_type_name(hint)}")


def check_fields(
    experiment: Any, choices: dict[str, Sequence[str]], above_zero: Sequence[str], not_below_zero: Sequence[str]
):
    """Check the types of the fields of an experiment, and the values that both tasks' experiments limit.

    Args:
        experiment: A dataclass.
        choices: Fields to the values that they may have.
        above_zero: Fields that must be greater than 0.
        not_below_zero: Fields that must be at least 0.

    Raises:
        UserError: If a field has another value; its name and value are given.
    """
    check_types(experiment)
    for name, known in choices.items():
        if getattr(experiment, name) not in known:
            raise UserError(f"{name}={getattr(experiment, name)!r} is unknown; it is {', '.join(known)}")
    for name in above_zero:
        if getattr(experiment, name) <= 0:
            raise UserError(f"{name}={getattr(experiment, name)} is not above 0")
    for name in not_below_zero:
        if getattr(experiment, name) < 0:
            raise UserError(f"{name}={getattr(experiment, name)} is below 0")
    if not 0 <= experiment.drop_path < 1:
        raise UserError(f"drop_path={experiment.drop_path} is not between 0 and 1")
    if min(experiment.scale) < MIN_INPUT_SIZE:
        raise UserError(f"scale={experiment.scale}: sides of {MIN_INPUT_SIZE} pixels are the least")


def _as_type(value: Any, hint: Any) -> Any:
    """Return a value as the type that a field has, `NotImplemented` where it is of another."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            return NotImplemented
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        items = [_as_type(item, kind) for item, kind in zip(value, kinds, strict=False)]
        return NotImplemented if len(value) != len(kinds) or NotImplemented in items else tuple(items)
    if hint is float and type(value) in (int, float):
        return float(value) if abs(value) < math.inf else NotImplemented
    return value if type(value) is hint else NotImplemented


def _type_name(hint: Any) -> str:
    return str(hint) if typing.get_args(hint) else hint.__name__


# ------------------------------------------------------------------------------------------------------- networks


def build_backbone(name: str, pretrained: str, **kwargs) -> nn.Module:
    """Build a Twins model without its classifier, with ImageNet weights.

    Args:
        name: Of a model of `models/twins.py`. Those of Twins-SVT get the norms between stages that the original's
            dense networks have.
        pretrained: A file of weights, `"hub"` for the published ones, or nothing to start from random ones.
        **kwargs: Passed on to the model.

    Raises:
        UserError: If there is no such model, or the weights cannot be had or do not fit.
    """
    ours = models.list_models()
    if name not in ours:
        raise UserError(f"backbone {name!r} is unknown{nearest(name, ours) or '; known are ' + ', '.join(ours)}")
    backbone = timm.create_model(name, stage_norm=name.startswith("alt_gvt"), **kwargs)
    backbone.prune_intermediate_layers(len(backbone.blocks), prune_norm=True)
    if pretrained:
        state = _fetch_weights(name) if pretrained == HUB else models.read_weights(pretrained)
        logger.info("backbone from %s", models.load_backbone(backbone, state, source=pretrained))
    return backbone


def _fetch_weights(name: str) -> dict[str, torch.Tensor]:
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # timm and the hub raise many kinds of errors
        raise UserError(
            f"the published ImageNet weights of {name} cannot be loaded ({type(error).__name__}: {one_line(error)}); "
            "without a network, download the file elsewhere and pass --pretrained FILE, or start from random weights "
            'with --pretrained ""'
        ) from error


def synchronise_norms(model: nn.Module, processes: Processes) -> nn.Module:
    """Have BatchNorms see the batches of all processes, where there are several with GPUs."""
    if processes.world_size > 1 and processes.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


# --------------------------------------------------------------------------------------------------- optimisation


def parameter_groups(model: nn.Module, weight_decay: float, not_decayed: Sequence[str]) -> list[dict[str, Any]]:
    """Return the parameters as groups for an optimizer.

    Args:
        model: The network.
        weight_decay: Of the first group.
        not_decayed: Parts of the names of those parameters that are not decayed, the second group.
    """
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[any(part in name for part in not_decayed)]["params"].append(parameter)
    return [group for group in groups if group["params"]]


class IterationSchedule(Scheduler):
    """A schedule by iteration with a linear warm-up, which multiplies what is scheduled; timm's adds up.

    Args:
        optimizer: Its learning rates are the base of the schedule.
        warmup_iterations: Length of the warm-up.
        warmup_ratio: Share of the scheduled rate at iteration 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup_iterations: int = 0, warmup_ratio: float = 1.0):
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.warmup_iterations = warmup_iterations
        self.warmup_ratio = warmup_ratio

    def scheduled(self, iteration: int, base: float) -> float:
        """Return the learning rate of an iteration, counted from 0, but for the warm-up."""
        raise NotImplementedError

    def _get_lr(self, t: int) -> list[float]:
        done = min(1.0, t / self.warmup_iterations) if self.warmup_iterations else 1.0
        warmth = 1 - (1 - done) * (1 - self.warmup_ratio)
        return [warmth * self.scheduled(t, base) for base in self.base_values]


class PolySchedule(IterationSchedule):
    """Falls from the base to `min_lr` as a power of the share of the iterations that is left."""

    def __init__(self, optimizer, iterations: int, power: float, min_lr: float, **warmup):
        super().__init__(optimizer, **warmup)
        self.iterations = iterations
        self.power = power
        self.min_lr = min_lr

    def scheduled(self, iteration: int, base: float) -> float:
        return (base - self.min_lr) * (1 - iteration / self.iterations) ** self.power + self.min_lr


class StepSchedule(IterationSchedule):
    """Falls to a tenth at each of the milestones, in iterations."""

    def __init__(self, optimizer, milestones: Sequence[int], **warmup):
        super().__init__(optimizer, **warmup)
        self.milestones = list(milestones)

    def scheduled(self, iteration: int, base: float) -> float:
        return base * 0.1 ** sum(iteration >= milestone for milestone in self.milestones)


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
class Training:
    """What a task brings to its training.

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
    build_training: Callable[[argparse.Namespace, Any, Processes, bool], Training],
    kind: type,
) -> None:
    """Train an experiment, evaluating after each epoch and keeping the newest and the best checkpoints.

    Args:
        args: Options of `get_train_parser`.
        processes: Those of the run.
        build_training: `(args, experiment, processes, new)`; only a new run needs weights to start from.
        kind: Class of the task's experiments.
    """
    if sum(option is not None for option in (args.pretrained, args.finetune, args.resume)) > 1:
        raise UserError("--pretrained, --finetune and --resume each give the first weights; choose one of them")
    experiment = build_experiment(args, kind)
    folder = RunFolder(args.output_dir or f"work_dirs/{Path(args.config).stem}", args.keep)
    options = {**vars(args), **dataclasses.asdict(experiment)}
    device = processes.device
    with utils.signals_noted(), folder:
        checkpoint = choose_checkpoint(folder, args.resume, args.auto_resume)
        batch_size = process_batch(experiment, processes)
        accumulation = choose_accumulation(batch_size, experiment.global_batch, processes.world_size)
        utils.seed_everything(args.seed)  # the same weights on every process
        training = build_training(args, experiment, processes, not checkpoint)
        model = synchronise_norms(training.model, processes).to(device, memory_format=torch.channels_last)
        if args.grad_checkpointing:
            model.backbone.set_grad_checkpointing()
        state = build_state(args, experiment, model, training.schedule, training.sampler, device)
        utils.seed_everything(args.seed + processes.rank)  # but drop path and dropout of its own on each
        if checkpoint:
            resume(state, checkpoint, options, same=training.same)
        compile_if_asked(model, args.compile)
        parallel_model = utils.parallelise(model, processes)
        steps = len(training.train_loader) // accumulation
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        logger.info("%s: %d parameters on %s", Path(args.config).stem, n_parameters, device)
        logger.info("%s", describe_batch(batch_size, accumulation, f"{experiment.lr:g}", steps))

        def train(epoch: int, save: Callable[[], None] | None) -> dict[str, float]:
            state.sampler.set_epoch(epoch, state.meter.step)
            return train_one_epoch(
                parallel_model,
                lambda model, batch: model(*batch),
                training.train_loader,
                state.optimizer,
                device,
                epoch,
                scaler=state.scaler,
                accumulation=accumulation,
                lr_scheduler=state.lr_scheduler,
                meter=state.meter,
                save=save,
                **engine_options(args, device),
            )

        run_epochs(
            state,
            train,
            lambda: training.evaluate(model),
            epochs=training.epochs,
            folder=folder,
            args=options,
            best_files={training.best_figure: BEST_CHECKPOINT},
            count_skipped=args.on_nonfinite == "skip",
        )


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
