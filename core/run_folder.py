"""The output folder of a run: checkpoints, log and lock."""

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
from pathlib import Path
from typing import Any

import utils
from core.distributed import get_rank, on_main
from utils import UserError, save_checkpoint, to_json, write_text

logger = logging.getLogger("twins")

CHECKPOINT, BEST_CHECKPOINT, BEST_EMA_CHECKPOINT = "checkpoint.pth", "checkpoint_best.pth", "checkpoint_best_ema.pth"
METRICS = "metrics.jsonl"


class RunFolder:
    """The output folder of a run. The main process locks it, so that no other run writes to it.

    Its files are `checkpoint.pth`, the newest checkpoint; `checkpoint.1.pth`, `checkpoint.2.pth` and so on, the earlier
    ones; the best checkpoints; log.txt, which is derived from the newest checkpoint; args.json; and `.lock`, which
    names the process that holds the lock. If the process is killed at any time, each of these files is intact.
    metrics.jsonl grows line by line; what a killed process wrote after the newest checkpoint is cut off by the next.

    Args:
        path: Folder; created if it does not exist, and removed at the end if it is still empty.
        keep: Number of checkpoints to keep, including the newest.

    Raises:
        UserError: On entering the block, if the folder cannot be created or another run holds the lock.
    """

    def __init__(self, path: str | Path, keep: int = 2):
        self.path = Path(path)
        self.keep = keep

    def __enter__(self) -> "RunFolder":
        on_main(self._claim)
        return self

    def __exit__(self, *_) -> None:
        if get_rank() == 0:
            if self.is_new and [file.name for file in self.path.iterdir()] == [".lock"]:
                with contextlib.suppress(OSError):  # another run may have started in the meantime
                    (self.path / ".lock").unlink()
                    self.path.rmdir()
            self.lock.close()

    def _claim(self) -> None:
        try:
            self.is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "a+")  # noqa: SIM115  closed when the folder is released
            self._take_lock()
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self.lock.flush()
        except OSError as error:
            raise UserError(
                f"--output_dir {self.path}: cannot be written to ({error.strerror}); choose a writable folder"
            ) from error

    def _take_lock(self) -> None:
        """Lock the folder for this process. (flock would lock it for the open file, which child processes inherit.)"""
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.lock.seek(0)
            holder = self.lock.read().strip() or "another process"
            self.lock.close()
            raise UserError(
                f"--output_dir {self.path} is in use by {holder}; wait until it ends, or choose another --output_dir"
            ) from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s); do not start another run in it", self.path, error.strerror)

    def generation(self, age: int) -> Path:
        """Return the path of the checkpoint of an age; the newest has age 0."""
        return self.path / (f"checkpoint.{age}.pth" if age else CHECKPOINT)

    def generations(self) -> dict[int, Path]:
        """Return the existing checkpoints by age, newest first."""
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise UserError(
                f"--output_dir {self.path}: cannot be read ({error.strerror}); check its permissions"
            ) from error
        ages = [re.fullmatch(r"checkpoint(?:\.(\d+))?\.pth", name) for name in names]
        return {age: self.generation(age) for age in sorted(int(match[1] or 0) for match in ages if match)}

    def find_checkpoint(self) -> Path | None:
        """Return the newest intact checkpoint, None for a new run. Newer, damaged checkpoints are renamed.

        Raises:
            UserError: If all checkpoints are damaged, or there is none but there are other results of a run.
        """
        damaged = []
        for path in self.generations().values():
            if not _is_intact(path):
                damaged.append(path)
                continue
            for bad in damaged:
                renamed = bad.with_name(f"{bad.name}.damaged")
                bad.rename(renamed)
                logger.warning("%s is damaged; renamed to %s, resuming from %s", bad, renamed.name, path.name)
            return path
        results = self.results()
        if not results:
            return None
        remedy = f"remove {self.path} to start again"
        best = self.path / BEST_CHECKPOINT
        if best in results:
            remedy += f", or pass --resume {best} instead of --auto-resume"
        found = ", ".join(map(str, damaged)) or results[0]
        raise UserError(f"{found}: there is no intact checkpoint to resume from; {remedy}")

    def refuse_results(self) -> None:
        """Raise a UserError if the folder has results of another run, which this one would overwrite."""
        if results := self.results():
            raise UserError(
                f"{results[0]} exists, and this run would overwrite it; continue that run with --auto-resume, "
                "choose another --output_dir, or remove the file"
            )

    def results(self) -> list[Path]:
        """Return the results that a new run would overwrite: checkpoints, and log.txt unless it is empty.

        metrics.jsonl alone is no result: its run ended before the first checkpoint and cannot be continued.
        """
        best = [self.path / name for name in (BEST_CHECKPOINT, BEST_EMA_CHECKPOINT, "log.txt")]
        return [*self.generations().values(), *(file for file in best if file.exists() and file.stat().st_size)]

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write the newest checkpoint and keep the older ones."""
        if (self.path / METRICS).exists():
            with open(self.path / METRICS, "a") as file:
                os.fsync(file.fileno())  # the lines up to the checkpoint are not written again
        save_checkpoint(checkpoint, self.generation(0), self._age_generations)

    def _age_generations(self) -> None:
        """Rename each checkpoint to the next age; delete those beyond `keep`. The newest is linked, not renamed."""
        generations = self.generations()
        if 0 not in generations:
            return
        for age, path in reversed(generations.items()):
            if age >= self.keep:
                path.unlink()
            elif age + 1 < self.keep and age == 0:
                _link_or_move(path, self.generation(1))
            elif age + 1 < self.keep:
                os.replace(path, self.generation(age + 1))

    def write_log(self, history: list[dict[str, Any]]) -> None:
        """Write log.txt, one line of JSON per epoch."""
        write_text(self.path / "log.txt", "".join(to_json(line) + "\n" for line in history))

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Append a line of JSON to metrics.jsonl."""
        path = self.path / METRICS
        try:
            with open(path, "a") as file:
                file.write(to_json(line) + "\n")
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); correct the cause, then run the same command again, "
                "with --auto-resume"
            ) from error

    def cut_metrics(self, epoch: int, step: int, checkpoint: Path | None) -> None:
        """Remove the lines after `step` steps of `epoch` from metrics.jsonl; the run writes them again.

        The lines are those beside the checkpoint that the run continues, which may be in another folder.
        """
        source = (checkpoint.parent if checkpoint else self.path) / METRICS
        text = source.read_text(errors="replace") if source.exists() else ""
        *lines, _ = text.split("\n")  # after the last line end: a part of a line
        write_text(self.path / METRICS, "".join(line + "\n" for line in lines if _place(line) <= (epoch, step)))

    def write_args(self, args: dict[str, Any]) -> None:
        """Write args.json, the options of the run and the versions of the libraries."""
        write_text(self.path / "args.json", json.dumps({"args": args, "versions": utils.versions()}, indent=2) + "\n")


def _place(line: str) -> tuple[float, float]:
    """Return the epoch and the step of a line of metrics.jsonl; infinity for a damaged line."""
    try:
        values = json.loads(line)
        return float(values["epoch"]), float(values["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf, math.inf


def _is_intact(path: Path) -> bool:
    """Return True if a file of torch.save passes the checksums of its zip archive, which torch.load does not check."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception as error:  # zipfile raises many kinds of errors for invalid data
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the disk and the permissions") from error
        return False


def _link_or_move(path: Path, other: Path) -> None:
    """Add a second name to a file; rename it if the file system does not support links."""
    temporary = other.with_name(f".{other.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        os.replace(path, other)
    else:
        os.replace(temporary, other)
        temporary.unlink(missing_ok=True)  # os.replace does nothing if both names are links to the same file
