"""Measure the input pipeline on the CPU: main.py's data loader beside timm's and torchvision's, in turns.

    python -m benchmarks.pipeline                            # images/s of one data-loading process, on drawn images
    python -m benchmarks.pipeline --data path_to_imagenet    # on your own images

All three load the same files in the published augmentation, or torchvision's nearest, and normalise them.
"""

import argparse
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torchvision
from timm.data import ImageDataset, create_loader
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.common import Row, build_parser, compare, describe_machine, print_table, time_in_turns, write_report
from core import shapes
from core.distributed import Processes, cores_per_process
from core.images import load_image
from core.launch import run_script
from core.meters import show_progress
from core.options import POSITIVE_INT, ArgumentParser, add_loader_options, number
from datasets import add_data_options, build_train_loader
from transforms import STATISTICS, TrainImages, add_augmentation_options, posterize
from utils import UserError

logger = logging.getLogger("twins")


def build_images_parser(name: str, description: str, models_help: str = "") -> ArgumentParser:
    """Build the parser of a benchmark on the CPU that loads images; the arguments are those of `build_parser`."""
    parser = build_parser(name, description, models_help)
    group = parser.add_argument_group("images")
    layout = "folder whose train/ has one folder of images per class (default: draw images)"
    group.add_argument("--data", metavar="FOLDER", help=layout)
    group.add_argument("--images", default=512, type=POSITIVE_INT, metavar="N", help="images per pass, at most")
    workers = number(int, 0, cores_per_process())
    group.add_argument("--workers", default=1, type=workers, metavar="N", help="number of data-loading processes")
    group.add_argument("--traceback", action="store_true", help="show the traceback of input errors, too")
    parser.set_defaults(device="cpu", dist_url="env://", deterministic=False)  # which `run_script` reads
    return parser


@contextmanager
def training_images(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """Write or link images into a temporary folder, and return the options of main.py that load them."""
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            link_images(Path(args.data), Path(folder), args.images)
        else:
            draw_images(Path(folder), args.images)
        count = sum(1 for _ in Path(folder).glob("train/*/*"))
        if count < args.batch_size:
            raise UserError(f"--batch-size {args.batch_size}: there are {count} images, fewer than a batch; lower it")
        logger.info("%s; %d data-loading processes", describe_machine(torch.device("cpu")), args.workers)
        logger.info("%d images, cropped to 224x224, batch %d; %d turns", count, args.batch_size, args.turns)
        yield parse_loading(folder, args.batch_size, args.workers)


def draw_images(root: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """Draw JPEG files of a width and height in pixels, by default usual ones of ImageNet, in `root/train`."""
    for i in show_progress(range(count), "drawing images"):
        labels = [(i + k) % len(shapes.CLASSES) for k in range(3)]
        image = shapes.draw_scene((9, i), max(size), labels=labels).image.crop((0, 0, *size))
        path = root / "train" / shapes.CLASSES[i % 4] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


def link_images(source: Path, root: Path, count: int) -> None:
    """Link evenly spaced images of `source/train`, at most `count`, in `root/train`, in the same classes."""
    try:
        dataset = torchvision.datasets.ImageFolder(source / "train")
    except OSError as error:
        raise UserError(f"--data {source}: {error}; name a folder whose train/ has one folder per class") from error
    count = min(count, len(dataset))
    for i in show_progress(range(count), "checking images"):
        path, label = dataset.samples[i * len(dataset) // count]
        load_image(path)  # an error names the file itself, not a link to it
        link = root / "train" / dataset.classes[label] / f"{i}{Path(path).suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(path).resolve())


def parse_loading(root: str | Path, batch_size: int, workers: int) -> argparse.Namespace:
    """Return the options of main.py that load `root/train` in the published augmentation."""
    parser = ArgumentParser()
    for add_options in (add_data_options, add_augmentation_options, add_loader_options):
        add_options(parser)
    parser.set_defaults(input_size=224, batch_size=batch_size, seed=0, repeated_aug=False)
    return parser.parse_args(["--data-path", str(root), "--num_workers", str(workers)])


def build_timms_loader(args: argparse.Namespace, collate: Callable | None = None) -> DataLoader:
    """Build timm's training loader from the options of ours; `collate` replaces its collate function."""
    dataset = ImageDataset(str(Path(args.data_path, "train")))
    augmentation = {"color_jitter": args.color_jitter, "auto_augment": args.aa, "re_prob": args.reprob}
    augmentation |= {"interpolation": args.train_interpolation, "re_mode": args.remode}
    loading = {"num_workers": args.num_workers, "persistent_workers": args.num_workers > 0, "collate_fn": collate}
    size, loading["device"] = (3, args.input_size, args.input_size), torch.device("cpu")
    loader = create_loader(dataset, size, args.batch_size, is_training=True, **augmentation, **loading)
    for change in dataset.transform.transforms:
        for operation in getattr(change, "ops", []):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize  # the policy sometimes asks for 0 bits, which Pillow 13 refuses
    return loader


def build_torchvisions_loader(args: argparse.Namespace) -> DataLoader:
    """Build a training loader with torchvision's transforms, in the order of its scripts, from the options of ours."""
    transforms = [
        v2.RandomResizedCrop(args.input_size, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(interpolation=v2.InterpolationMode.BICUBIC),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(*STATISTICS),
        v2.RandomErasing(args.reprob),
    ]
    dataset = torchvision.datasets.ImageFolder(Path(args.data_path, "train"), v2.Compose(transforms))
    loading = {"num_workers": args.num_workers, "persistent_workers": args.num_workers > 0}
    return DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True, **loading)


def load_images(loader: DataLoader) -> None:
    """Load all images of a loader, and normalise them where the loader gives bytes, as ours."""
    for images, _targets in loader:
        if isinstance(images, TrainImages):
            images.normalise()


def compare_loops(times: dict[str, Sequence[float]]) -> Iterator[Row]:
    """Yield a row for each of several loops, the first one ours, from the seconds per image in each turn."""
    ours = next(iter(times.values()))
    for name, loop_times in times.items():
        yield {"loop": name, "images/s": 1 / statistics.median(loop_times), **compare(ours, loop_times)}


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Measure the pipelines in turns on the same files and print a table."""
    torch.set_num_threads(1)
    with training_images(args) as loading:
        ours = build_train_loader(loading, processes, args.batch_size)
        loaders = {"ours": ours, "timm": build_timms_loader(loading), "torchvision": build_torchvisions_loader(loading)}
        (batches,) = {len(loader) for loader in loaders.values()}
        passes = [partial(load_images, loader) for loader in loaders.values()]
        times = time_in_turns(passes, args.turns, processes.device, "data loaders")
    image_times = [[seconds / (batches * args.batch_size) for seconds in loop] for loop in times]
    rows = print_table(compare_loops(dict(zip(loaders, image_times, strict=True))))
    write_report(args, processes.device, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; `core.launch.run_script` says how it ends."""
    run_script("pipeline.py", run, build_images_parser("pipeline", __doc__).parse_args(argv))


if __name__ == "__main__":
    main()
