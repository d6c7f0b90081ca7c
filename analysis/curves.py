"""Show the loss, the learning rate and the accuracy of training runs, in a table and in a picture.

    python analyze.py curves output/shapes
    python analyze.py curves output/first output/second --out pictures

A run of a published model is shown beside the published curves, and a line says whether it is on track;
analysis/published.py defines this. Epochs are counted from 0, as in log.txt.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from analysis.pictures import save_figure
from analysis.published import find_published, judge
from analysis.runs import RunLog, read_run
from core.distributed import Processes
from core.options import ArgumentParser
from utils import require_package

logger = logging.getLogger("twins")

MAX_POINTS = 300  # points of a line in the picture; longer series are averaged
BLOCKS = "▁▂▃▄▅▆▇█"
MAX_BLOCKS = 40


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `analyze.py curves`, and set those that `run_script` reads."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a training run, or its log.txt")
    parser.add_argument(
        "--out", metavar="FOLDER", help="folder of curves.png and curves.svg (default: the folder of the first run)"
    )
    parser.add_argument("--text", action="store_true", help="print the table only, which needs no matplotlib")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of input errors, too")
    parser.set_defaults(device="cpu", dist_url="env://", deterministic=False, loader_timeout=0)


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Print the table of the runs and draw their curves."""
    runs = [read_run(path) for path in args.runs]
    if not args.text:
        require_package("matplotlib", "the picture (--text prints the table only)")
    published = [find_published(log) for log in runs]
    logger.info("%s", make_table(runs))
    for log, other in zip(runs, published, strict=True):
        if other:
            logger.info("%s", judge(log, other))
    if not args.text:
        first = Path(args.runs[0])
        folder = Path(args.out) if args.out else first if first.is_dir() else first.parent
        save_figure(draw(runs, published), folder / "curves.png", folder / "curves.svg", dpi=120)


def make_table(runs: Sequence[RunLog]) -> str:
    """Return a table of the runs: completed epochs, latest loss, best accuracy, and the accuracy by epoch in blocks."""
    rows = [("run", "epochs", "loss", "best accuracy", "by epoch")]
    for log in runs:
        done = f"{len(log.history)} of {log.total_epochs}" if log.total_epochs else str(len(log.history))
        losses = list(log.series("train_loss").values()) or log.step_series("loss")[1]
        accuracies = log.series(log.figure) if log.figure else {}
        best = "-"
        if accuracies:
            epoch = max(accuracies, key=accuracies.get)
            best = f"{log.figure} {accuracies[epoch]:.2f} in epoch {epoch}"
        rows.append((log.name, done, f"{losses[-1]:.4f}" if losses else "-", best, draw_blocks(accuracies.values())))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def draw_blocks(values: Sequence[float]) -> str:
    """Return a line chart of block characters, from the lowest value to the highest."""
    values = average_parts(list(values), MAX_BLOCKS)
    if not values:
        return ""
    low, high = min(values), max(values)
    levels = [(value - low) / max(high - low, 1e-12) for value in values]
    return "".join(BLOCKS[round(level * (len(BLOCKS) - 1))] for level in levels)


def average_parts(values: list[float], parts: int) -> list[float]:
    """Return the means of equal parts of a series, at most so many; the series itself if it is short."""
    size = max(1, -(-len(values) // parts))  # rounded up
    return [mean(values[start : start + size]) for start in range(0, len(values), size)]


def draw(runs: Sequence[RunLog], published: Sequence[RunLog | None]) -> Any:
    """Return a matplotlib figure of the runs, with published runs, each once, as broad gray lines.

    The unit of time is 1000 iterations if all runs are counted in iterations, and the epoch otherwise.
    """
    from matplotlib.figure import Figure  # an optional package

    in_iterations = all(log.interval for log in runs)
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3, sharex=True)
    for axis, title in zip(axes, ("training loss", "learning rate", "accuracy in %"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("iterations in thousands" if in_iterations else "completed epochs")
        axis.grid(alpha=0.3)
    drawn = set()
    for number, (log, other) in enumerate(zip(runs, published, strict=True)):
        if other and other.name not in drawn:
            drawn.add(other.name)
            draw_run(axes, other, in_iterations, color=str(0.8 - 0.1 * (len(drawn) % 4)), linewidth=4)
        draw_run(axes, log, in_iterations, color=f"C{number % 10}")
    axes[2].legend(fontsize="small")
    return figure


def draw_run(axes: Sequence[Any], log: RunLog, in_iterations: bool, **style) -> None:
    """Draw a run on the axes of the loss, the learning rate and the accuracy.

    Losses and learning rates are those of its log lines, or means of its epochs if not all have log lines.
    """
    unit = log.interval / 1000 if in_iterations else 1
    if log.steps and log.steps[0]["epoch"] == 0:
        lines = [log.step_series("loss"), log.step_series("lr")]
    else:
        means = log.series("train_loss"), log.series("train_lr")
        lines = [([epoch + 0.5 for epoch in curve], list(curve.values())) for curve in means]
    accuracies = log.series(log.figure) if log.figure else {}
    lines.append(([epoch + 1 for epoch in accuracies], list(accuracies.values())))
    label = f"{log.name} ({log.figure})" if log.figure else log.name
    for axis, (places, values) in zip(axes, lines, strict=True):
        places = average_parts([unit * place for place in places], MAX_POINTS)
        marker = "." if len(values) < 20 else None
        axis.plot(places, average_parts(values, MAX_POINTS), marker=marker, label=label, **style)
