"""What a run leaves in its folder - checkpoints, log and lock - and how it goes on from there."""

import contextlib
import errno
import fcntl
import json
import logging
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
        on_main(self._claim)
        return self

    def __exit__(self, *_) -> None:
        if get_rank() == 0:
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
