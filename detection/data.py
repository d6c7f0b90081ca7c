"""Data sets of detection: COCO, your own data in COCO's format, and the embedded shapes; batches of them.

A data set returns `(image, target)`: an RGB image, uint8 `(3, H, W)`, and a dict of `boxes`, float32 `(n, 4)` as x1,
y1, x2, y2 in pixels, `labels`, int64 `(n,)` from 0, `masks`, uint8 `(n, H, W)`, and `image_id`, the image's id in the
annotations. Its attribute `coco` holds the annotations as pycocotools reads them.
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
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import pil_to_tensor

from core import shapes
from core.images import load_image
from detection.configs.recipes import Experiment
from samplers import EpochSampler, SampleKey
from utils import UserError

SHAPES_TRAIN, SHAPES_VAL = 3000, 300  # images
MIN_SIDE = 32  # pixels; smaller training images are skipped

Target = dict[str, Tensor | int]
Sample = tuple[Tensor, Target]


def build_dataset(experiment: Experiment, part: str) -> Dataset:
    """Build the part `"train"`, `"val"` or `"test"` of an experiment's data; a UserError names missing or bad files."""
    if experiment.dataset == "shapes":
        return Shapes(part == "train", max(experiment.scale))
    root = Path(experiment.data_root)
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; set the folder of the data set with --data-root")
    images, annotations = (root / getattr(experiment, f"{part}_{name}") for name in ("images", "annotations"))
    return CocoDetection(images, annotations, part)


class CocoDetection(Dataset):
    """Images with boxes and masks in COCO's format.

    Label i is the i-th category by ascending id. Targets omit crowds, annotations marked `ignore` and boxes without
    an area. The part `"train"` skips images without any annotation and those with a side under 32 pixels; images whose
    annotations are all omitted are trained as background, as in the original. The file of `"test"` may be without
    annotations.

    Raises:
        UserError: If a file is missing, or the annotations are invalid or inconsistent.
    """

    def __init__(self, folder: Path, annotations: Path, part: str):
        self.folder, self.annotations = folder, annotations
        self.coco = read_annotations(annotations, labelled=part != "test")
        self.category_ids = sorted(self.coco.cats)
        self.classes = [self.coco.cats[category]["name"] for category in self.category_ids]
        self.label_of = {category: label for label, category in enumerate(self.category_ids)}
        self.ids = sorted(self.coco.imgs)
        if part == "train":
            sides = {i: min(image["width"], image["height"]) for i, image in self.coco.imgs.items()}
            self.ids = [i for i in self.ids if sides[i] >= MIN_SIDE and self.coco.imgToAnns[i]]
        if not self.ids:
            raise UserError(f"{annotations}: has no images{' with annotations to train on' if part == 'train' else ''}")
        for i in self.ids:
            path = folder / self.coco.imgs[i]["file_name"]
            if not os.path.isfile(path):
                raise UserError(f"{path} is missing; {annotations} lists it as image {i}")
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
        annotations = self._used_annotations(image_id)
        boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32).reshape(-1, 4)
        labels = [self.label_of[annotation["category_id"]] for annotation in annotations]
        masks = [self._decode_mask(annotation) for annotation in annotations]
        return image, {
            "boxes": box_convert(boxes, "xywh", "xyxy"),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": torch.from_numpy(np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)),
            "image_id": image_id,
        }

    def _decode_mask(self, annotation: dict) -> np.ndarray:
        try:
            return self.coco.annToMask(annotation)
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"{self.annotations}: the mask of annotation number {annotation['id']}, of image "
                f"{annotation['image_id']}, cannot be decoded ({error}); correct or remove it"
            ) from error

    def _used_annotations(self, image_id: int) -> list[dict]:
        """Return the annotations of an image that targets contain."""
        image, used = self.coco.imgs[image_id], []
        for annotation in self.coco.imgToAnns[image_id]:
            x, y, w, h = annotation["bbox"]
            is_inside = min(x + w, image["width"]) > max(x, 0) and min(y + h, image["height"]) > max(y, 0)
            has_area = annotation["area"] > 0 and w >= 1 and h >= 1
            if is_inside and has_area and not (annotation["iscrowd"] or annotation.get("ignore")):
                used.append(annotation)
        return used


