"""Classification data sets and their loaders: folders as in ImageNet, CIFAR-100, iNaturalist and the embedded shapes.

To add a data set, write a class with `classes` and `__getitem__ -> (image, class index)`, and add a line to
`DATA_SETS` at the end of this file.
"""

import argparse
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from core import shapes
from core.distributed import Processes
from core.images import BadImageError, decode_image, log_unused
from core.options import POSITIVE_INT, loader_options
from models.weights import shorten
from samplers import SampleKey, SeededSet, TrainSampler
from transforms import TrainImages, build_eval_transform, build_train_transform, collate_train_images
from utils import UserError

logger = logging.getLogger("twins")

INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
IGNORED_TARGET = -1  # target of images that the evaluation does not count
SHAPES_TRAIN, SHAPES_VAL = 10000, 1000  # number of images


def add_data_options(group) -> None:
    """Add the options of the data set; `build_dataset`, the loaders and, for `--nb-classes`, main.py read them."""
    group.add_argument("--data-path", metavar="FOLDER", help="folder of the data set; not needed for SHAPES")
    group.add_argument(
        "--data-set",
        default="IMNET",
        choices=DATA_SETS,
        help="IMNET: folders train/ and val/ with one folder of images per class; CIFAR: CIFAR-100; SHAPES: drawn by "
        "the program, for tests and first runs",
    )
    group.add_argument(
        "--inat-category",
        default="name",
        choices=INAT_CATEGORIES,
        help="taxonomic level of the classes of INAT and INAT19",
    )
    group.add_argument(
        "--nb-classes",
        type=POSITIVE_INT,
        help="expected number of classes, checked against the data (default: not checked)",
    )
    group.add_argument(
        "--bad-image",
        default="raise",
        choices=("raise", "skip"),
        help="raise: stop at an unreadable image; skip: replace it by another image in training, omit it in evaluation",
    )


def build_train_loader(args: argparse.Namespace, processes: Processes, global_batch: int) -> DataLoader:
    """Build the loader of the training set."""
    dataset = TrainSet(build_dataset(True, args), args.seed, bad_image=args.bad_image)
    sampler = TrainSampler(
        len(dataset),
        global_batch=global_batch,
        world_size=processes.world_size,
        rank=processes.rank,
        seed=args.seed,
        repeats=3 if args.repeated_aug else 1,
    )
    loading = loader_options(args, processes.device)
    return DataLoader(dataset, batch_size=args.batch_size, sampler=sampler, collate_fn=collate_train_images, **loading)


def build_val_loader(args: argparse.Namespace, processes: Processes) -> DataLoader:
    """Build the loader of the validation set; with --dist-eval, of this process's part of it."""
    dataset = EvalSet(build_dataset(False, args), args.bad_image)
    share = range(processes.rank, len(dataset), processes.world_size) if args.dist_eval else range(len(dataset))
    return DataLoader(
        dataset, batch_size=int(1.5 * args.batch_size), sampler=share, **loader_options(args, processes.device)
    )


def build_dataset(is_train: bool, args) -> Dataset:
    """Build the training or validation set of `--data-set`, of `(image, class index)`, with the names in `classes`.

    Raises:
        UserError: If the data are missing or their layout is not that described in README.md.
    """
    transform = build_train_transform(args) if is_train else build_eval_transform(args)
    try:
        return DATA_SETS[args.data_set](args, is_train, transform)
    except OSError as error:
        raise UserError(
            f"{error.filename or args.data_path}: cannot be read ({error.strerror or error}); check the permissions"
        ) from error


def data_root(args) -> Path:
    """Return the folder of `--data-path`; raise a UserError if it is not given or not a folder."""
    if not args.data_path:
        raise UserError(f"--data-path is missing; pass the folder of {args.data_set}")
    if not os.path.isdir(args.data_path):
        raise UserError(f"--data-path {args.data_path!r} is not a folder; pass the folder of {args.data_set}")
    return Path(args.data_path)


@dataclass
class TrainSet(SeededSet):
    """A training set indexed by `SampleKey`, whose augmentation depends on (seed, epoch, index, copy) alone.

    With `bad_image="skip"` the next readable image replaces an image that cannot be decoded.
    """

    bad_image: str = "raise"

    def get(self, key: SampleKey) -> tuple[TrainImages, int]:
        for offset in range(len(self)):
            try:
                return self.dataset[(key.index + offset) % len(self)]
            except BadImageError as error:
                _handle_bad_image(error, self.bad_image)
        raise UserError("the training set has no readable image")


@dataclass
class EvalSet(Dataset):
    """An evaluation set. With `bad_image="skip"` unreadable images get the target `IGNORED_TARGET`."""

    dataset: Dataset
    bad_image: str = "raise"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            return self.dataset[index]
        except BadImageError as error:
            _handle_bad_image(error, self.bad_image)
            return self.dataset.transform(Image.new("RGB", (256, 256))), IGNORED_TARGET


