"""Data sets of semantic segmentation: ADE20K, your own folders in the same layout, and the embedded shapes.

A data set returns `(image, labels)`: an RGB image, uint8 `(3, H, W)`, and class indices or `IGNORED_LABEL`, uint8
`(H, W)`. To add a data set, write a class with `classes`, `colours`, `first_label`, `name(index)` and `__getitem__`,
add it to `build_dataset`, and add its name to `dataset` in `configs/recipes.py`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from core import shapes
from core.images import decode_image, load_image, make_colours
from utils import UserError

SHAPES_TRAIN, SHAPES_VAL = 10_000, 500  # images
IGNORED_LABEL = 255  # of pixels that neither the loss nor the evaluation counts

ADE20K_CLASSES = Path(__file__).with_name("ade20k_classes.txt")  # labelled 1 to 150 in the files

Sample = tuple[Tensor, Tensor]


def build_dataset(kind: str, data_root: str, is_train: bool, shapes_size: int) -> Dataset:
    """Build the training or the validation part of a data set.

    Args:
        kind: `"ade20k"`, `"folder"` or `"shapes"`.
        data_root: Folder of the files; unused for shapes.
        is_train: True for the training part, False for the validation part.
        shapes_size: Side length of the shapes' images in pixels.

    Raises:
        UserError: If the files are missing or inconsistent.
    """
    if kind == "shapes":
        return Shapes(is_train, shapes_size)
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; set the folder of the data set with --data-root")
    split = "training" if is_train else "validation"
    if kind == "ade20k":
        return MaskFolder(root, split, *read_classes(ADE20K_CLASSES), first_label=1)
    return MaskFolder(root, split, *read_classes(root / "classes.txt"))


class MaskFolder(Dataset):
    """Images, and PNG files with the class of each pixel, in the layout of ADE20K.

    The labels of `images/{training,validation}/NAME.jpg` are `annotations/{training,validation}/NAME.png`; NAME may
    contain folders.

    Args:
        root: Folder of `images` and `annotations`.
        split: `"training"` or `"validation"`.
        classes: Names of the classes.
        colours: RGB colours of the classes.
        first_label: Label of the first class in the files. Lower labels and 255 are ignored.

    Raises:
        UserError: If a folder or a label file is missing.
    """

    def __init__(self, root: Path, split: str, classes: Sequence[str], colours: Sequence[tuple], first_label: int = 0):
        self.classes, self.colours, self.first_label = list(classes), list(colours), first_label
        self.images, self.labels = root / "images" / split, root / "annotations" / split
        for folder in (self.images, self.labels):
            if not folder.is_dir():
                raise UserError(
                    f"{folder} is missing; {root} must hold images/ and annotations/, each with training/ and "
                    "validation/"
                )
        files = (file for file in self.images.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
        self.files = sorted(file.relative_to(self.images) for file in files)
        if not self.files:
            raise UserError(f"{self.images} holds no images (.jpg, .jpeg or .png)")
        pngs = (file for file in self.labels.rglob("*") if file.suffix.lower() == ".png")
        self.label_files = {file.relative_to(self.labels).with_suffix(""): file for file in pngs}
        seen = set()
        for file in self.files:
            if file.with_suffix("") not in self.label_files:
                label = self.labels / file.with_suffix(".png")
                raise UserError(f"{self.images / file}: has no labels; {label} is missing")
            if file.with_suffix("") in seen:
                raise UserError(f"{self.images / file}: is a second image with this name; rename or remove it")
            seen.add(file.with_suffix(""))

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the name of an image's file without its suffix."""
        return str(self.files[index].with_suffix(""))

    def __getitem__(self, index: int) -> Sample:
        image_path = self.images / self.files[index]
        image = pil_to_tensor(load_image(str(image_path)))
        label_path = self.label_files[self.files[index].with_suffix("")]
        labels = self._read_labels(label_path)
        if labels.shape != image.shape[1:]:
            (height, width), (h, w) = image.shape[1:], labels.shape
            raise UserError(
                f"{label_path}: has {w}x{h} pixels, but {image_path} has {width}x{height}; each pixel needs a label"
            )
        return image, labels

    def _read_labels(self, path: Path) -> Tensor:
        image = decode_image(str(path))
        if image.mode not in ("L", "P", "1"):
            raise UserError(
                f"{path}: is a PNG of mode {image.mode}; labels must be one channel of 8 bits, the class of each pixel"
            )
        stored = np.array(image, dtype=np.int16)
        labels = np.where((stored < self.first_label) | (stored == 255), IGNORED_LABEL, stored - self.first_label)
        highest = stored[labels != IGNORED_LABEL].max(initial=0)
        last = len(self.classes) - 1 + self.first_label
        if highest > last:
            raise UserError(
                f"{path}: has the label {highest}, but there are {len(self.classes)} classes, labelled "
                f"{self.first_label} to {last}; 255 marks ignored pixels"
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

    A line is a name and, optionally, an RGB colour: `traffic light 250 170 30`. Other classes get a colour.

    Raises:
        UserError: If the file is missing, not in UTF-8, or holds no class or too many.
    """
    try:
        lines = [line.split() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not in UTF-8 ({error}); save it in UTF-8") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); write one class per line in it, with a colour if you like: "
            "road 128 64 128"
        ) from error
    if not 0 < len(lines) < IGNORED_LABEL:
        raise UserError(f"{path}: has {len(lines)} classes; it must have 1 to {IGNORED_LABEL - 1}, one per line")
    names, colours = [], make_colours(len(lines))
    for i, words in enumerate(lines):
        has_colour = len(words) > 3 and all(word.isdigit() and int(word) < 256 for word in words[-3:])
        names.append(" ".join(words[:-3] if has_colour else words))
        colours[i] = tuple(map(int, words[-3:])) if has_colour else colours[i]
    return names, colours
