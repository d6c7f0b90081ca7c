"""Classification data: ImageNet-like folders, CIFAR-100, iNaturalist and embedded shapes, and their transforms.

To add a data set, write a class with `classes` and `__getitem__ -> (image, class index)`, and a line in
`build_dataset`.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset

from core import shapes
from core.images import BadImageError, load_image
from samplers import SampleKey, SeededSet
from transforms import View, build_transform
from utils import UserError

logger = logging.getLogger("twins")

DATA_SETS = ("IMNET", "CIFAR", "INAT", "INAT19", "SHAPES")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
BAD_IMAGE_POLICIES = ("raise", "skip")
IGNORED_TARGET = -1  # target of an image that evaluation must not count
SHAPES_TRAIN, SHAPES_VAL = 10000, 1000  # images
SHAPES_RADII = (0.33, 0.45)  # share of the image's side: one object, rather large


def build_dataset(is_train: bool, args) -> Dataset:
    """Build the training or the validation set that `--data-set` names.

    Returns:
        A data set of `(image, class index)` with `classes`, the names of its classes in order.

    Raises:
        UserError: If the data are missing, or not laid out as described in README.md.
    """
    transform = build_transform(is_train, args)
    if args.data_set == "SHAPES":
        return Shapes(is_train, args.input_size, transform)
    if not args.data_path:
        raise UserError(f"--data-path is missing; name the folder that holds {args.data_set}")
    root = Path(args.data_path)
    if not os.path.isdir(root):
        raise UserError(f"--data-path {args.data_path!r} is no folder; name the one that holds {args.data_set}")
    if args.data_set == "CIFAR":
        return _open_cifar(root, is_train, transform)
    if args.data_set in ("INAT", "INAT19"):
        year = 2018 if args.data_set == "INAT" else 2019
        return INaturalist(root, is_train, year, args.inat_category, transform)
    return _open_image_folder(root, is_train, transform)


class TrainSet(SeededSet):
    """A training set asked by `SampleKey`: augmentation depends on (seed, epoch, index, copy) alone.

    With `bad_image="skip"` the next readable image takes the place of one that cannot be decoded.
    """

    def __init__(self, dataset: Dataset, seed: int, bad_image: str = "raise"):
        super().__init__(dataset, seed)
        self.bad_image = bad_image

    def get(self, key: SampleKey) -> tuple[View, int]:
        for offset in range(len(self)):
            try:
                return self.dataset[(key.index + offset) % len(self)]
            except BadImageError as error:
                _tolerate(error, self.bad_image)
        raise UserError("the training set has no readable image")


class EvalSet(Dataset):
    """An evaluation set. With `bad_image="skip"` an unreadable image gets a target that is not counted."""

    def __init__(self, dataset: Dataset, bad_image: str = "raise"):
        self.dataset = dataset
        self.bad_image = bad_image

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            return self.dataset[index]
        except BadImageError as error:
            _tolerate(error, self.bad_image)
            return self.dataset.transform(Image.new("RGB", (256, 256))), IGNORED_TARGET


class Shapes(Dataset):
    """The embedded data set: one shape an image, drawn on demand at the input size; all classes equally often."""

    def __init__(self, is_train: bool, size: int, transform: Callable):
        self.classes = list(shapes.CLASSES)
        self.split = 0 if is_train else 1
        self.length = SHAPES_TRAIN if is_train else SHAPES_VAL
        self.size = size
        self.transform = transform

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        label = index % len(self.classes)
        scene = shapes.draw_scene((self.split, index), self.size, labels=[label], radii=SHAPES_RADII)
        return self.transform(scene.image), label


class INaturalist(Dataset):
    """iNaturalist 2018 or 2019 as published: {train,val}{year}.json, categories.json and the image folders.

    Args:
        root: Folder of the JSON files; image paths in them are relative to it.
        is_train: Training or validation part.
        year: 2018 or 2019.
        category: Level of the taxonomy to classify by, one of `INAT_CATEGORIES`.
        transform: Applied to each PIL image.
    """

    def __init__(self, root: Path, is_train: bool, year: int, category: str, transform: Callable):
        taxonomy = _read_json(root / "categories.json")
        train = _read_json(root / f"train{year}.json")
        part = train if is_train else _read_json(root / f"val{year}.json")

        def class_name(annotation: dict) -> str:
            return str(taxonomy[int(annotation["category_id"])][category])

        try:
            # Classes are numbered in the order in which the training annotations name them, as DeiT does.
            self.classes = list(dict.fromkeys(class_name(item) for item in train["annotations"]))
            numbers = {name: number for number, name in enumerate(self.classes)}
            files = {item["id"]: item["file_name"] for item in part["images"]}
            self.samples = [
                (str(root / files[item["image_id"]]), numbers[class_name(item)]) for item in part["annotations"]
            ]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{root}: the JSON files do not fit together ({type(error).__name__}: {error}); they should be "
                f"categories.json, train{year}.json and val{year}.json of iNaturalist {year}, with {category!r} given"
            ) from error
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return self.transform(load_image(path)), label


def _open_image_folder(root: Path, is_train: bool, transform: Callable) -> Dataset:
    """Open `root/train` or `root/val`, one folder a class, after checking that both sides have the same classes."""
    folder = root / ("train" if is_train else "val")
    classes = {side: _subfolders(root / side) for side in ("train", "val") if (root / side).is_dir()}
    if folder.name not in classes:
        raise UserError(f"{folder} is missing; {root} should hold train/ and val/ with one folder for each class")
    differing = sorted(set.symmetric_difference(*classes.values())) if len(classes) == 2 else []
    if differing:
        raise UserError(
            f"{root}: train/ has {len(classes['train'])} classes and val/ {len(classes['val'])}, and "
            f"{_some(differing)} on one side only; both need the same folders"
        )
    if not classes[folder.name]:
        raise UserError(f"{folder} holds no class folders; it should have one folder of images for each class")
    try:
        dataset = torchvision.datasets.ImageFolder(folder, transform, loader=load_image, allow_empty=True)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be read ({error.strerror}); check the permissions"
        ) from error
    filled = set(dataset.targets)
    empty = [name for name, label in dataset.class_to_idx.items() if label not in filled]
    if empty:
        raise UserError(f"{folder}: no images in the class folder {_some(empty)}; fill it, or remove it on both sides")
    return dataset


def _open_cifar(root: Path, is_train: bool, transform: Callable) -> Dataset:
    try:
        return torchvision.datasets.CIFAR100(str(root), train=is_train, transform=transform)
    except RuntimeError as error:
        raise UserError(
            f"{root}: holds no whole CIFAR-100; fetch it with "
            f'python -c "from torchvision.datasets import CIFAR100; CIFAR100({str(root)!r}, download=True)"'
        ) from error


def _read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); it comes with the data set") from error
    except ValueError as error:
        raise UserError(f"{path}: is no valid JSON ({error}); fetch it again") from error


def _subfolders(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder) if entry.is_dir()}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); check the permissions") from error


def _some(names: Sequence[str], limit: int = 5) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _tolerate(error: BadImageError, policy: str) -> None:
    """Raise the error with its remedy, or say that the image is skipped, as `--bad-image` asks."""
    if policy == "raise":
        raise BadImageError(f"{error}; repair or remove it, or pass --bad-image skip") from error
    logger.warning("skipped: %s", error)
