"""Small functions without a better place: logging, random generators, versions and atomic file writes."""

import functools
import importlib.util
import json
import logging
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision

logger = logging.getLogger("twins")


class UserError(ValueError):
    """An error that the user can correct: bad input, a missing file, a full disk.

    The message is one line with the bad value and the remedy. Scripts print it without a traceback.
    """


class LogHandler(logging.StreamHandler):
    """Handler that is silent after the reader of a pipe has ended, as in `predict.py ... | head`."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  a name of logging
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


def require_package(name: str, what: str) -> None:
    """Raise a UserError if an optional package, which an option or command needs, is not installed."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{what} needs the package {name}, which is not installed; install it: pip install {name}")


def set_up_logging(rank: int) -> None:
    """Log to standard output: all messages of the main process, warnings of the others."""
    handler = LogHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[process {rank}] %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_generators(*key: int) -> None:
    """Seed the random generators of Python, NumPy and torch's CPU from a key of several numbers."""
    seeds = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would also seed CUDA


@contextmanager
def restored_generators() -> Iterator[None]:
    """Restore the states of the CPU generators after the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def get_random_state() -> dict[str, Any]:
    """Return the states of all random generators, in types that load with `weights_only=True`."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states that `get_random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def make_deterministic() -> None:
    """Restrict torch to deterministic algorithms; operations that have none raise an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that takes time
    torch.backends.cudnn.benchmark = False
    logger.info("deterministic algorithms: slower on a GPU; no change on a CPU")


@functools.cache
def versions() -> dict[str, str | None]:
    """Return the versions of Python, the libraries and this code (its git revision, None if it is unknown)."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        revision = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        revision = None
    modules = {"torch": torch, "torchvision": torchvision, "timm": timm, "numpy": np, "pillow": PIL}
    found = {"python": sys.version.split()[0], "git": revision or None}
    return found | {name: str(module.__version__) for name, module in modules.items()}


def save_checkpoint(checkpoint: dict[str, Any], path: Path, before_replacing: Callable[[], None] | None = None) -> None:
    """Write a checkpoint; see `write_atomically`."""
    write_atomically(path, lambda file: torch.save(checkpoint, file), before_replacing)


def to_json(values: dict[str, Any]) -> str:
    """Return a flat dict as one line of JSON. NaN and infinity, which JSON does not have, become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(finite, allow_nan=False)


def make_folder(path: Path) -> None:
    """Create a folder and its parents unless they exist; a UserError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be created ({error.strerror}); choose another one") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file; see `write_atomically`."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable, before_replacing: Callable[[], None] | None = None) -> None:
    """Write a file atomically: if the process is killed at any time, the old file or the new one is left intact.

    `write` gets a temporary file in the same folder to write the content in binary. This is flushed to the disk, and
    renamed after a call of `before_replacing`.

    Raises:
        UserError: If the file cannot be written. An older file of that name is intact.
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
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises an error of its own
        if isinstance(error, Exception) and isinstance(cause, OSError):
            raise UserError(
                f"{path}: cannot be written ({cause.strerror or cause}); the previous file is intact. Correct the "
                "cause, then run the same command again, with --auto-resume for a training run"
            ) from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # writes the rename to the disk
    finally:
        os.close(folder)
