"""A training run of any task: where it starts or goes on from, its epochs, and what is kept of them."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn

import models
import utils
from checkpoints import CHECKPOINT_KEYS, FORMAT, RunFolder, TrainState
from utils import UserError

logger = logging.getLogger("twins")

# Options that may change from one start of a run to the next without a word.
NOT_OF_THE_RUN = {
    *("resume", "auto_resume", "finetune", "pretrained", "output_dir", "save_every", "keep"),
    *("num_workers", "loader_timeout", "pin_mem", "print_freq", "dist_url", "local_rank", "traceback"),
    *("config", "cfg_options", "data_root"),
}


def choose_checkpoint(folder: RunFolder | None, resume: str | None, auto_resume: bool) -> Path | None:
    """Return the checkpoint to continue from, None for a new run.

    Args:
        folder: Where the run keeps its checkpoints, None for nowhere.
        resume: A file named by the user.
        auto_resume: Prefer the newest checkpoint of the folder.

    Raises:
        UserError: If the folder holds another run, which this one would write over.
    """
    resumed = Path(resume) if resume else None
    if folder is None:
        return resumed
    if auto_resume:
        return utils.on_main(folder.find_checkpoint) or resumed
    if not resumed or resumed.resolve().parent != folder.path.resolve():
        utils.on_main(folder.refuse_results)
    return resumed


def choose_accumulation(batch_size: int, global_batch: int, world_size: int) -> int:
    """Return how many batches of each process make one step.

    Raises:
        UserError: If the global batch is no multiple of what all processes take in one batch.
    """
    per_batch = batch_size * world_size
    if global_batch % per_batch:
        nearest = max(1, round(global_batch / per_batch)) * per_batch
        raise UserError(
            f"global batch {global_batch} is no multiple of {per_batch} ({batch_size} images x {world_size} "
            f"processes); {nearest} is, or change the batch of a process or their number"
        )
    return global_batch // per_batch


def describe_batch(batch_size: int, accumulation: int, lr: str, steps: int) -> str:
    """Return the arithmetic of a batch in words; `steps` are those of an epoch."""
    processes = utils.get_world_size()
    return (
        f"batch: {batch_size} images x {processes} processes x {accumulation} accumulated = global batch "
        f"{batch_size * processes * accumulation}; lr {lr}; {steps} steps per epoch"
    )


def compile_if_asked(model: nn.Module, asked: bool) -> None:
    """Compile a model in place, so that the names of its parameters stay."""
    if asked:
        logger.info("the model is compiled in its first steps, which can take minutes")
        model.compile()


def resume(state: TrainState, path: Path, args: Mapping[str, Any], same: Sequence[str]) -> None:
    """Restore a run from its checkpoint, so that it goes on as if it had never stopped; say what differs.

    Args:
        state: That of the run, newly built.
        path: The checkpoint.
        args: What this start of the run was asked for, with the `seed`.
        same: Names of those that must be as they were.

    Raises:
        UserError: If the file holds no run, or one that does not fit.
    """
    checkpoint = models.read_file(path)
    if checkpoint.get("format", 1) not in range(FORMAT + 1):
        raise UserError(
            f"{path}: has format {checkpoint['format']}, and this code reads formats up to {FORMAT}; continue the run "
            "with the code that wrote it, or with a newer version of this one"
        )
    if not set(checkpoint) >= CHECKPOINT_KEYS:
        raise UserError(
            f"{path}: holds weights but no state of a training run of ours to continue; "
            "evaluate them, or start a run from them with --finetune"
        )
    averaged = checkpoint["model_ema"] is not None
    if averaged != (state.model_ema is not None):
        raise UserError(
            f"{path}: its run was {'with' if averaged else 'without'} a moving average (EMA); "
            f"{'add --model-ema' if averaged else 'leave --model-ema out'}"
        )
    for name in same:
        if name not in checkpoint["args"]:
            raise UserError(
                f"{path}: is a checkpoint of another task, without the option {name}; choose one of this task"
            )
        if checkpoint["args"][name] != args[name]:
            raise UserError(f"{path}: its run used {name} {checkpoint['args'][name]}; repeat that, not {args[name]}")
    models.load_state_dict(state.model, checkpoint["model"], source=str(path))
    if state.model_ema is not None:
        models.load_state_dict(state.model_ema.module, checkpoint["model_ema"], source=str(path))
    try:
        inexact = state.load_training(checkpoint, args["seed"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    place = f" and {state.position} images of the next" if state.position else ""
    logger.info("resumed %s: %d epochs%s are done", path, state.epoch, place)
    for what in inexact:
        logger.info("not an exact resume: %s", what)
    changed = {name: value for name, value in args.items() if checkpoint["args"].get(name, value) != value}
    for name in sorted(set(changed) - NOT_OF_THE_RUN):
        logger.info("changed since: %s %s, was %s", name, changed[name], checkpoint["args"][name])


def run_epochs(
    state: TrainState,
    train: Callable[..., dict[str, float]],
    evaluate: Callable[[], dict[str, float]],
    *,
    epochs: int,
    folder: RunFolder | None,
    args: dict[str, Any],
    best_files: Mapping[str, str],
    count_skipped: bool = False,
) -> None:
    """Train and evaluate for the epochs that are left, keeping the log, the newest and the best checkpoints.

    Args:
        state: Where the run is; all of it goes into the checkpoints.
        train: Trains for the rest of an epoch: `train(epoch, save=...)` with the `save` of `train_one_epoch`;
            returns what the log names `train_*`.
        evaluate: Returns the figures of the epoch just trained, under the names that the log gives them.
        epochs: Of the whole run.
        folder: Where to keep it, None for nowhere.
        args: What the run was asked for, for the checkpoints.
        best_files: Figures of `evaluate` to the file that keeps the state in which each was highest.
        count_skipped: Log the number of skipped steps.
    """
    if folder:
        utils.on_main(lambda: _start_folder(folder, args, state))
    start, first_epoch = time.perf_counter(), state.epoch
    n_parameters = sum(parameter.numel() for parameter in state.model.parameters())
    while state.epoch < epochs:
        save = (lambda: save_state(state, folder, args)) if folder else None
        line = {f"train_{name}": value for name, value in train(state.epoch, save=save).items()}
        line |= evaluate()
        if count_skipped:
            line["train_skipped"] = state.meter.skipped
        state.history.append({**line, "epoch": state.epoch, "n_parameters": n_parameters})
        state.lr_scheduler.step(state.epoch)
        state.epoch += 1
        state.meter.start_epoch()
        better = [name for name in best_files if name in line and line[name] > state.best.get(name, -1)]
        state.best |= {name: line[name] for name in better}
        if folder:
            save_state(state, folder, args, [best_files[name] for name in better])
            utils.on_main(lambda: folder.write_log(state.history))
    _report_end(state, state.epoch - first_epoch, time.perf_counter() - start)


def save_state(state: TrainState, folder: RunFolder, args: dict[str, Any], best: Sequence[str] = ()) -> None:
    """Write the checkpoint and, before it, those of the best epochs if this is one. All processes must call it."""
    checkpoint = state.to_checkpoint(args)

    def write() -> None:
        for name in best:  # the best first: a kill in between repeats the evaluation, losing nothing
            folder.save_best(checkpoint, name)
        folder.save(checkpoint)

    utils.on_main(write)


def _start_folder(folder: RunFolder, args: dict[str, Any], state: TrainState) -> None:
    """Write what the run was started with, and the log as the checkpoint has it, whenever the last run was killed."""
    folder.write_args(args)
    folder.write_log(state.history)


def _report_end(state: TrainState, epochs: int, seconds: float) -> None:
    """Print what the run came to."""
    if not epochs:
        logger.info("this run is complete; more epochs go on with it")
    best = ", ".join(f"{name} {value:.3f}" for name, value in state.best.items())
    took = timedelta(seconds=int(seconds))
    logger.info("%d epochs done, %d of them now in %s; best %s", state.epoch, epochs, took, best)