class Shapes(Dataset):
    """The embedded data set: one shape per image, drawn on demand at the input size, with balanced classes."""

    def __init__(self, is_train: bool, size: int, transform: Callable):
        self.classes = list(shapes.CLASSES)
        self.split, self.length = (0, SHAPES_TRAIN) if is_train else (1, SHAPES_VAL)
        self.size = size
        self.transform = transform

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        label = index % len(self.classes)
        scene = shapes.draw_scene((self.split, index), self.size, labels=[label], radii=shapes.LARGE_RADII)
        return self.transform(scene.image), label


class INaturalist(Dataset):
    """iNaturalist 2018 or 2019 in the published layout: {train,val}{year}.json, categories.json and image folders.

    The image paths in the JSON files are relative to their folder. Classes are those of `--inat-category`.
    """

    def __init__(self, args: argparse.Namespace, is_train: bool, transform: Callable, year: int):
        root, category = data_root(args), args.inat_category
        taxonomy = _read_json(root / "categories.json")
        train = _read_json(root / f"train{year}.json")
        part = train if is_train else _read_json(root / f"val{year}.json")

        def class_name(annotation: dict) -> str:
            return str(taxonomy[int(annotation["category_id"])][category])

        try:
            # As in DeiT, classes are numbered in the order of their first training annotation.
            self.classes = list(dict.fromkeys(class_name(item) for item in train["annotations"]))
            numbers = {name: number for number, name in enumerate(self.classes)}
            files = {item["id"]: item["file_name"] for item in part["images"]}
            self.samples = [
                (str(root / files[item["image_id"]]), numbers[class_name(item)]) for item in part["annotations"]
            ]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{root}: the JSON files do not match ({type(error).__name__}: {error}); use categories.json, "
                f"train{year}.json and val{year}.json of iNaturalist {year}, whose categories have {category!r}"
            ) from error
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return self.transform(decode_image(path, "RGB")), label


def _open_image_folder(root: Path, is_train: bool, transform: Callable) -> Dataset:
    """Open `root/train` or `root/val`, with one folder per class; both must have the same classes."""
    folder = root / ("train" if is_train else "val")
    classes = {
        side: {entry.name for entry in os.scandir(root / side) if entry.is_dir()}
        for side in ("train", "val")
        if (root / side).is_dir()
    }
    if folder.name not in classes:
        raise UserError(f"{folder} is missing; {root} should contain train/ and val/ with one folder per class")
    differing = sorted(set.symmetric_difference(*classes.values())) if len(classes) == 2 else []
    if differing:
        raise UserError(
            f"{root}: train/ has {len(classes['train'])} classes and val/ has {len(classes['val'])}; "
            f"{shorten(differing)} in one of them only; both need the same folders"
        )
    if not classes[folder.name]:
        raise UserError(f"{folder} contains no class folders; it should contain one folder of images per class")
    others = []

    def is_image(path: str) -> bool:
        if path.lower().endswith(IMG_EXTENSIONS):
            return True
        others.append(Path(path))
        return False

    loader = partial(decode_image, mode="RGB")  # as torchvision's own, which ignores an EXIF orientation
    dataset = torchvision.datasets.ImageFolder(folder, transform, None, loader, is_image, allow_empty=True)
    log_unused(folder, others)
    filled = set(dataset.targets)
    empty = [name for name, label in dataset.class_to_idx.items() if label not in filled]
    if empty:
        raise UserError(f"{folder}: no images in {shorten(empty)}; add some, or remove the class from train/ and val/")
    return dataset


def _open_cifar(root: Path, is_train: bool, transform: Callable) -> Dataset:
    try:
        return torchvision.datasets.CIFAR100(str(root), train=is_train, transform=transform)
    except RuntimeError as error:
        raise UserError(
            f"{root}: does not contain a complete CIFAR-100; download it with "
            f'python -c "from torchvision.datasets import CIFAR100; CIFAR100({str(root)!r}, download=True)"'
        ) from error


def _read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the file is part of the data set") from error
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); download it again") from error


def _handle_bad_image(error: BadImageError, policy: str) -> None:
    """Raise the error with a remedy, or log that the image is skipped, depending on `--bad-image`."""
    if policy == "raise":
        raise BadImageError(f"{error}; repair or remove it, or pass --bad-image skip") from error
    logger.warning("skipped: %s", error)


# Names of --data-set to functions `(args, is_train, transform)` that open the training or validation set.
DATA_SETS = {
    "IMNET": lambda args, is_train, transform: _open_image_folder(data_root(args), is_train, transform),
    "CIFAR": lambda args, is_train, transform: _open_cifar(data_root(args), is_train, transform),
    "INAT": lambda args, is_train, transform: INaturalist(args, is_train, transform, 2018),
    "INAT19": lambda args, is_train, transform: INaturalist(args, is_train, transform, 2019),
    "SHAPES": lambda args, is_train, transform: Shapes(is_train, args.input_size, transform),
}
