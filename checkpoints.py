"""What a run leaves in its folder - checkpoints, log and lock - and how it goes on from there."""

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import re
import socket
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import utils
from samplers import EpochSampler
from utils import EpochMeter, UserError

logger = logging.getLogger("twins")

CHECKPOINT, BEST_CHECKPOINT, BEST_EMA_CHECKPOINT = "checkpoint.pth", "checkpoint_best.pth", "checkpoint_best_ema.pth"
FORMAT = 2  # of the checkpoints written here; files of format 1 have no such entry
CHECKPOINT_KEYS = {
    *("model", "model_ema", "optimizer", "scheduler", "scaler"),
    *("epoch", "position", "global_batch", "meters", "best", "history", "random_states", "args", "versions"),
}


@dataclass
class TrainState:
    """Everything that a run changes as it goes: what a checkpoint holds beside arguments and versions."""

    model: nn.Module  # bare: neither DistributedDataParallel nor anything else around it
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any  # one of timm's
    scaler: torch.amp.GradScaler
    sampler: EpochSampler  # of the training set
    model_ema: nn.Module | None = None  # timm's ModelEmaV3
    epoch: int = 0  # epochs done
    meter: EpochMeter = field(default_factory=EpochMeter)  # of the epoch under way
    best: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # the lines of log.txt

    @property
    def position(self) -> int:
        """Images of the epoch under way that all processes together have done."""
        return self.meter.step * self.sampler.global_batch

    def to_checkpoint(self, args: dict[str, Any]) -> dict[str, Any]:
        """Return a dict that loads with `weights_only=True`. All processes must call it together."""
        return {
            "model": self.model.state_dict(),
            "model_ema": self.model_ema.module.state_dict() if self.model_ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "position": self.position,
            "global_batch": self.sampler.global_batch,
            "meters": utils.gather(self.meter.state_dict()),
            "best": self.best,
            "history": self.history,
            "random_states": utils.gather(utils.get_random_state()),
            "args": args,
            "versions": utils.versions(),
            "format": FORMAT,
        }

    def load_training(self, checkpoint: dict[str, Any], seed: int) -> list[str]:
        """Restore everything but the weights, which `models.load_state_dict` loads with its checks.

        Args:
            checkpoint: What `to_checkpoint` returned.
            seed: Seed of new random numbers, where those of the checkpoint are for other processes.

        Returns:
            What could not be restored exactly, in words; nothing for the same processes and global batch.
        """
        state = {"params", "lookahead_step"}  # the others are options
        chosen = [{key: g[key] for key in g if key not in state} for g in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (KeyError, ValueError) as error:
            raise UserError(f"its optimizer does not fit these options ({error}); repeat those of its run") from error
        for group, options in zip(self.optimizer.param_groups, chosen, strict=True):
            group.update(options)  # the options of this run; with those of the old run they are the same
        if checkpoint["scaler"]:  # empty where the old run had no use for it
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint["epoch"]
        if self.epoch > 0:  # a schedule depends on the options and the epoch alone
            self.lr_scheduler.step(self.epoch - 1)
        self.best = checkpoint["best"]
        self.history = checkpoint["history"]
        return self._load_place(checkpoint) + self._load_randomness(checkpoint, seed)

    def _load_place(self, checkpoint: dict[str, Any]) -> list[str]:
        """Restore the place in the epoch and its meter."""
        meters, device = checkpoint["meters"], next(self.model.parameters()).device
        same = len(meters) == utils.get_world_size()
        self.meter.load_state_dict(meters[utils.get_rank()] if same else EpochMeter.merge(meters), device)
        before, after = checkpoint["global_batch"], self.sampler.global_batch
        step = checkpoint["position"] // before
        self.meter.step = self.sampler.nearest_step(step, before)
        if after == before:
            return []
        return [
            f"the global batch changed from {before} to {after}; epoch {self.epoch} continues after step "
            f"{self.meter.step} of {self.sampler.steps}, and was at step {step}"
        ]

    def _load_randomness(self, checkpoint: dict[str, Any], seed: int) -> list[str]:
        """Restore the random states, or start new ones for other processes."""
        states, processes, rank = checkpoint["random_states"], utils.get_world_size(), utils.get_rank()
        if len(states) == processes:
            utils.set_random_state(states[rank])
            return []
        place = np.random.SeedSequence((seed, self.epoch, self.position, rank))
        utils.seed_everything(int(place.generate_state(1)[0]))
        return [f"{processes} process(es), not {len(states)}, so mixup, drop path and dropout draw other numbers"]


class RunFolder:
    """The output folder of a run. The main process holds it while it runs, so that no other run writes there.

    It holds `checkpoint.pth`, the state to go on from; `checkpoint.1.pth`, `checkpoint.2.pth` and so on, the ones
    before it; the best checkpoints; log.txt, which is derived from the newest checkpoint; args.json; and `.lock`,
    which names the process that holds the folder. A kill at any instant leaves each of them whole.

    Args:
        path: The folder; made if need be, and removed again if nothing is written to it.
        keep: States to go on from that are kept, the newest included.

    Raises:
        UserError: On entering, if the folder cannot be made or another run holds it.
    """

    def __init__(self, path: str | Path, keep: int = 2):
        self.path = Path(path)
        self.keep = keep

    def __enter__(self) -> "RunFolder":
        utils.on_main(self._claim)
        return self

    def __exit__(self, *_) -> None:
        if utils.get_rank() == 0:
            if self.is_new and [file.name for file in self.path.iterdir()] == [".lock"]:
                with contextlib.suppress(OSError):  # another start may just have come in
                    (self.path / ".lock").unlink()
                    self.path.rmdir()
            self.lock.close()

    def _claim(self) -> None:
        try:
            self.is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "a+")  # noqa: SIM115  open for as long as the folder is held
            self._take_lock()
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self.lock.flush()
        except OSError as error:
            raise UserError(
                f"--output_dir {self.path}: cannot be written to ({error.strerror}); choose one that you may write to"
            ) from error

    def _take_lock(self) -> None:
        """Lock the folder for this process; not for the open file, or children that outlive it would keep it."""
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.lock.seek(0)
            holder = self.lock.read().strip() or "another process"
            self.lock.close()
            raise UserError(
                f"--output_dir {self.path} is in use by {holder}; wait for its end, or choose another --output_dir"
            ) from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s); let no other run write there", self.path, error.strerror)

    def generation(self, age: int) -> Path:
        """Return the path of the newest checkpoint (age 0) or of an older one."""
        return self.path / (f"checkpoint.{age}.pth" if age else CHECKPOINT)

    def generations(self) -> dict[int, Path]:
        """Return the states to go on from by age, newest first."""
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise UserError(
                f"--output_dir {self.path}: cannot be read ({error.strerror}); check its permissions"
            ) from error
        ages = [re.fullmatch(r"checkpoint(?:\.(\d+))?\.pth", name) for name in names]
        return {age: self.generation(age) for age in sorted(int(match[1] or 0) for match in ages if match)}

    def find_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that is whole, None if there is none; set newer, damaged ones aside.

        Raises:
            UserError: If all checkpoints are damaged, or there is none but a run has left other results.
        """
        damaged = []
        for path in self.generations().values():
            if not _is_whole(path):
                damaged.append(path)
                continue
            for bad in damaged:
                aside = bad.with_name(f"{bad.name}.damaged")
                bad.rename(aside)
                logger.warning("%s is damaged; set aside as %s, going on from %s", bad, aside.name, path.name)
            return path
        results = self.results()
        if not results:
            return None
        best = self.path / BEST_CHECKPOINT
        raise UserError(
            f"{', '.join(map(str, damaged)) or results[0]}: there is no whole checkpoint to go on from; remove "
            f"{self.path} to start anew" + f", or pass --resume {best} instead of --auto-resume" * (best in results)
        )

    def refuse_results(self) -> None:
        """Raise a UserError if another run has left something here that this one would write over."""
        if self.results():
            raise UserError(
                f"{self.results()[0]} exists, and this run would write over it; continue it with --auto-resume, "
                "choose another --output_dir or remove it"
            )

    def results(self) -> list[Path]:
        """Return what a run has left here that a new one would write over: checkpoints and a log with lines in it."""
        best = [self.path / name for name in (BEST_CHECKPOINT, BEST_EMA_CHECKPOINT, "log.txt")]
        return [*self.generations().values(), *(file for file in best if file.exists() and file.stat().st_size)]

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write the state to go on from, keeping older ones."""
        save_checkpoint(checkpoint, self.generation(0), self._age_generations)

    def _age_generations(self) -> None:
        """Make each generation one older and drop those beyond `keep`; the newest stays until it is replaced."""
        generations = self.generations()
        if 0 not in generations:
            return
        for age, path in reversed(generations.items()):
            if age >= self.keep:
                path.unlink()
            elif age + 1 < self.keep:
                (os.replace if age else _link_or_move)(path, self.generation(age + 1))

    def save_best(self, checkpoint: dict[str, Any], name: str) -> None:
        """Write one of the best checkpoints."""
        save_checkpoint(checkpoint, self.path / name)

    def write_log(self, history: list[dict[str, Any]]) -> None:
        """Write log.txt: one JSON line for each epoch."""
        write_text(self.path / "log.txt", "".join(to_json(line) + "\n" for line in history))

    def write_args(self, args: dict[str, Any]) -> None:
        """Write args.json: what the run was started with, and on which versions."""
        write_text(self.path / "args.json", json.dumps({"args": args, "versions": utils.versions()}, indent=2) + "\n")


