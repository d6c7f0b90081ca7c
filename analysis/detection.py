"""How well a detector finds objects: AP by class and size, and precision-recall curves, all by pycocotools."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from analysis.data import build_experiment
from analysis.pictures import draw_bars, save_figure, write_table
from core.distributed import Processes
from core.options import choose_amp
from detection.configs.recipes import Experiment
from detection.metrics import evaluate_kind, find_objects, mean_precision, read_results
from detection.train import KINDS, build_eval_loader

logger = logging.getLogger("twins")

MAX_CURVES = 12  # classes whose curves are drawn


def analyse_detector(subject, args: argparse.Namespace, processes: Processes, folder: Path) -> None:
    """Evaluate a detector or its results on the validation set; write the files of `write_kind` for boxes and masks."""
    experiment = build_experiment(subject.description.options, Experiment, args.data_path)
    kinds = KINDS[experiment.detector]
    loader = build_eval_loader(args, experiment, processes)
    dataset = loader.dataset
    subject.check_classes(dataset.classes)
    if subject.predictor:
        amp_dtype = choose_amp(args.amp, processes.device)
        model = subject.predictor.model
        results = find_objects(model, loader, processes.device, dataset.category_ids, amp_dtype=amp_dtype)
    else:
        results = read_results(subject.path, dataset.coco, kinds)
    for kind in kinds:
        evaluation, lines = evaluate_kind(dataset.coco, dataset.ids, results, kind)
        logger.info("%s:\n%s", kind, lines)
        write_kind(evaluation, dataset.classes, folder, kind)


def write_kind(evaluation: COCOeval, classes: list[str], folder: Path, kind: str) -> None:
    """Write KIND_classes.csv, KIND_ap.png, KIND_curves.csv and KIND_curves.png for `kind`, `"bbox"` or `"segm"`.

    The precisions of the evaluation are of shape `(IoU, recall, class, size, limit)`.
    """
    precision = np.where(evaluation.eval["precision"] > -1, evaluation.eval["precision"], np.nan)[..., -1]
    parts = {"AP": precision[:, :, :, 0], "AP50": precision[:1, :, :, 0], "AP75": precision[5:6, :, :, 0]}
    parts |= {f"AP{size}": precision[:, :, :, i] for i, size in enumerate("sml", start=1)}
    figures = {name: [mean_precision(part[:, :, k]) for k in range(len(classes))] for name, part in parts.items()}
    write_table(folder / f"{kind}_classes.csv", ("class", *figures), zip(classes, *figures.values(), strict=True))
    save_figure(draw_bars(classes, [100 * ap for ap in figures["AP"]], f"{kind} AP in %"), folder / f"{kind}_ap.png")
    recalls = evaluation.params.recThrs.tolist()
    means = [[mean_precision(parts[name][:, i]) for i in range(len(recalls))] for name in ("AP50", "AP75", "AP")]
    by_class = precision[0, :, :, 0].T.tolist()  # at IoU 0.5
    names = ("IoU 0.50", "IoU 0.75", "IoU 0.50 to 0.95")
    rows = zip(recalls, *means, *by_class, strict=True)
    write_table(folder / f"{kind}_curves.csv", ("recall", *names, *(f"{name}, IoU 0.50" for name in classes)), rows)
    panels = [("mean over the classes", names, means)]
    if len(classes) <= MAX_CURVES:
        panels.append(("classes at IoU 0.5", classes, by_class))
    save_figure(draw_curves(recalls, panels), folder / f"{kind}_curves.png")


def draw_curves(recalls: Sequence[float], panels: Sequence[tuple[str, Sequence[str], Sequence[Any]]]) -> Any:
    """Return a figure of precision by recall; a panel has a title, names, and the precisions of each name."""
    from matplotlib.figure import Figure  # an optional package

    figure = Figure(figsize=(6 * len(panels), 5), layout="constrained")
    for axis, (title, names, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, values in zip(names, curves, strict=True):
            axis.plot(recalls, values, label=name)
        axis.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return figure
