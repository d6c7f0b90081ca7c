"""Data sets of semantic segmentation: ADE20K, your own folders in the same layout, and the embedded shapes.

A data set returns `(image, labels)`: an RGB image, uint8 `(3, H, W)`, and class indices or `IGNORED_LABEL`, uint8
`(H, W)`. To add a data set, write a class with `classes`, `colours`, `first_label`, `name(index)` and `__getitem__`,
add it to `build_dataset`, and add its name to `dataset` in `configs/recipes.py`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from core import shapes
from core.images import decode_image, load_image, log_unused, make_colours
from segmentation.configs.recipes import Experiment
from utils import UserError

logger = logging.getLogger("twins")

SHAPES_TRAIN, SHAPES_VAL = 10_000, 500  # images
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
IGNORED_LABEL = 255  # of pixels that neither the loss nor the evaluation counts

ADE20K_CLASSES = Path(__file__).with_name("ade20k_classes.txt")  # labelled 1 to 150 in the files

Sample = tuple[Tensor, Tensor]


def build_dataset(experiment: Experiment, part: str) -> Dataset:
    """Build the part `"train"`, `"val"` or `"test"` of an experiment's data; a UserError names missing or bad files."""
    if experiment.dataset == "shapes":
        return Shapes(part == "train", max(experiment.scale))
    root = Path(experiment.data_root)
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; set the folder of the data set with --data-root")
    is_ade20k, train_images = experiment.dataset == "ade20k", root / experiment.train_images
    if not (is_ade20k or train_images.exists() or (root / "classes.txt").exists()):
        raise UserError(
            f"{root}: has neither classes.txt nor {experiment.train_images}; set the folder with --data-root"
        )
    classes, colours = read_classes(ADE20K_CLASSES if is_ade20k else root / "classes.txt")
    images, labels = find_files(experiment, part)
    return MaskFolder(images, labels, classes, colours, int(is_ade20k), experiment.ignored_label)


def find_files(experiment: Experiment, part: str) -> tuple[dict[str, Path], dict[str, Path] | None]:
    """Return the files of a part's images and of their labels, by name; None for the labels of `"test"`."""
    root = Path(experiment.data_root)
    folder, split = root / getattr(experiment, f"{part}_images"), getattr(experiment, f"{part}_split")
    suffixes = [experiment.image_suffix] if experiment.image_suffix else IMAGE_SUFFIXES
    images, others = _list_files(folder, f"{part}_images", suffixes)
    if not experiment.image_suffix:
        log_unused(folder, filter(Path.is_file, others), "; image_suffix chooses another suffix")
    if split:
        names = _read_lines(root / split, "write the names of the images in it, one per line, without suffix")
        for name in names:
            if name not in images:
                raise UserError(f"{root / split}: lists {name}, but {folder / name}{suffixes[0]} is missing")
        images = {name: images[name] for name in names}
    if not images:
        raise UserError(f"{split or folder} holds no images ({', '.join(suffixes)})")
    if part == "test":
        return images, None
    folder = root / getattr(experiment, f"{part}_labels")
    labels, _ = _list_files(folder, f"{part}_labels", [experiment.label_suffix])
    for name, image in images.items():
        if name not in labels:
            raise UserError(f"{image}: has no labels; {folder / name}{experiment.label_suffix} is missing")
    return images, labels


@dataclass
class MaskFolder(Dataset):
    """Images, and PNG files with the class of each pixel. Without such files all pixels are ignored."""

    images: dict[str, Path]  # files of the images, by name
    labels: dict[str, Path] | None  # files of the labels, by the same names
    classes: list[str]  # names of the classes
    colours: list[tuple[int, ...]]  # RGB colours of the classes
    first_label: int = 0  # label of the first class in the files; lower labels are ignored
    ignored_label: int = 255  # label in the files that is ignored, as 255 is

    def __post_init__(self):
        self.names = list(self.images)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the name of an image's file without its suffix."""
        return self.names[index]

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        image = pil_to_tensor(load_image(str(self.images[name])))
        if self.labels is None:
            return image, torch.full(image.shape[1:], IGNORED_LABEL, dtype=torch.uint8)
        labels = read_labels(self.labels[name], len(self.classes), self.first_label, self.ignored_label)
        if labels.shape != image.shape[1:]:
            (height, width), (h, w) = image.shape[1:], labels.shape
            raise UserError(
                f"{self.labels[name]}: has {w}x{h} pixels, but {self.images[name]} has {width}x{height}; each pixel "
                "needs a label"
            )
        return image, labels


