"""Data of detection: COCO, one's own data in its format, and embedded shapes; their augmentation and batches.

A data set gives `(image, target)`: a uint8 tensor `(3, H, W)`, RGB, and a dict of `boxes` float32 `(n, 4)` as x1, y1,
x2, y2 in pixels, `labels` int64 `(n,)` from 0 on, `masks` uint8 `(n, H, W)` and `image_id`, the number of the image in
the annotations. Its attribute `coco` has those annotations as pycocotools reads them.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_coding
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from core import shapes
from core.images import load_image
from samplers import EpochSampler, SampleKey
from utils import UserError

SHAPES_TRAIN, SHAPES_VAL = 3000, 300  # images
MIN_SIDE = 32  # pixels; smaller training images are left out

Target = dict[str, Tensor | int]
Sample = tuple[Tensor, Target]


# ------------------------------------------------------------------------------------------------------- data sets


def build_dataset(kind: str, data_root: str, is_train: bool, shapes_size: int) -> Dataset:
    """Build the training or the validation part of a data set.

    Args:
        kind: `"coco"` or `"shapes"`.
        data_root: Where `annotations/instances_{train,val}2017.json`, `train2017/` and `val2017/` are.
        is_train: Which part.
        shapes_size: Pixels a side of the shapes' images.

    Raises:
        UserError: If the files are missing or not as they should be.
    """
    if kind == "shapes":
        return Shapes(is_train, shapes_size)
    root, split = Path(data_root), "train2017" if is_train else "val2017"
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; name the one of the data set with --data-root")
    return CocoDetection(root / split, root / "annotations" / f"instances_{split}.json", is_train)


class CocoDetection(Dataset):
    """Images with boxes and masks in the format of COCO.

    Label i is the i-th of the categories, by ascending id. In training, images without boxes or with a side under
    32 pixels are left out, and so are boxes of crowds or without an area.

    Args:
        folder: Of the images.
        annotations: The JSON file.
        is_train: Whether to leave out what training does not use.

    Raises:
        UserError: If the file is missing, no JSON or does not fit together; the file and the id are named.
    """

    def __init__(self, folder: Path, annotations: Path, is_train: bool):
        self.folder, self.annotations = folder, annotations
        self.coco = read_annotations(annotations)
        self.category_ids = sorted(self.coco.cats)
        self.classes = [self.coco.cats[category]["name"] for category in self.category_ids]
        self.label_of = {category: label for label, category in enumerate(self.category_ids)}
        self.ids = sorted(self.coco.imgs)
        if is_train:
            self.ids = [i for i in self.ids if self._is_trained(i)]
        if not self.ids:
            raise UserError(f"{annotations}: has no images" + " with boxes to train on" * is_train)
        missing = next((i for i in self.ids if not os.path.isfile(folder / self.coco.imgs[i]["file_name"])), None)
        if missing is not None:
            raise UserError(
                f"{folder / self.coco.imgs[missing]['file_name']} is missing; {annotations} lists it as image {missing}"
            )
        self.sizes = [(self.coco.imgs[i]["height"], self.coco.imgs[i]["width"]) for i in self.ids]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        image_id = self.ids[index]
        path = self.folder / self.coco.imgs[image_id]["file_name"]
        image = pil_to_tensor(load_image(str(path)))
        height, width = self.sizes[index]
        if image.shape[1:] != (height, width):
            raise UserError(
                f"{path}: has {image.shape[2]}x{image.shape[1]} pixels, but image {image_id} of the annotations "
                f"{width}x{height}"
            )
        found = self._annotations(image_id)
        boxes = torch.tensor([each["bbox"] for each in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [self._decode_mask(each) for each in found]
        target = {
            "boxes": boxes,
            "labels": torch.tensor([self.label_of[each["category_id"]] for each in found], dtype=torch.int64),
            "masks": torch.from_numpy(np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)),
            "image_id": image_id,
        }
        return image, target

    def _decode_mask(self, annotation: dict) -> np.ndarray:
        try:
            return self.coco.annToMask(annotation)
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"{self.annotations}: the mask of annotation number {annotation['id']}, of image "
                f"{annotation['image_id']}, cannot be decoded ({error}); correct or remove it"
            ) from error

    def _annotations(self, image_id: int) -> list[dict]:
        """Return the annotations of an image that count in training."""
        image = self.coco.imgs[image_id]
        return [
            each
            for each in self.coco.imgToAnns[image_id]
            if not each["iscrowd"] and _is_box(each, image["width"], image["height"])
        ]

    def _is_trained(self, image_id: int) -> bool:
        image = self.coco.imgs[image_id]
        return min(image["width"], image["height"]) >= MIN_SIDE and bool(self._annotations(image_id))


class Shapes(Dataset):
    """The embedded data set: one to four shapes an image, with boxes and masks, in the format of COCO."""

    def __init__(self, is_train: bool, size: int):
        self.classes = list(shapes.CLASSES)
        self.split, self.length = (0, SHAPES_TRAIN) if is_train else (1, SHAPES_VAL)
        self.size = size
        self.category_ids = list(range(1, len(self.classes) + 1))
        self.ids = list(range(self.length))
        self.sizes = [(size, size)] * self.length
        self.coco = None if is_train else self._to_coco()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        scene = shapes.draw_quarters((self.split, index), self.size)
        return pil_to_tensor(scene.image), {
            "boxes": torch.from_numpy(scene.boxes),
            "labels": torch.tensor(scene.labels),
            "masks": torch.from_numpy(scene.masks.astype(np.uint8)),
            "image_id": index,
        }

    def _to_coco(self) -> COCO:
        """Return the annotations in the format of COCO, for the evaluation."""
        annotations = []
        for i in self.ids:
            _, target = self[i]
            for box, label, mask in zip(
                target["boxes"].tolist(), target["labels"].tolist(), target["masks"], strict=True
            ):
                x1, y1, x2, y2 = box
                annotations.append(
                    {
                        **{"id": len(annotations) + 1, "image_id": i, "category_id": label + 1, "iscrowd": 0},
                        **{"bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(mask.sum())},
                        "segmentation": encode_mask(mask.numpy()),
                    }
                )
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)]
        images = [{"id": i, "width": self.size, "height": self.size, "file_name": f"{i:05}"} for i in self.ids]
        return index_annotations({"images": images, "annotations": annotations, "categories": categories, "info": {}})


def encode_mask(mask: np.ndarray) -> dict:
    """Return a mask `(H, W)` as a run-length code that fits into JSON."""
    code = mask_coding.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def read_annotations(path: Path) -> COCO:
    """Read and check a file in the format of COCO.

    Raises:
        UserError: If it is missing, no JSON or does not fit together; the file and the id are named.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); --data-root is the folder that holds annotations/{path.name}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no valid JSON ({error}); fetch it again") from error
    lists = [
        content.get(part) if isinstance(content, dict) else None for part in ("images", "annotations", "categories")
    ]
    if not all(isinstance(each, list) for each in lists):
        raise UserError(f"{path}: is not in the format of COCO; it needs the lists images, annotations and categories")
    try:
        _check_annotations(*lists)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return index_annotations(content)


