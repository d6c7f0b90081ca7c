"""Show what training really sees: images after augmentation, with their labels, masks or boxes.

    python analyze.py data --recipe shapes
    python analyze.py data --data-path pets --aa rand-m9-mstd0.5-inc1 --input-size 224
    python analyze.py data segmentation/configs/upernet_alt_gvt_tiny_shapes.py --images 16
    python analyze.py data output/pets

The images are the first ones of a training in one process with the same options; those of a run, its output folder, are
in its args.json. Mixup and CutMix, which mix the images of a batch, are not shown.
"""

import argparse
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from analysis.pictures import save_sheet
from analysis.runs import read_options
from core.description import Description, find_task
from core.distributed import Processes
from core.options import COUNT, POSITIVE_INT, ArgumentParser, add_loader_options, add_process_options
from core.recipes import SHAPES
from datasets import add_data_options, build_train_loader
from dense.experiments import change_fields, load_experiment
from segmentation import train as segmentation_train
from segmentation.configs.recipes import Experiment as SegmentationExperiment
from segmentation.pictures import draw_overlay
from transforms import add_augmentation_options, to_picture
from utils import UserError, make_folder

logger = logging.getLogger("twins")

Panels = Iterator[tuple[str, Image.Image]]


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `analyze.py data`."""
    parser.add_argument(
        "source", nargs="?", metavar="CONFIG_OR_RUN", help="experiment of a dense task, or output folder of a run"
    )
    parser.add_argument("--images", type=POSITIVE_INT, default=24, metavar="N", help="number of images")
    parser.add_argument("--out", default="data.png", metavar="FILE", help="PNG file to write")
    group = parser.add_argument_group("dense tasks")
    group.add_argument(
        "--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="fields to change"
    )
    add_training_options(parser)
    parser.set_defaults(**dict.fromkeys(training_defaults()))  # None: not given
    add_loader_options(parser.add_argument_group("script"), num_workers=4)
    add_process_options(parser)


def add_training_options(parser: ArgumentParser) -> None:
    """Add the options of main.py that shape the images."""
    group = parser.add_argument_group("classification, as in main.py; --data-path applies to all tasks")
    group.add_argument("--recipe", choices=("shapes",), help="named set of option values")
    group.add_argument("--seed", default=0, type=COUNT, metavar="N", help="seed of the training, of all tasks")
    group.add_argument("--input-size", default=224, type=POSITIVE_INT, metavar="PIXELS", help="side of the images")
    add_data_options(group)
    add_augmentation_options(group)


def training_defaults() -> dict[str, Any]:
    """Return the defaults of the options of `add_training_options`."""
    parser = ArgumentParser()
    add_training_options(parser)
    return vars(parser.parse_args([]))


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Write a contact sheet of training images."""
    path = Path(args.out)
    if path.suffix != ".png" or path.is_dir():
        raise UserError(f"--out {path}: name a file that ends in .png")
    make_folder(path.parent)
    panels, tile, columns = find_panels(args, processes)
    panels = list(islice(panels, args.images))
    if not panels:
        raise UserError("there are fewer images than in a batch; lower it with --cfg-options batch_size=...")
    save_sheet(panels, tile, columns, path)


def find_panels(args: argparse.Namespace, processes: Processes) -> tuple[Panels, tuple[int, int], int]:
    """Return the titles and pictures of training images, the width and height of a tile, and the tiles per row."""
    if args.source:
        options = read_source(args.source)
        task = find_task(options)
    else:
        options = SHAPES if args.recipe else {}
        task = "classification"
    args = merge_options(args, options)
    if task == "classification":
        return draw_images(args, processes), (240, 240), 6
    changes = args.data_path, args.cfg_options
    if task == "segmentation":
        return draw_labels(args, build_experiment(options, SegmentationExperiment, *changes), processes), (640, 320), 3
    from detection.configs.recipes import Experiment  # needs pycocotools

    return draw_objects(args, build_experiment(options, Experiment, *changes), processes), (480, 360), 4


def read_source(source: str) -> dict[str, Any]:
    """Return the options of a run, or the fields of an experiment."""
    if not Path(source).is_dir():
        return dataclasses.asdict(load_experiment(source))
    if options := read_options(Path(source) / "args.json"):
        return options
    raise UserError(f"{source}: has no args.json, as runs have; for images pass --data-path {source}")


def merge_options(args: argparse.Namespace, options: dict[str, Any]) -> argparse.Namespace:
    """Return the options of a training: those of a recipe or a run, unless the command line gives others."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**({"repeated_aug": False} | training_defaults() | options | given))


def build_experiment(options: dict[str, Any], kind: type, data_path: str | None, changes: Sequence[str] = ()) -> Any:
    """Return the experiment with the fields `options`, of the class `kind`, on other data and with changed fields."""
    experiment = change_fields(Description("", options=options).to_experiment(kind), changes)
    if data_path:
        experiment = dataclasses.replace(experiment, data_root=data_path)
    return experiment.resolve()


def draw_images(args: argparse.Namespace, processes: Processes) -> Panels:
    """Yield the images of a classifier with the names of their classes."""
    args.batch_size = 1
    loader = build_train_loader(args, processes, global_batch=1)
    classes = loader.dataset.dataset.classes
    for images, targets in loader:
        yield classes[targets[0]], to_picture(images.normalise()[0])


def draw_labels(args: argparse.Namespace, experiment: Any, processes: Processes) -> Panels:
    """Yield the images of a segmentation network with their labels in colours."""
    loader = segmentation_train.build_train_loader(args, experiment, processes)
    dataset = loader.dataset.dataset
    for images, labels in loader:
        for image, own in zip(images, labels, strict=True):
            pixels = pil_to_tensor(to_picture(image))
            yield "", draw_overlay(pixels, {"labels": own}, dataset.classes, dataset.colours)


def draw_objects(args: argparse.Namespace, experiment: Any, processes: Processes) -> Panels:
    """Yield the images of a detector with the boxes and names of their objects, and their masks if it finds masks."""
    from detection.pictures import draw_detections
    from detection.train import KINDS, build_train_loader

    loader = build_train_loader(args, experiment, processes)
    names = ("boxes", "labels", "masks") if "segm" in KINDS[experiment.detector] else ("boxes", "labels")
    for images, targets in loader:
        for image, target in zip(images, targets, strict=True):
            annotated = {name: target[name] for name in names}
            yield "", draw_detections(image, annotated, loader.dataset.dataset.classes)