def read_labels(path: Path, num_classes: int, first_label: int, ignored_label: int = 255) -> Tensor:
    """Read a PNG file of labels as class indices or `IGNORED_LABEL`, uint8 `(H, W)`; see `MaskFolder`."""
    image = decode_image(str(path))
    if image.mode not in ("L", "P", "1"):
        raise UserError(
            f"{path}: is a PNG of mode {image.mode}; labels must be one channel of 8 bits, the class of each pixel"
        )
    stored = np.array(image, dtype=np.int16)
    is_ignored = (stored < first_label) | (stored == 255) | (stored == ignored_label)
    labels = np.where(is_ignored, IGNORED_LABEL, stored - first_label)
    highest, last = stored[~is_ignored].max(initial=0), num_classes - 1 + first_label
    if highest > last:
        raise UserError(
            f"{path}: has the label {highest}, but there are {num_classes} classes, labelled {first_label} to {last}; "
            "255 and ignored_label mark ignored pixels"
        )
    return torch.from_numpy(labels.astype(np.uint8))


class Shapes(Dataset):
    """The embedded data set: one shape per image; the background is a class, too."""

    first_label = 0

    def __init__(self, is_train: bool, size: int):
        self.classes = ["background", *shapes.CLASSES]
        self.colours = [(60, 60, 60), *make_colours(len(shapes.CLASSES))]
        self.split, self.length = (0, SHAPES_TRAIN) if is_train else (1, SHAPES_VAL)
        self.size = size

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"{index:05}"

    def __getitem__(self, index: int) -> Sample:
        scene = shapes.draw_scene((self.split, index), self.size, radii=shapes.LARGE_RADII)
        labels = np.zeros((self.size, self.size), np.uint8)
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            labels[mask] = label + 1
        return pil_to_tensor(scene.image), torch.from_numpy(labels)


def read_classes(path: Path) -> tuple[list[str], list[tuple[int, ...]]]:
    """Read the names and colours of classes from a file with one class per line, in the order of their labels.

    A line is a name and, optionally, an RGB colour: `traffic light 250 170 30`. Other classes get other colours. Raises
    a UserError if the file is missing, not in UTF-8, or holds no class or too many.
    """
    remedy = "write one class per line in it, with a colour if you like: road 128 64 128"
    lines = [line.split() for line in _read_lines(path, remedy)]
    if not 0 < len(lines) < IGNORED_LABEL:
        raise UserError(f"{path}: has {len(lines)} classes; it must have 1 to {IGNORED_LABEL - 1}, one per line")
    names, given = [], {}
    for i, words in enumerate(lines):
        if len(words) > 3 and all(word.isdigit() and int(word) < 256 for word in words[-3:]):
            given[i] = tuple(map(int, words[-3:]))
        names.append(" ".join(words[:-3] if i in given else words))
    others = (colour for colour in make_colours(len(lines) + len(given)) if colour not in given.values())
    return names, [given[i] if i in given else next(others) for i in range(len(lines))]


def _read_lines(path: Path, remedy: str) -> list[str]:
    """Return the lines of a file without surrounding spaces and empty lines."""
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not in UTF-8 ({error}); save it in UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error


def _list_files(folder: Path, field: str, suffixes: Sequence[str]) -> tuple[dict[str, Path], list[Path]]:
    """Return the files under a folder with one of the suffixes, by their paths without it, and the other paths."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; set the folder with --cfg-options {field}=...")
    files, others = {}, []
    for file in sorted(folder.rglob("*")):
        suffix = next((suffix for suffix in suffixes if file.name.lower().endswith(suffix.lower())), None)
        if suffix is None:
            others.append(file)
            continue
        name = str(file.relative_to(folder))[: -len(suffix)]
        if name in files:
            raise UserError(f"{file}: is a second file with this name; rename or remove it")
        files[name] = file
    return files, others