def _check_annotations(images: list[dict], annotations: list[dict], categories: list[dict]) -> None:
    """Check entries, and complete what some tools leave out of annotations: area, masks, that they are no crowd."""
    known_images, known_categories = _identify("image", images), _identify("category", categories)
    if not categories:
        raise UserError("its list of categories is empty")
    for name, image in known_images.items():
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise UserError(f"image {name} has no file_name")
        for side in ("width", "height"):
            if not isinstance(image.get(side), int) or image[side] <= 0:
                raise UserError(f"image {name} has the {side} {image.get(side)}; it should be a number of pixels")
    for name, category in known_categories.items():
        if not isinstance(category.get("name"), str) or not category["name"]:
            raise UserError(f"category {name} has no name")
    for number, each in enumerate(annotations, 1):
        name = f"annotation {each.get('id', f'number {number}')}" if isinstance(each, dict) else f"entry {number}"
        if not isinstance(each, dict):
            raise UserError(f"{name} of the annotations is no object")
        if not _is_known(each.get("image_id"), known_images):
            raise UserError(f"{name} is of image {each.get('image_id')}, which is not listed")
        if not _is_known(each.get("category_id"), known_categories):
            raise UserError(f"{name} has the category {each.get('category_id')}, which is not listed")
        image = known_images[each["image_id"]]
        _check_box(name, each.get("bbox"), each["image_id"], image["width"], image["height"])
        x, y, w, h = each["bbox"]
        each["segmentation"] = _check_mask(name, each.get("segmentation"), image["width"], image["height"]) or [
            [x, y, x + w, y, x + w, y + h, x, y + h]
        ]
        each.setdefault("iscrowd", 0)
        each.setdefault("area", w * h)
        if not _is_number(each["area"]):
            raise UserError(f"{name} has the area {each['area']}; it should be a number of pixels")
        each["id"] = number  # pycocotools takes an id of 0 for none, and equal ones for one


