"""Measure the input pipeline on the CPU: main.py's data loader beside timm's and torchvision's, in turns.

    python -m benchmarks.pipeline                            # images/s of one data-loading process, on drawn images
    python -m benchmarks.pipeline --data path_to_imagenet    # on your own images

All three load the same files in the published augmentation, or torchvision's nearest, and normalise them. Two or three
passes before the turns are a warm-up.
"""

import argparse
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from timm.data import ImageDataset, create_loader
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.common import (
    add_batch_size_option,
    add_measurement_options,
    add_script_options,
    build_parser,
    check_report,
    compare,
    describe_machine,
    set_threads,
    time_in_turns,
    write_report,
)
from core import shapes
from core.distributed import Processes, cores_per_process
from core.images import load_image
from core.launch import run_script
from core.meters import show_progress
from core.options import COUNT, POSITIVE_INT, ArgumentParser, add_loader_options
from datasets import add_data_options, build_train_loader
from transforms import STATISTICS, add_augmentation_options, posterize
from utils import UserError

logger = logging.getLogger("twins")

PHOTO_SIZE = (500, 375)  # width and height of drawn images in pixels, a usual size in ImageNet


# ------------------------------------------------------------------------------------------------------------ images


def add_image_options(parser: ArgumentParser) -> None:
    """Add the options of the images and their loading; `check_image_options` checks them."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "--data", metavar="FOLDER", help="folder whose train/ has one folder of images per class (default: draw images)"
    )
    group.add_argument("--images", default=512, type=POSITIVE_INT, metavar="N", help="images per pass, at most")
    group.add_argument("--workers", default=1, type=COUNT, metavar="N", help="number of data-loading processes")
    add_batch_size_option(group)


def check_image_options(args: argparse.Namespace) -> None:
    """Check the options of `add_image_options`.

    Raises:
        UserError: If the images cannot be loaded as asked.
    """
    if args.data and not Path(args.data, "train").is_dir():
        raise UserError(f"--data {args.data}: has no folder train/; it must have one folder of images per class")
    if args.workers > cores_per_process():
        raise UserError(f"--workers {args.workers}: there are {cores_per_process()} cores; give at most as many")


@contextmanager
def training_images(args: argparse.Namespace) -> Iterator[Path]:
    """Make a temporary folder with images in `train/`: links to those of `--data`, or drawn ones.

    Raises:
        UserError: If there are fewer images than in a batch.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if args.data:
            link_images(Path(args.data), root, args.images)
        else:
            write_images(root, PHOTO_SIZE, args.images)
        count = sum(1 for _ in root.glob("train/*/*"))
        if count < args.batch_size:
            raise UserError(
                f"--batch-size {args.batch_size}: there are {count} images, fewer than a batch; lower it, or give more"
            )
        logger.info("%s, %d data-loading processes", describe_machine(torch.device("cpu")), args.workers)
        description = "%d images, cropped to 224x224, batch %d; %d turns"
        logger.info(description, count, args.batch_size, args.turns)
        yield root


