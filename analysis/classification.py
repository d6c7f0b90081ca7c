"""What a classifier confuses: confusion matrix, precision, recall and F1 of each class, and the worst images."""

import argparse
import heapq
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from analysis.data import training_defaults
from analysis.pictures import save_sheet, write_confusion, write_table
from core.distributed import Processes
from core.meters import show_progress
from core.signals import stop_if_requested
from datasets import IGNORED_TARGET, build_val_loader
from predict import EVALUATION
from segmentation.metrics import ConfusionMatrix
from transforms import to_picture
from utils import UserError

logger = logging.getLogger("twins")

TILE, COLUMNS = (240, 240), 6  # of the contact sheet: pixels, images
SHOWN = 10  # lines of each list in the log


def analyse_classifier(subject, args: argparse.Namespace, processes: Processes, folder: Path) -> None:
    """Evaluate a classifier on the validation set of its data; write confusion, classes.csv and worst.png."""
    loader = build_loader(subject.description.options, args, processes)
    data = loader.dataset.dataset
    classes = data.classes
    subject.check_classes(classes)
    files = [Path(path).name for path, _ in getattr(data, "samples", [])] or list(map(str, range(len(data))))
    matrix, worst, done = ConfusionMatrix(len(classes)), [], 0
    for images, targets in show_progress(loader, "evaluation"):
        stop_if_requested(processes.device)
        results = subject.predictor.predict(images, images)
        logits = torch.stack([result.logits for result in results])
        matrix.update(logits.argmax(dim=1), targets)
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="none")
        for i in (targets != IGNORED_TARGET).nonzero()[:, 0].tolist():
            image = (losses[i].item(), files[done + i], images[i].clone(), logits[i], targets[i].item())
            worst = heapq.nlargest(args.worst, [*worst, image], key=lambda image: image[0])
        done += len(targets)
    if not worst:
        raise UserError(f"{subject.path}: there is no image to evaluate")
    write_confusion(matrix.counts, classes, folder)
    rows = class_figures(matrix.counts, classes)
    write_table(folder / "classes.csv", ("class", "images", "precision", "recall", "F1"), rows)
    save_sheet([describe_worst(image, classes) for image in worst], TILE, COLUMNS, folder / "worst.png")
    log_summary(matrix.counts, classes, rows)


def build_loader(options: dict, args: argparse.Namespace, processes: Processes) -> DataLoader:
    """Build the loader of the validation set from the known options of the training and those of this evaluation."""
    used = training_defaults() | EVALUATION | options
    names = ("num_workers", "pin_mem", "loader_timeout")
    used |= {name: getattr(args, name) for name in names} | {"batch_size": args.batch_size, "dist_eval": False}
    if args.data_path:
        used["data_path"] = args.data_path
    return build_val_loader(argparse.Namespace(**used), processes)


def class_figures(counts: Tensor, classes: Sequence[str]) -> list[tuple[str, int, float, float, float]]:
    """Return the name, number of images, precision, recall and F1 of each class, 0 where nothing is counted.

    `counts` are the images by true and predicted class `(classes, classes)`.
    """
    counts = counts.double()
    hits, true, predicted = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
    figures = [hits / predicted, hits / true, 2 * hits / (true + predicted)]
    columns = [figure.nan_to_num(0).tolist() for figure in figures]
    return list(zip(classes, true.long().tolist(), *columns, strict=True))


def describe_worst(image: tuple[float, str, Tensor, Tensor, int], classes: Sequence[str]) -> tuple[str, Image.Image]:
    """Return the caption and the picture of an image: its file, its true and its predicted class, and probabilities."""
    _, file, pixels, logits, target = image
    probabilities = logits.softmax(dim=0)
    best = probabilities.argmax().item()
    true, predicted = (f"{classes[label]} {probabilities[label]:.0%}" for label in (target, best))
    return f"{file}\ntrue: {true}\npredicted: {predicted}", to_picture(pixels)


def log_summary(counts: Tensor, classes: Sequence[str], rows: list[tuple]) -> None:
    """Log the accuracy, the classes with the lowest F1, and the most frequent confusions."""
    total = counts.sum().item()
    logger.info("accuracy %.2f %% of %d images", 100 * counts.diag().sum().item() / total, total)
    for name, images, precision, recall, f1 in sorted(rows, key=lambda row: row[-1])[:SHOWN]:
        figures = f"F1 {f1:.1%}, precision {precision:.1%}, recall {recall:.1%}"
        logger.info("%s: %s of %d images", name, figures, images)
    confusions = counts - counts.diag().diag()
    for place in confusions.flatten().argsort(descending=True)[:SHOWN].tolist():
        true, predicted = divmod(place, len(classes))
        if confusions[true, predicted]:
            logger.info("%s is taken for %s: %d times", classes[true], classes[predicted], confusions[true, predicted])