def _identify(kind: str, entries: list[dict]) -> dict[int, dict]:
    """Return entries by their ids, which must be different whole numbers."""
    known = {}
    for number, each in enumerate(entries, 1):
        if not isinstance(each, dict) or not isinstance(each.get("id"), int):
            raise UserError(f"{kind} number {number} of the list has no id that is a whole number")
        if each["id"] in known:
            raise UserError(f"the {kind} id {each['id']} is there twice")
        known[each["id"]] = each
    return known


def _is_known(number: Any, known: dict[int, dict]) -> bool:
    return isinstance(number, int) and number in known


def _is_number(value: Any) -> bool:
    """Return True for an int or float of a size that pixels can have; NaN is none."""
    return isinstance(value, (int, float)) and -1e9 < value < 1e9


def _check_box(name: str, box: Any, image_id: int, width: int, height: int) -> None:
    numbers = isinstance(box, list) and all(map(_is_number, box))
    if not numbers or len(box) != 4:
        raise UserError(f"{name} has the box {box}; it should be four numbers: x, y, width and height")
    x, y, w, h = box
    if w < 0 or h < 0:
        raise UserError(f"{name} has the box {box}; its width and height should not be negative")
    if x >= width or y >= height or x + w <= 0 < w or y + h <= 0 < h:
        raise UserError(f"{name} has a box {box} outside its image {image_id}, of {width}x{height} pixels")


def _check_mask(name: str, mask: Any, width: int, height: int) -> dict | list | None:
    """Return a mask, less polygons of fewer than three points; None or an empty list where there is none."""
    if isinstance(mask, dict):
        counts = mask.get("counts")
        if isinstance(counts, list):
            whole = all(isinstance(count, int) and count >= 0 for count in counts) and sum(counts) == height * width
        else:
            whole = isinstance(counts, str) and counts != ""
        if mask.get("size") != [height, width] or not whole:
            raise UserError(f"{name} has a mask that is no run-length code of {height}x{width} pixels")
        return mask
    if mask is None:
        return None
    if not isinstance(mask, list) or not all(
        isinstance(each, list) and len(each) % 2 == 0 and all(map(_is_number, each)) for each in mask
    ):
        raise UserError(f"{name} has a segmentation that is neither polygons, each a list x1, y1, x2, ..., nor a code")
    return [polygon for polygon in mask if len(polygon) >= 6]


def index_annotations(content: dict) -> COCO:
    """Return pycocotools' index of annotations, without its messages."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _is_box(annotation: dict, width: int, height: int) -> bool:
    """Tell whether a box, as far as it is inside the image, has a size and an area."""
    x, y, w, h = annotation["bbox"]
    inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
    return inside and annotation["area"] > 0 and w >= 1 and h >= 1


# --------------------------------------------------------------------------------------------------- augmentation


# -------------------------------------------------------------------------------------------------------- batches


def collate(samples: Sequence[Sample]) -> tuple[list[Tensor], list[Target]]:
    """Return a batch as torchvision's detectors take it: images of different sizes, and their targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


class GroupedBatches(EpochSampler):
    """Hands every process its batches, each of images that are all wide or all high, which saves padding.

    The order depends on (seed, epoch) alone. Each group is shuffled and filled up, by images from its beginning, to
    whole steps of all processes; the steps are shuffled again. Process `rank` takes its part of each.

    Args:
        sizes: Height and width of each image of the data set.
        batch_size: Images of one process and batch.
        global_batch: Images of a step, of all processes and accumulated batches.
        world_size: Number of processes.
        rank: This process.
        seed: Seed of the order.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        *,
        batch_size: int,
        global_batch: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
    ):
        wide = np.array([width > height for height, width in sizes])
        self.groups = [group for group in (np.flatnonzero(wide), np.flatnonzero(~wide)) if len(group)]
        self.batch_size = batch_size
        steps = sum(-(-len(group) // global_batch) for group in self.groups)
        super().__init__(steps, global_batch, world_size, rank, seed)

    def __len__(self) -> int:
        """Return the batches of this process that are left of the epoch."""
        return super().__len__() // self.batch_size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        steps = []
        for group in self.groups:
            order = rng.permutation(group)
            whole = np.resize(order, -(-len(order) // self.global_batch) * self.global_batch)
            steps.extend(whole.reshape(-1, self.global_batch))
        for step in rng.permutation(len(steps))[self.step :]:
            own = steps[step][self.rank :: self.world_size]
            for first in range(0, len(own), self.batch_size):
                yield [SampleKey(self.epoch, int(index), 0) for index in own[first : first + self.batch_size]]
