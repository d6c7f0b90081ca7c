"""What a training run has written: its options, the figures of its epochs and its log lines."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.run_folder import METRICS
from utils import UserError

FIGURES = ("test_acc1", "test_mIoU", "test_bbox_AP")  # the main figure of each task


@dataclass
class RunLog:
    """The logs of a run.

    Attributes:
        name: Name in tables and pictures: the path as it was given.
        options: Content of args.json; empty if there is none.
        history: Lines of log.txt, one per epoch. Epochs are counted from 0.
        steps: Lines of metrics.jsonl.
    """

    name: str
    options: dict[str, Any]
    history: list[dict[str, Any]]
    steps: list[dict[str, Any]]

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

        The losses of metrics.jsonl are means since the start of the epoch; these are means since the line
        before, placed between the two.
        """
        places, values = [], []
        epoch, total, done = None, 0.0, 0
        for line in self.steps:
            if not is_number(line.get(name)):
                continue
            value, step = line[name], line["step"]
            if name != "lr":
                if line["epoch"] != epoch:
                    epoch, total, done = line["epoch"], 0.0, 0
                before, total = total, value * line["step"]
                value = (total - before) / max(1, line["step"] - done)
                step, done = (done + line["step"]) / 2, line["step"]
            places.append(line["epoch"] + step / line["steps"])
            values.append(value)
        return places, values


def is_number(value: Any) -> bool:
    """Return True for a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_run(path: str) -> RunLog:
    """Read a run.

    Args:
        path: Output folder of a run, or its log.txt.

    Raises:
        UserError: If there is no log, or it is damaged other than in its last line.
    """
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
        return json.loads(path.read_text())["args"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: are not the options of a run ({type(error).__name__}); remove the file") from error


def read_lines(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the lines of a log; an empty list if there is none. A damaged last line is being written, and skipped.

    Args:
        path: File with one JSON object per line.
        keys: Names of numbers that every line has.
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
