"""A training run of any task: start, resuming, epochs and checkpoints."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import models
from core.checkpoint import REQUIRED_KEYS, TrainState, check_format
from core.description import Description, check_same_classes, saved_options
from core.distributed import get_rank, get_world_size, on_main
from core.run_folder import RunFolder
from core.signals import signals_noted
from utils import UserError, require_package, save_checkpoint

logger = logging.getLogger("twins")

# Options whose change on a resume is not logged.
# fmt: off
FREE_OPTIONS = {
    "resume", "auto_resume", "finetune", "pretrained", "output_dir", "save_every", "keep",
    "num_workers", "loader_timeout", "pin_mem", "print_freq", "dist_url", "local_rank", "traceback",
    "config", "cfg_options", "data_root", "recipe", "tensorboard",
}
# fmt: on


class Run:
    """A training run: its folder, its checkpoints, its epochs, and its graceful shutdown.

        with Run(options) as run:
            state = ...  # initial weights only if `run.is_new`; `resume` replaces them otherwise
            run.resume(state, description, same=("model", "opt"))
            for epoch in run.epochs(300, {"test_acc1": "checkpoint_best.pth"}):
                train_stats = train_one_epoch(..., state, settings, run)
                run.finish_epoch(train_stats, test_stats)

    Inside the block a signal to stop does not end the process: `train_one_epoch` finishes its step, saves a checkpoint
    and raises `Interrupted`. All processes must make the same calls.

    Args:
        options: All options of this start, which are saved in checkpoints. The run itself reads `output_dir` (None to
            save nothing), `keep`, `resume`, `auto_resume`, `seed`, `on_nonfinite` and `tensorboard`.

    Raises:
        UserError: On entering the block, if the folder cannot be used or holds another run, or TensorBoard is missing.
    """

    def __init__(self, options: dict[str, Any]):
        self.options = options
        self.folder = RunFolder(options["output_dir"], options["keep"]) if options["output_dir"] else None
        self.checkpoint: Path | None = None  # to resume from
        self.state: TrainState | None = None
        self.description: Description | None = None
        self.boards: dict[str, Any] = {}  # TensorBoard's writers of "steps" and "epochs", on the main process
        self.best_files: Mapping[str, str] = {}
        self.total_epochs = self.first_epoch = self.first_step = 0
        self.start = 0.0  # start of this session, time.perf_counter() in seconds

    def __enter__(self) -> "Run":
        if self.options["tensorboard"]:
            on_main(lambda: require_package("tensorboard", "--tensorboard"))
        with ExitStack() as stack:
            stack.enter_context(signals_noted())
            if self.folder:
                stack.enter_context(self.folder)
            self.checkpoint = self._find_checkpoint()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self.stack.__exit__(*error)

    @property
    def is_new(self) -> bool:
        """True if there is no checkpoint to resume from."""
        return self.checkpoint is None

    def _find_checkpoint(self) -> Path | None:
        """Return the checkpoint to resume from; None for a new run, which must not overwrite another one."""
        resumed = Path(self.options["resume"]) if self.options["resume"] else None
        if self.folder is None:
            return resumed
        if self.options["auto_resume"]:
            return on_main(self.folder.find_checkpoint) or resumed
        if not resumed or resumed.resolve().parent != self.folder.path.resolve():
            on_main(self.folder.refuse_results)
        return resumed

    def resume(self, state: TrainState, description: Description, same: Sequence[str]) -> None:
        """Restore the state from the checkpoint, if there is one. Log what differs from an exact resume.

        Checkpoints hold the description of the network. The options named by `same` must not change.

        Raises:
            UserError: If the file is not a checkpoint of a run, or does not fit.
        """
        self.state, self.description = state, description
        if self.checkpoint is None:
            return
        path, content = self.checkpoint, models.read_file(self.checkpoint)
        self._check(content, same)
        models.load_state_dict(state.model, content["model"], source=str(path))
        if state.model_ema is not None:
            models.load_state_dict(state.model_ema.module, content["model_ema"], source=str(path))
        try:
            inexact = state.load_training(content, self.options["seed"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        place = f" and {state.position} images of the next" if state.position else ""
        logger.info("resumed %s: %d epochs%s are done", path, state.epoch, place)
        for difference in inexact:
            logger.info("not an exact resume: %s", difference)
        before = saved_options(content)
        changed = {name for name, value in self.options.items() if before.get(name, value) != value}
        for name in sorted(changed - FREE_OPTIONS):
            logger.info("option changed: %s from %s to %s", name, before[name], self.options[name])

    def _check(self, content: dict[str, Any], same: Sequence[str]) -> None:
        """Reject a checkpoint that does not belong to this run."""
        path = self.checkpoint
        check_format(path, content)
        if not set(content) >= REQUIRED_KEYS:
            raise UserError(
                f"{path}: contains weights but no training state to resume; evaluate them, or start a run with "
                "--finetune"
            )
        has_ema = content["model_ema"] is not None
        if has_ema and self.state.model_ema is None:
            raise UserError(f"{path}: its run had a moving average (EMA); add --model-ema")
        if not has_ema and self.state.model_ema is not None:
            raise UserError(f"{path}: its run had no moving average (EMA); omit --model-ema")
        for name in same:
            if name not in content["args"]:
                raise UserError(f"{path}: is a checkpoint of another task, which has no option {name}")
            if content["args"][name] != self.options[name]:
                raise UserError(
                    f"{path}: its run used {name} {content['args'][name]}; use the same, not {self.options[name]}"
                )
        check_same_classes(path, content.get("description", {}).get("classes", ()), self.description.classes)

    def epochs(self, total: int, best_files: Mapping[str, str]) -> Iterator[int]:
        """Iterate over the remaining epochs of `total`. `finish_epoch` ends each of them.

        `best_files` holds names of metrics, and for each one the file of the checkpoint with its highest value.
        """
        state = self.state
        self.total_epochs, self.best_files = total, best_files
        self.first_epoch, self.first_step, self.start = state.epoch, state.meter.step, time.perf_counter()
        if self.folder:
            on_main(self._write_start)
        else:
            logger.info("note: nothing is saved; pass --output_dir to save checkpoints and the log")
        while state.epoch < total:
            yield state.epoch
        self._log_summary()

    def finish_epoch(self, train_stats: dict[str, float], test_stats: dict[str, float]) -> None:
        """Add an epoch to the log, save the checkpoint and, if the epoch is the best, the best checkpoints.

        The results of `train_one_epoch` are logged as `train_*`, those of the evaluation by the names that they have.
        """
        state = self.state
        line = {f"train_{name}": value for name, value in train_stats.items()} | test_stats
        if self.options["on_nonfinite"] == "skip" or state.meter.skipped:  # also by the gradient scaler of fp16
            line["train_skipped"] = state.meter.skipped
        state.history.append({**line, "epoch": state.epoch, "n_parameters": state.n_parameters})
        self._add_scalars("epochs", line, state.epoch)
        state.lr_scheduler.step(state.epoch)
        state.epoch += 1
        state.meter.start_epoch()
        better = [name for name in self.best_files if name in line and line[name] > state.best.get(name, -1)]
        state.best |= {name: line[name] for name in better}
        self.save([self.best_files[name] for name in better])
        if self.folder:
            on_main(lambda: self.folder.write_log(state.history))

    def log_step(self, place: dict[str, int], values: dict[str, float]) -> None:
        """Append the place of a log line in the run, and its values, to metrics.jsonl and TensorBoard's files."""
        if self.folder and get_rank() == 0:
            self.folder.add_metrics(place | values)
        self._add_scalars("steps", values, place["global_step"])

    def _add_scalars(self, unit: str, values: dict[str, float], place: int) -> None:
        """Add values to TensorBoard's files of `"steps"` or `"epochs"`, if they are written."""
        if self.boards:
            for name, value in values.items():
                self.boards[unit].add_scalar(name, value, place)

    def save(self, best: Sequence[str] = ()) -> None:
        """Save the checkpoint, also under the names of best checkpoints. All processes must call it."""
        if self.folder is None:
            return
        content = self.state.to_checkpoint(self.options, self.description.to_checkpoint())

        def write() -> None:
            for name in best:  # the best first: after a kill between the two, the resumed run repeats the evaluation
                save_checkpoint(content, self.folder.path / name)
            for board in self.boards.values():
                board.flush()
            self.folder.save(content)

        on_main(write)

    def remaining_time(self, steps: int) -> timedelta:
        """Return the remaining time for epochs of `steps` steps, from this session's mean time with evaluations."""
        state = self.state
        done = (state.epoch - self.first_epoch) * steps + state.meter.step - self.first_step
        left = (self.total_epochs - state.epoch) * steps - state.meter.step
        return timedelta(seconds=int((time.perf_counter() - self.start) / max(done, 1) * left))

    def _write_start(self) -> None:
        """Write args.json, and bring the logs to the checkpoint's place, as the last session may have been killed."""
        state = self.state
        self.folder.write_args(self.options)
        self.folder.write_log(state.history)
        self.folder.cut_metrics(state.epoch, state.meter.step, self.checkpoint)
        if self.options["tensorboard"]:
            from torch.utils.tensorboard import SummaryWriter  # needs an optional package

            # TensorBoard drops what an earlier session wrote from this place on. Steps and epochs have folders of their
            # own, because each counts the place in another unit.
            step = state.epoch * state.sampler.steps + state.meter.step
            for unit, place in {"steps": step + 1, "epochs": state.epoch}.items():
                writer = SummaryWriter(str(self.folder.path / "tensorboard" / unit), purge_step=place)
                self.boards[unit] = self.stack.enter_context(writer)

    def _log_summary(self) -> None:
        epochs = self.state.epoch - self.first_epoch
        if not epochs:
            logger.info("this run is complete; raise the number of epochs to continue")
        factor = 1 if self.description.task == "classification" else 100  # dense figures are from 0 to 1
        best = ", ".join(f"{name} {factor * value:.3f} %" for name, value in self.state.best.items())
        took = timedelta(seconds=int(time.perf_counter() - self.start))
        logger.info("finished: %d epochs, %d in this session, %s; best %s", self.state.epoch, epochs, took, best)


def choose_accumulation(batch_size: int, global_batch: int, world_size: int) -> int:
    """Return the number of batches per process and step (gradient accumulation); a UserError if it is not whole."""
    per_batch = batch_size * world_size
    if global_batch % per_batch:
        nearest = max(1, round(global_batch / per_batch)) * per_batch
        raise UserError(
            f"global batch {global_batch} is not a multiple of {per_batch} ({batch_size} images x {world_size} "
            f"processes); choose {nearest}, or change the batch size per process or the number of processes"
        )
    return global_batch // per_batch


def describe_batch(batch_size: int, accumulation: int, lr: str, steps: int) -> str:
    """Return a log line with the batch sizes, a description of the peak learning rate, and the steps per epoch."""
    processes = get_world_size()
    return (
        f"batch: {batch_size} images x {processes} processes x {accumulation} accumulated = global batch "
        f"{batch_size * processes * accumulation}; lr {lr}; {steps} steps per epoch"
    )