def save_checkpoint(checkpoint: dict[str, Any], path: Path, before_replacing: Callable[[], None] | None = None) -> None:
    """Write a checkpoint; see `write_atomically`."""
    write_atomically(path, lambda file: torch.save(checkpoint, file), before_replacing)


def to_json(values: dict[str, Any]) -> str:
    """Return a flat dict as a line of JSON; NaN and infinity, which JSON does not have, become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(finite, allow_nan=False)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it exists.

    Raises:
        UserError: If that fails.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be made ({error.strerror}); choose another") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file; see `write_atomically`."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable, before_replacing: Callable[[], None] | None = None) -> None:
    """Write a file so that a kill at any instant leaves the old one or the new one, whole.

    Args:
        path: The file to write or replace.
        write: Writes the content to the binary file that it is given, a temporary one in the same folder.
        before_replacing: Called when that file is whole and on the disk.

    Raises:
        UserError: If it cannot be written; what was there before is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before_replacing:
            before_replacing()
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it behind its own
        if isinstance(error, Exception) and isinstance(cause, OSError):
            raise UserError(
                f"{path}: cannot be written ({cause.strerror or cause}); what was there before is intact. Mend "
                "that, then run the same command again, a training with --auto-resume"
            ) from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself last
    finally:
        os.close(folder)


def _is_whole(path: Path) -> bool:
    """Tell whether a file of torch.save, a zip archive, is as it was written; torch.load sees no flipped bits."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception as error:  # zipfile raises many kinds of errors on garbage
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the disk and the permissions") from error
        return False


def _link_or_move(path: Path, other: Path) -> None:
    """Give a file another name too, or instead where the file system has no links."""
    temporary = other.with_name(f".{other.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        os.replace(path, other)
    else:
        os.replace(temporary, other)
        temporary.unlink(missing_ok=True)  # still there if both were names of one file already
