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
import json
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from analysis.runs import RunLog
from core.recipes import PUBLISHED, differences, published_name
from dense.experiments import load_experiment

ROW = 3
SIGMAS = 5
# Smallest tolerance: of accuracies in percentage points, of the training loss as a fraction of the published one.
LEAST = {"test_acc1": 0.5, "test_mIoU": 1.0, "train_loss": 0.03}
WINDOW = 15  # epochs before and after an epoch, from which its noise is estimated
FOLDER = Path(__file__).parent / "published"
CONFIGS = Path(__file__).resolve().parents[1] / "segmentation" / "configs"
# Options of main.py that all published classifiers share; the options of each are in core/recipes.py.
# fmt: off
COMMON = {
    "data_set": "IMNET", "input_size": 224, "epochs": 300, "opt": "adamw", "lr": 5e-4, "unscale_lr": False,
    "sched": "cosine", "sched_on_updates": False, "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5,
    "weight_decay": 0.05, "layer_decay": None, "clip_grad": 5.0, "drop": 0.0, "smoothing": 0.1, "mixup": 0.8,
    "cutmix": 1.0, "aa": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "reprob": 0.25, "repeated_aug": False,
    "distillation_type": "none", "pretrained": False, "finetune": None, "freeze": 0,
}
# Fields of the published segmentation experiments that are compared.
FIELDS = (
    "dataset", "scale", "scale_range", "crop_size", "global_batch", "drop_path", "lr", "weight_decay", "iterations",
    "warmup_iterations", "eval_interval",
)
# fmt: on


class Published(NamedTuple):
    """The published run of a model: its logs, the options that a run must share to be judged, and epochs of warm-up."""

    log: RunLog
    recipe: dict[str, Any]
    warmup: int


def find_published(run: RunLog) -> Published | None:
    """Return the published run of the model of a run; None if there is none."""
    options = run.options
    if options.get("head") == "upernet":
        return _find_upernet(published_name(options["backbone"]))
    curves = json.loads((FOLDER / "classification.json").read_text())
    if options:
        name = published_name(options.get("model", ""))
    else:  # a log alone; the models differ in their number of parameters
        counts = {curve["n_parameters"]: name for name, curve in curves.items()}
        name = counts.get(run.history[-1].get("n_parameters") if run.history else None)
    if name not in curves:
        return None
    figures = ("train_lr", "train_loss", "test_acc1")
    rows = zip(*(curves[name][figure] for figure in figures), strict=True)
    first = curves[name]["first_epoch"]
    history = [dict(zip(figures, row, strict=True)) | {"epoch": epoch} for epoch, row in enumerate(rows, first)]
    recipe = COMMON | {option: value for option, value in PUBLISHED[name].items() if option != "batch_size"}
    return Published(RunLog(f"published {name}", {}, history, []), recipe, recipe["warmup_epochs"])


def _find_upernet(name: str) -> Published | None:
    """Return the published run of a UPerNet; its epochs are the intervals between evaluations."""
    curve = json.loads((FOLDER / "upernet.json").read_text()).get(name)
    if curve is None:
        return None
    history, steps = [], []
    parts = len(curve["loss"]) // len(curve["test_mIoU"])  # values of the loss per evaluation
    for epoch, figure in enumerate(curve["test_mIoU"]):
        losses = curve["loss"][parts * epoch : parts * (epoch + 1)]
        steps += [{"epoch": epoch, "step": k, "steps": parts, "loss": mean(losses[:k])} for k in range(1, parts + 1)]
        history.append({"epoch": epoch, "train_loss": mean(losses), "test_mIoU": figure})
    family, _, size = name.rpartition("_")
    config = load_experiment(CONFIGS / f"upernet_{family}_{size[0]}_512x512_160k_ade20k_swin_setting.py").resolve()
    recipe = json.loads(json.dumps({field: getattr(config, field) for field in FIELDS}))  # lists, as in args.json
    return Published(RunLog(f"published {name}", {}, history, steps), recipe, warmup=1)


def judge(run: RunLog, published: Published) -> str:
    """Return a line that says whether a run is on track, or why it is not judged."""
    name = published.log.name
    recipe = {option: value for option, value in published.recipe.items() if option in run.options}
    if run.options.get("global_batch") is None:  # one batch per process; the number of processes is not known
        recipe.pop("global_batch", None)
    changed = differences(argparse.Namespace(**run.options), recipe, "published")
    if changed:
        return f"{run.name}: not judged, because it differs from the {name}: {', '.join(changed)}"
    epochs = [line["epoch"] for line in run.history if line["epoch"] >= published.warmup]
    if len(epochs) < ROW:
        return f"{run.name}: too early to compare with the {name}, which needs {ROW} epochs after the warm-up"
    faults = [_find_shortfall(run, published, figure) for figure in (published.log.figure, "train_loss")]
    faults = [fault for fault in faults if fault]
    if faults:
        return f"{run.name}: not on track from epoch {min(faults)[0]} on, {min(faults)[1]}"
    return f"{run.name}: on track up to epoch {epochs[-1]}, compared with the {name}"


def _find_shortfall(run: RunLog, published: Published, figure: str) -> tuple[int, str] | None:
    """Return the epoch since which a figure is off track, and the differences in words; None if it is on track."""
    values, expected = run.series(figure), published.log.series(figure)
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
    name = published.log.name
    return start, f"as known after epoch {known}: {figure} is {side} the {name} by {' and by '.join(shortfalls)}"


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
    epochs, values = list(curve), list(curve.values())
    bends = [abs(values[i - 1] - 2 * values[i] + values[i + 1]) for i in range(1, len(values) - 1)]
    noise = {}
    for i, epoch in enumerate(epochs):
        near = bends[max(0, i - 1 - WINDOW) : i + WINDOW]
        noise[epoch] = median(near) / (0.6745 * 6**0.5)
    return noise
