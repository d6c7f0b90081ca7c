"""The training curves of the published models, and the comparison of a run with them.

A run is off track once its accuracy or its training loss is worse than the published one by more than a tolerance in
`ROW` consecutive epochs after the warm-up, and on track again after `ROW` consecutive epochs within it. The tolerance
of an epoch is the largest of

- `SIGMAS` standard deviations of the noise of the published curve, estimated by `estimate_noise`;
- the change of the published curve within this epoch;
- `LEAST`, because runs that only differ in their seeds differ by more than neighbouring epochs of one run.

A run is judged only if its options are those of the published run, as far as args.json has them.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median

from analysis.runs import RunLog, read_run
from core.recipes import PUBLISHED, differences, published_name

ROW = 3
SIGMAS = 5
# Smallest tolerance: of accuracies in percentage points, of the training loss as a fraction of the published one.
LEAST = {"test_acc1": 0.5, "test_mIoU": 1.0, "train_loss": 0.03}
WINDOW = 15  # epochs before and after an epoch, from which its noise is estimated
FOLDER = Path(__file__).parent / "published"  # of the published runs; their args.json has the options that are compared


def find_published(run: RunLog) -> RunLog | None:
    """Return the published run of the model of a run; None if there is none."""
    kind, name = "classification", published_name(run.options.get("model", ""))
    if run.options.get("head") == "upernet":
        kind, name = "upernet", published_name(run.options["backbone"])
    if not run.options and run.history:  # a log alone; the models differ in their number of parameters
        count = run.history[-1].get("n_parameters")
        name = next((other for other in PUBLISHED if _read(kind, other).history[-1]["n_parameters"] == count), "")
    return _read(kind, name) if name in PUBLISHED else None


def _read(kind: str, name: str) -> RunLog:
    return replace(read_run(str(FOLDER / kind / name)), name=f"published {name}")


def judge(run: RunLog, published: RunLog) -> str:
    """Return a line that says whether a run is on track, or why it is not judged."""
    name = published.name
    recipe = {option: value for option, value in published.options.items() if option in run.options}
    if run.options.get("global_batch") is None:  # one batch per process; the number of processes is not known
        recipe.pop("global_batch", None)
    changed = differences(argparse.Namespace(**run.options), recipe, "published")
    if changed:
        return f"{run.name}: not judged, because it differs from the {name}: {', '.join(changed)}"
    compared = {**run.series("train_loss"), **run.series(published.figure)}
    epochs = sorted(epoch for epoch in compared if epoch >= published.warmup)
    if len(epochs) < ROW:
        return f"{run.name}: too early to compare with the {name}, which needs {ROW} epochs after the warm-up"
    faults = [_find_shortfall(run, published, figure) for figure in (published.figure, "train_loss")]
    if any(faults):
        start, difference = min(filter(None, faults))
        return f"{run.name}: not on track from epoch {start} on, {difference}"
    return f"{run.name}: on track up to epoch {epochs[-1]}, compared with the {name}"


def _find_shortfall(run: RunLog, published: RunLog, figure: str) -> tuple[int, str] | None:
    """Return the epoch since which a figure is off track, and the differences in words; None if it is on track."""
    values, expected = run.series(figure), published.series(figure)
    tolerances = find_tolerances(expected, figure)
    sign, side = (-1, "above") if figure == "train_loss" else (1, "below")
    epochs = [epoch for epoch in values if epoch >= published.warmup and epoch in tolerances]
    start = known = None  # while the run is off track
    row = []  # latest epochs that contradict this
    for epoch in epochs:
        is_behind = sign * (expected[epoch] - values[epoch]) > tolerances[epoch]
        row = [*row, epoch] if is_behind != (start is not None) else []
        if len(row) == ROW:
            start, known = (row[0], epoch) if is_behind else (None, None)
            row = []
    if start is None:
        return None
    shortfalls = [
        f"{abs(values[epoch] - expected[epoch]):.2f} in epoch {epoch} ({values[epoch]:.2f}, not {expected[epoch]:.2f})"
        for epoch in (start, epochs[-1])
    ]
    difference = f"{figure} is {side} the {published.name} by {' and by '.join(shortfalls)}"
    return start, f"as known after epoch {known}: {difference}"


def find_tolerances(curve: dict[int, float], figure: str) -> dict[int, float]:
    """Return the tolerance of each epoch of a published curve but the first, as the module's docstring says."""
    noise = estimate_noise(curve)
    tolerances = {}
    for epoch in list(curve)[1:]:
        least = LEAST[figure] * (curve[epoch] if figure == "train_loss" else 1)
        tolerances[epoch] = max(SIGMAS * noise[epoch], abs(curve[epoch] - curve[epoch - 1]), least)
    return tolerances


def estimate_noise(curve: dict[int, float]) -> dict[int, float]:
    """Return the standard deviation of the noise of a curve around each epoch.

    It is estimated from second differences, in which a trend cancels out: of independent noise of standard deviation 1
    they have the standard deviation sqrt(6), and the median of their absolute values is 0.6745 times that.
    """
    values = list(curve.values())
    bends = [abs(values[i - 1] - 2 * values[i] + values[i + 1]) for i in range(1, len(values) - 1)]
    near = (bends[max(0, i - 1 - WINDOW) : i + WINDOW] for i in range(len(values)))
    return {epoch: median(part) / (0.6745 * 6**0.5) for epoch, part in zip(curve, near, strict=True)}