def write_images(root: Path, size: tuple[int, int], count: int) -> None:
    """Draw images and write them as JPEG files, in the layout of ImageNet's training set.

    Args:
        root: Folder that gets `train/`.
        size: Width and height in pixels.
        count: Number of images.
    """
    for i in show_progress(range(count), "drawing images"):
        folder = root / "train" / shapes.CLASSES[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        draw_photo(i, size).save(folder / f"{i}.jpg", quality=90)


def link_images(source: Path, root: Path, count: int) -> None:
    """Link evenly spaced images of `source/train` into `root/train`, in the same classes.

    Args:
        source: Folder with `train/`, which has one folder of images per class.
        root: Folder that gets `train/`.
        count: Number of images, at most.

    Raises:
        UserError: If there are no images, or one of them cannot be read.
    """
    try:
        dataset = torchvision.datasets.ImageFolder(source / "train")
    except OSError as error:
        raise UserError(f"--data {source}: {error}") from error
    count = min(count, len(dataset))
    for i in show_progress(range(count), "checking images"):
        path, label = dataset.samples[i * len(dataset) // count]
        load_image(path)  # an error names the file itself, not a link to it
        folder = root / "train" / dataset.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}{Path(path).suffix}").symlink_to(Path(path).resolve())


def draw_photo(seed: int, size: tuple[int, int]) -> Image.Image:
    """Draw an image of three shapes; `size` is its width and height in pixels."""
    labels = [(seed + k) % len(shapes.CLASSES) for k in range(3)]
    return shapes.draw_scene((9, seed), max(size), labels=labels).image.crop((0, 0, *size))


# ----------------------------------------------------------------------------------------------------------- loaders


def parse_loading(root: Path, batch_size: int, workers: int) -> argparse.Namespace:
    """Return the options of the loaders for a training on `root/train` with the published augmentation.

    Args:
        root: Folder with `train/`.
        batch_size: Images per batch.
        workers: Number of data-loading processes.
    """
    parser = ArgumentParser()
    for add_options in (add_data_options, add_augmentation_options, add_loader_options):
        add_options(parser)
    parser.set_defaults(input_size=224, batch_size=batch_size, seed=0, repeated_aug=False)
    return parser.parse_args(["--data-path", str(root), "--num_workers", str(workers)])


def build_our_loader(args: argparse.Namespace) -> DataLoader:
    """Build main.py's training loader."""
    return build_train_loader(args, Processes(torch.device("cpu")), args.batch_size)


def build_timms_loader(args: argparse.Namespace, collate: Callable | None = None) -> DataLoader:
    """Build timm's training loader from the options of ours; `collate` replaces its collate function."""
    dataset = ImageDataset(str(Path(args.data_path, "train")))
    loader = create_loader(
        dataset,
        (3, args.input_size, args.input_size),
        args.batch_size,
        is_training=True,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        collate_fn=collate,
        device=torch.device("cpu"),
    )
    for change in dataset.transform.transforms:
        for operation in getattr(change, "ops", []):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize  # the policy sometimes asks for 0 bits, which Pillow 13 refuses
    return loader


def build_torchvisions_loader(args: argparse.Namespace) -> DataLoader:
    """Build a training loader with torchvision's transforms from the options of ours."""
    transform = v2.Compose(  # in the order of torchvision's reference scripts
        [
            v2.RandomResizedCrop(args.input_size, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(interpolation=v2.InterpolationMode.BICUBIC),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*STATISTICS),
            v2.RandomErasing(args.reprob),
        ]
    )
    return DataLoader(
        torchvision.datasets.ImageFolder(Path(args.data_path, "train"), transform),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
    )


# ------------------------------------------------------------------------------------------------------ measurements


def load_our_images(loader: DataLoader) -> None:
    """Load all images of our loader and normalise them; it gives bytes."""
    for images, _targets in loader:
        images.normalise()


def load_images(loader: DataLoader) -> None:
    """Load all images of another loader, which normalises them itself."""
    for _ in loader:
        pass


def run_pipelines(root: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the pipelines in turns on the same files, print a table, and return its rows."""
    options = parse_loading(root, args.batch_size, args.workers)
    ours, timms = build_our_loader(options), build_timms_loader(options)
    torchvisions = build_torchvisions_loader(options)
    passes = {
        "ours": lambda: load_our_images(ours),
        "timm": lambda: load_images(timms),
        "torchvision": lambda: load_images(torchvisions),
    }
    times = time_in_turns(list(passes.values()), args.turns, torch.device("cpu"), "data loaders")
    counts = [len(loader) * args.batch_size for loader in (ours, timms, torchvisions)]
    return report_loops(passes, times, counts)


def report_loops(names: Iterable[str], times: Sequence[Sequence[float]], counts: Sequence[int]) -> list[dict[str, Any]]:
    """Print and return a row for each of several loops over images, of which the first is ours.

    Args:
        names: Name of each loop.
        times: Seconds of each loop in each turn.
        counts: Images of each loop.
    """
    rows = []
    image_times = [[seconds / count for seconds in loop] for loop, count in zip(times, counts, strict=True)]
    for name, loop_times in zip(names, image_times, strict=True):
        speed = 1 / statistics.median(loop_times)
        row = {"loop": name, "images_per_second": speed, **compare(image_times[0], loop_times)}
        rows.append(row)
        logger.info("%-22s%8.1f images/s   ours %.2f times as fast (%.2f to %.2f)", *row.values())
    return rows


# ------------------------------------------------------------------------------------------------------ command line


def get_parser() -> ArgumentParser:
    """Return the parser."""
    parser = build_parser("pipeline", __doc__)
    add_image_options(parser)
    add_measurement_options(parser)
    add_script_options(parser)
    return parser


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Measure the pipelines and report the results."""
    check_image_options(args)
    check_report(args.json)
    set_threads(1)
    with training_images(args) as root:
        rows = run_pipelines(root, args)
    write_report(args, processes.device, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; `core.launch.run_script` says how it ends."""
    parser = get_parser()
    run_script(parser.prog, run, parser.parse_args(argv))


if __name__ == "__main__":
    main()
