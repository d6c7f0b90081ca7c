"""What a segmentation network confuses: IoU of each class, confusion of pixels, and the images with the lowest mIoU."""

import argparse
import heapq
import logging
from pathlib import Path

from torch import Tensor

from analysis.data import build_experiment
from analysis.pictures import draw_bars, save_figure, save_sheet, write_confusion, write_table
from core.distributed import Processes
from dense.training import describe
from segmentation.configs.recipes import Experiment
from segmentation.metrics import ConfusionMatrix, build_reader, evaluate
from segmentation.pictures import draw_overlay
from segmentation.train import build_eval_loader

logger = logging.getLogger("twins")

TILE, COLUMNS = (960, 320), 2  # of the contact sheet: pixels, images


def analyse_segmentor(subject, args: argparse.Namespace, processes: Processes, folder: Path) -> None:
    """Evaluate a network or label maps on the validation set; write confusion, iou.png, classes.csv and worst.png."""
    loader = build_eval_loader(
        args, build_experiment(subject.description.options, Experiment, args.data_path), processes
    )
    dataset = loader.dataset.dataset
    classes = dataset.classes
    subject.check_classes(classes)
    worst = []

    def keep_worst(index: int, prediction: Tensor, labels: Tensor) -> None:
        own = ConfusionMatrix(len(classes))
        own.update(prediction, labels)
        if own.counts.any():
            worst.append((own.summary()["mIoU"], index, {"prediction": prediction, "labels": labels}))
            worst[:] = heapq.nsmallest(args.worst, worst, key=lambda image: image[0])

    if subject.predictor:
        predict_image = subject.predictor.predict_image
    else:
        predict_image = build_reader(subject.path, dataset)
    matrix = evaluate(predict_image, loader, processes.device, len(classes), on_prediction=keep_worst)
    logger.info("%s\n%s", matrix.table(classes), describe(matrix.summary()))
    write_confusion(matrix.counts.cpu(), classes, folder)
    figures = matrix.per_class()
    rows = zip(classes, *(figure.tolist() for figure in figures.values()), strict=True)
    write_table(folder / "classes.csv", ("class", *figures), rows)
    save_figure(draw_bars(classes, (100 * figures["IoU"]).tolist(), "IoU in %"), folder / "iou.png")
    panels = []
    for miou, index, maps in worst:
        overlay = draw_overlay(dataset[index][0], maps, classes, dataset.colours)
        panels.append((f"{dataset.name(index)}: mIoU {miou:.1%}", overlay))
    save_sheet(panels, TILE, COLUMNS, folder / "worst.png")