class Shapes(Dataset):
    """The embedded data set: one to four shapes per image, with boxes and masks, in COCO's format."""

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
        """Return the annotations in COCO's format, for the evaluation."""
        annotations = []
        for i in self.ids:
            scene = shapes.draw_quarters((self.split, i), self.size)
            for (x1, y1, x2, y2), label, mask in zip(scene.boxes.tolist(), scene.labels, scene.masks, strict=True):
                number, area = len(annotations) + 1, int(mask.sum())
                annotation = {"id": number, "image_id": i, "category_id": label + 1, "iscrowd": 0, "area": area}
                annotation |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": encode_mask(mask)}
                annotations.append(annotation)
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)]
        images = [{"id": i, "width": self.size, "height": self.size, "file_name": f"{i:05}"} for i in self.ids]
        return index_annotations({"images": images, "annotations": annotations, "categories": categories, "info": {}})


def encode_mask(mask: np.ndarray) -> dict:
    """Return the run-length code of a mask `(H, W)`, in a form that JSON can hold."""
    code = mask_coding.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def read_annotations(path: Path, labelled: bool = True) -> COCO:
    """Read and check a JSON file in COCO's format; without `labelled`, the annotations may be missing, as in test sets.

    Raises a UserError if the file is missing, is not JSON, or holds an invalid or inconsistent entry, which is named.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); set its folder with --data-root, and its name with "
            "--cfg-options train_annotations=..., val_annotations=... or test_annotations=..."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); download it again") from error
    content = content if isinstance(content, dict) else {}
    if not labelled:
        content.setdefault("annotations", [])
    lists = [content.get(name) for name in ("images", "annotations", "categories")]
    if not all(isinstance(entries, list) for entries in lists):
        raise UserError(
            f"{path}: is not in COCO's format; it needs the lists images, annotations and categories; test a "
            "set without annotations with --format-only"
        )
    try:
        _check_annotations(*lists)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return index_annotations(content)


def _check_annotations(images: list[dict], annotations: list[dict], categories: list[dict]) -> None:
    """Check the entries; complete what some tools omit from annotations: the area, the mask and `iscrowd`."""
    known_images = _index_entries("image", images, "file_name")
    known_categories = _index_entries("category", categories, "name")
    if not categories:
        raise UserError("its list of categories is empty")
    for image_id, image in known_images.items():
        for side in ("width", "height"):
            if not isinstance(image.get(side), int) or image[side] <= 0:
                raise UserError(f"image {image_id} has the {side} {image.get(side)}; it should be a number of pixels")
    for number, annotation in enumerate(annotations, 1):
        if not isinstance(annotation, dict):
            raise UserError(f"entry {number} of the annotations is not an object")
        name = f"annotation {annotation.get('id', f'number {number}')}"
        _check_annotation(name, annotation, known_images, known_categories)
        annotation["id"] = number  # pycocotools ignores matches with the id 0, and confuses equal ids


def _check_annotation(name: str, annotation: dict, images: dict[int, dict], categories: dict[int, dict]) -> None:
    """Check and complete an annotation."""
    for key, relation, known in (("image_id", "is of image", images), ("category_id", "has the category", categories)):
        number = annotation.get(key)
        if not isinstance(number, int) or number not in known:
            raise UserError(f"{name} {relation} {number}, which is not listed")
    image = images[annotation["image_id"]]
    _check_box(name, annotation.get("bbox"), annotation["image_id"], image["width"], image["height"])
    x, y, w, h = annotation["bbox"]
    mask = _check_mask(name, annotation.get("segmentation"), image["width"], image["height"])
    annotation["segmentation"] = mask or [[x, y, x + w, y, x + w, y + h, x, y + h]]
    annotation.setdefault("iscrowd", 0)
    annotation.setdefault("area", w * h)
    if not _is_number(annotation["area"]):
        raise UserError(f"{name} has the area {annotation['area']}; it should be a number of pixels")


def _index_entries(kind: str, entries: list[dict], name: str) -> dict[int, dict]:
    """Return entries by id; the ids must be different integers, and each entry must have the text `name`."""
    known = {}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int):
            raise UserError(f"{kind} number {number} of the list has no id that is an integer")
        if entry["id"] in known:
            raise UserError(f"the {kind} id {entry['id']} occurs twice")
        if not isinstance(entry.get(name), str) or not entry[name]:
            raise UserError(f"{kind} {entry['id']} has no {name}")
        known[entry["id"]] = entry
    return known


def _is_number(value: Any) -> bool:
    """Return True for an int or float of a magnitude that pixels can have; NaN is not a number."""
    return isinstance(value, (int, float)) and -1e9 < value < 1e9


def _check_box(name: str, box: Any, image_id: int, width: int, height: int) -> None:
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise UserError(f"{name} has the box {box}; it should be four numbers: x, y, width and height")
    x, y, w, h = box
    if w < 0 or h < 0:
        raise UserError(f"{name} has the box {box}; its width and height must not be negative")
    if x >= width or y >= height or x + w <= 0 < w or y + h <= 0 < h:
        raise UserError(f"{name} has the box {box}, outside its image {image_id} of {width}x{height} pixels")


def _check_mask(name: str, mask: Any, width: int, height: int) -> dict | list | None:
    """Return a mask without its polygons of fewer than three points; None or an empty list if there is no mask."""
    if isinstance(mask, dict):
        counts = mask.get("counts")
        if isinstance(counts, list):
            whole = all(isinstance(count, int) and count >= 0 for count in counts) and sum(counts) == height * width
        else:
            whole = isinstance(counts, str) and counts != ""
        if mask.get("size") != [height, width] or not whole:
            raise UserError(f"{name} has a mask that is not a run-length code of {height}x{width} pixels")
        return mask
    if mask is None:
        return None
    if not isinstance(mask, list) or not all(
        isinstance(polygon, list) and len(polygon) % 2 == 0 and all(map(_is_number, polygon)) for polygon in mask
    ):
        raise UserError(f"{name} has a segmentation that is neither a list of polygons [x1, y1, x2, ...] nor a code")
    return [polygon for polygon in mask if len(polygon) >= 6]


def index_annotations(content: dict) -> COCO:
    """Index annotations by pycocotools, without its messages."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def collate(samples: Sequence[Sample]) -> tuple[list[Tensor], list[Target]]:
    """Return a batch in the form that torchvision's detectors take: a list of images and a list of targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


class GroupedBatches(EpochSampler):
    """Batch sampler of distributed training whose batches hold only wide images or only others, which saves padding.

    A batch is what a process sees at once; a step mixes batches of both kinds. The wide images and the others are
    shuffled, filled up with their first images to whole steps and divided into batches; then all batches are shuffled.
    The order depends on (seed, epoch) and on the batch size, so a step covers the same images for any number of
    processes with the same batch size. `sizes` are the height and width of each image; the other arguments are those of
    `EpochSampler`.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], *, batch_size: int, global_batch: int, **kwargs):
        wide = np.array([width > height for height, width in sizes])
        self.groups = [group for group in (np.flatnonzero(wide), np.flatnonzero(~wide)) if len(group)]
        self.batch_size = batch_size
        steps = sum(-(-len(group) // global_batch) for group in self.groups)
        super().__init__(steps, global_batch=global_batch, **kwargs)

    def __len__(self) -> int:
        """Return the number of this process's batches that are left in the epoch."""
        return super().__len__() // self.batch_size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        filled = []
        for group in self.groups:
            whole = -(-len(group) // self.global_batch) * self.global_batch
            filled.append(np.resize(rng.permutation(group), whole))
        batches = rng.permutation(np.concatenate(filled).reshape(-1, self.batch_size))
        first = self.step * self.global_batch // self.batch_size
        for batch in batches[first + self.rank :: self.world_size]:
            yield [SampleKey(self.epoch, int(index), 0) for index in batch]
