"""Evaluate trained weights, and show what the network confuses.

    python analyze.py evaluate output/shapes/checkpoint_best.pth
    python analyze.py evaluate output/pets/checkpoint_best.pth --data-path pets --worst 50
    python analyze.py evaluate results.json --config detection/configs/mask_rcnn_alt_gvt_tiny_shapes.py

It writes tables and pictures: for a classifier the confusion matrix, precision, recall and F1 of each class, and
the images with the highest loss; for segmentation the IoU of each class, the confusion of pixels, and the images
with the lowest mIoU; for detection the AP of each class and size, and precision-recall curves. Results that the
test.py of a dense task has written by --out take the place of weights, with --config.
"""

import argparse
import dataclasses
from pathlib import Path

from analysis.classification import analyse_classifier
from analysis.segmentation import analyse_segmentor
from core.description import Description, check_same_classes, find_task, read_description
from core.distributed import Processes
from core.options import (
    POSITIVE_INT,
    ArgumentParser,
    add_compute_options,
    add_loader_options,
    add_process_options,
    compile_if_asked,
)
from core.predictor import Predictor
from core.signals import signals_noted
from dense.experiments import load_experiment
from predict import load_predictor
from utils import UserError, require_package


@dataclasses.dataclass
class Subject:
    """What is evaluated."""

    path: Path  # weights or results
    description: Description
    predictor: Predictor | None  # None for results

    def check_classes(self, classes: list[str]) -> None:
        """Raise a UserError if the data have other classes than the weights; released weights have no names."""
        if self.predictor:
            check_same_classes(self.path, read_description(self.path).classes, classes)
            count = len(self.description.classes)
            if count != len(classes):
                raise UserError(f"{self.path}: has {count} classes, the data {len(classes)}; choose other data")


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `analyze.py evaluate`."""
    parser.add_argument("weights", metavar="WEIGHTS", help="weights, or results of a dense task (JSON file or folder)")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--data-path", metavar="FOLDER", help="folder of the data (default: that of the training)")
    group.add_argument("--out", metavar="FOLDER", help="folder of the tables and pictures (default: WEIGHTS_analysis)")
    group.add_argument(
        "--worst", type=POSITIVE_INT, default=24, metavar="N", help="number of images on the contact sheet"
    )
    group.add_argument("--model", metavar="NAME", help="classifier, for released weights")
    group.add_argument("--config", metavar="FILE", help="experiment, for results and released weights")
    group.add_argument("--model-ema", action="store_true", help="use the moving average of a classifier's weights")
    group.add_argument(
        "--batch-size", type=POSITIVE_INT, default=64, metavar="N", help="as in main.py, for a classifier"
    )
    add_compute_options(group, amp="off")
    add_loader_options(group, num_workers=4)
    add_process_options(parser)


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Evaluate the weights or the results and write tables and pictures."""
    require_package("matplotlib", "analyze.py evaluate")
    subject = load_subject(args, processes)
    options = subject.description.options
    if args.data_path and "shapes" in (options.get("data_set", "").lower(), options.get("dataset")):
        raise UserError(f"--data-path {args.data_path}: {subject.path} is for shapes, which have no folder; omit it")
    folder = Path(args.out) if args.out else subject.path.with_name(f"{subject.path.stem}_analysis")
    with signals_noted():
        if subject.description.task == "classification":
            analyse_classifier(subject, args, processes, folder)
        elif subject.description.task == "segmentation":
            analyse_segmentor(subject, args, processes, folder)
        else:
            from analysis.detection import analyse_detector  # needs pycocotools

            analyse_detector(subject, args, processes, folder)


def load_subject(args: argparse.Namespace, processes: Processes) -> Subject:
    """Load the network of weights; results need none, but a UserError is raised if their experiment is not given."""
    path = Path(args.weights)
    if (path / "args.json").exists():
        raise UserError(f"{path}: is the folder of a run; name a checkpoint in it, such as {path}/checkpoint_best.pth")
    if path.is_dir() or path.suffix == ".json":
        if not args.config:
            raise UserError(f"{path}: name the experiment of the results with --config")
        experiment = load_experiment(args.config)
        options = dataclasses.asdict(experiment)
        return Subject(path, Description(find_task(options), options=options), None)
    network = {"model": args.model, "config": args.config, "ema": args.model_ema}
    predictor = load_predictor(path, **network, device=str(processes.device), amp=args.amp)
    compile_if_asked(predictor.model, args.compile)
    return Subject(path, predictor.description, predictor)
