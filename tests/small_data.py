"""Small data sets on disk in the layouts of ADE20K and COCO."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_coding

ADE20K_SIZES = ((64, 48), (90, 70), (50, 80), (33, 100), (120, 41))  # width, height
COCO_SIZES = {7: (80, 60), 12: (64, 90), 3: (100, 50), 40: (70, 70), 41: (200, 30), 42: (90, 64)}  # by id
COCO_CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]


def write_noise(path: Path, size: tuple[int, int], seed) -> None:
    """Write a JPEG of coarse noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path)


def make_labels(size: tuple[int, int], seed: int, high: int = 151) -> np.ndarray:
    """Return a map of rectangular blocks of labels below `high`, as in the files of ADE20K. 0 and `high - 1` occur."""
    blocks = np.random.default_rng(seed).integers(high, size=(3, 4), dtype=np.uint8)
    blocks[0, :2] = 0, high - 1
    return np.asarray(Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST))


def write_ade20k(root: Path, high: int = 151, count: int = 5) -> None:
    """Write JPEG images of several sizes and PNG labels below `high` in the layout of ADE20K."""
    for part, split in enumerate(("training", "validation")):
        for i in range(count):
            size, name = ADE20K_SIZES[i % len(ADE20K_SIZES)], f"ADE_{split[:5]}_{i + 1:08}"
            write_noise(root / "images" / split / f"{name}.jpg", size, (part, i))
            (root / "annotations" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(make_labels(size, i, high)).save(root / "annotations" / split / f"{name}.png")


def write_street_scenes(root: Path) -> dict[str, Any]:
    """Write a data set as that of Cityscapes, with a folder per city; return the fields of its experiment.

    Labels are 0 to 3, of which 3 is to be ignored. The training set is a list of two of three images.
    """
    sizes = {"bonn/bonn_1": (64, 48), "bonn/bonn_2": (90, 70), "ulm/ulm_1": (50, 80)}
    for part in ("train", "val"):
        for i, (name, size) in enumerate(sizes.items()):
            write_noise(root / "leftImg8bit" / part / f"{name}_leftImg8bit.png", size, (part == "val", i))
            for suffix, high in (("labelIds", 34), ("labelTrainIds", 4)):
                path = root / "gtFine" / part / f"{name}_gtFine_{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(make_labels(size, i, high)).save(path)
    (root / "classes.txt").write_text("road\nsky\ncar\n")
    (root / "some.txt").write_text("ulm/ulm_1\n\n  bonn/bonn_1 \n")
    folders = {"images": "leftImg8bit", "labels": "gtFine"}
    fields = {f"{part}_{kind}": f"{folder}/{part}" for part in ("train", "val") for kind, folder in folders.items()}
    suffixes = {"image_suffix": "_leftImg8bit.png", "label_suffix": "_gtFine_labelTrainIds.png"}
    return {"dataset": "folder", "ignored_label": 3, "train_split": "some.txt", **fields, **suffixes}


def circle(width: int, height: int) -> np.ndarray:
    """Return the mask of the objects that are annotated with run lengths."""
    y, x = np.mgrid[:height, :width]
    return ((x - 30) ** 2 + (y - 25) ** 2 < 200).astype(np.uint8)


def encode(mask: np.ndarray) -> dict:
    """Return the run-length encoding of a mask."""
    code = mask_coding.encode(np.asfortranarray(mask))
    return {"size": code["size"], "counts": code["counts"].decode()}


def make_annotations() -> dict:
    """Return annotations of all kinds: polygons, run lengths, a crowd, empty boxes, and an image without boxes."""
    annotations = []

    def add(image, category, box, segmentation, crowd=0, area=None):
        annotations.append(
            {
                "id": 100 + len(annotations),
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "iscrowd": crowd,
                "area": box[2] * box[3] if area is None else area,
                "segmentation": segmentation,
            }
        )

    for image, (width, height) in COCO_SIZES.items():
        if image == 40:
            continue  # an image without boxes
        add(image, 1, [10, 5, 20, 15], [[10, 5, 30, 5, 30, 20, 10, 20]])
        add(image, 90, [16, 11, 29, 29], encode(circle(width, height)))
    add(12, 18, [0, 0, 64, 90], {"size": [90, 64], "counts": [10, 500, 5250]}, crowd=1)
    add(7, 18, [20, 20, 0, 10], [[20, 20, 20, 30, 20, 25]])  # no width
    add(7, 18, [20, 20, 10, 10], [[20, 20, 30, 20, 30, 30]], area=0)
    add(42, 18, [85, 60, 10, 10], [[85, 60, 95, 60, 95, 70, 85, 70]])  # extends beyond the border
    images = [{"id": i, "width": w, "height": h, "file_name": f"{i:012}.jpg"} for i, (w, h) in COCO_SIZES.items()]
    return {"images": images, "annotations": annotations, "categories": COCO_CATEGORIES}


def write_coco(root: Path) -> None:
    """Write the training and the validation set in the layout of COCO."""
    for split in ("train2017", "val2017"):
        for i, size in COCO_SIZES.items():
            write_noise(root / split / f"{i:012}.jpg", size, i)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(make_annotations()))
