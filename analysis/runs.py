"""What a training run has written: its options, the figures of its epochs and its log lines."""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from core.run_folder import METRICS
from utils import UserError

FIGURES = ("test_acc1", "test_mIoU", "test_bbox_AP")  # the main figure of each task


@dataclass
class RunLog:
    """The logs of a run."""

    name: str  # in tables and pictures: the path as it was given
    options: dict[str, Any]  # content of args.json; empty if there is none
    history: list[dict[str, Any]]  # lines of log.txt, one per epoch; epochs are counted from 0
    steps: list[dict[str, Any]]  # lines of metrics.jsonl

    @property
    def interval(self) -> int:
        """Iterations per epoch of a run that is counted in iterations; 0 for other runs."""
        return self.options.get("eval_interval", 0)

    @property
    def total_epochs(self) -> int | None:
        """Number of epochs of the whole run; None if it is unknown."""
        if self.interval:
            return self.options["iterations"] // self.interval
        return self.options.get("epochs")

    @property
    def warmup(self) -> int:
        """Number of epochs that are part of the warm-up, in whole or in part."""
        if self.interval:
            return -(-self.options["warmup_iterations"] // self.interval)
        return self.options["warmup_epochs"]

    @property
    def figure(self) -> str | None:
        """Name of the accuracy in the log; None if there is none."""
        return next((name for name in FIGURES if any(name in line for line in self.history)), None)

    def series(self, name: str) -> dict[int, float]:
        """Return the values of a figure by epoch, accuracies in percent; undefined values are left out."""
        factor = 100 if name in FIGURES[1:] else 1  # the figures of the dense tasks are from 0 to 1, or -1: undefined
        values = {line["epoch"]: line.get(name) for line in self.history}
        return {epoch: factor * value for epoch, value in values.items() if is_number(value) and value >= 0}

    def step_series(self, name: str) -> tuple[list[float], list[float]]:
        """Return the values of the log lines by their place, in epochs.

        The losses of metrics.jsonl are means since the start of the epoch; these are means since the line before,
        placed between the two.
        """
        places, values = [], []
        lines = [line for line in self.steps if is_number(line.get(name))]
        for before, line in pairwise([{"epoch": None}, *lines]):
            step, value = line["step"], line[name]
            if name != "lr":
                taken, done, total, done_taken = line.get("taken", step), 0, 0.0, 0  # skipped steps have no loss
                if before["epoch"] == line["epoch"]:
                    done, done_taken = before["step"], before.get("taken", before["step"])
                    total = before[name] * done_taken
                if taken == done_taken:
                    continue
                value = (value * taken - total) / (taken - done_taken)
                step = (done + step) / 2
            places.append(line["epoch"] + step / line["steps"])
            values.append(value)
        return places, values


def is_number(value: Any) -> bool:
    """Return True for a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_run(path: str) -> RunLog:
    """Read a run from its output folder or its log.txt; raise a UserError if the logs are missing or damaged."""
    folder = Path(path)
    log = folder / "log.txt"
    if folder.is_file():
        folder, log = folder.parent, folder
    history, steps = read_lines(log, ("epoch",)), read_lines(folder / METRICS, ("epoch", "step", "steps"))
    if not history and not steps:
        raise UserError(f"{path}: there is no line of log.txt or {METRICS}; name the output folder of a training run")
    return RunLog(path, read_options(folder / "args.json"), history, steps)


def read_options(path: Path) -> dict[str, Any]:
    """Return the options of a run; an empty dict if there is no file of them."""
    try:
        return dict(json.loads(path.read_text())["args"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: are not the options of a run ({type(error).__name__}); remove the file") from error


def read_lines(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the lines of a log, which all have the numbers `keys`; an empty list if there is no log.

    A damaged last line is being written, and skipped.
    """
    try:
        texts = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a log ({error}); name the output folder of a run") from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            valid = all(is_number(line[key]) for key in keys)
        except (ValueError, KeyError, TypeError):
            valid = False
        if valid:
            lines.append(line)
        elif number < len(texts):
            raise UserError(f"{path}: line {number} is not a line of a log: {text[:40]!r}; repair or remove it")
    return lines
