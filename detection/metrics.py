"""Evaluation of detectors: box and mask AP by pycocotools, the same for any number of processes."""

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.ops import box_convert

from core.distributed import gather_on_main, on_main
from core.launch import one_line
from core.meters import show_progress
from core.signals import stop_if_requested, stop_requested
from detection.data import encode_mask
from engine import to_device
from utils import UserError, make_folder, write_text

logger = logging.getLogger("twins")

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of pycocotools' twelve figures


@torch.inference_mode()
def find_objects(
    model: nn.Module,
    data_loader: Iterable,
    device: torch.device,
    category_ids: list[int],
    *,
    amp_dtype: torch.dtype | None = None,
    on_detections: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> list[dict] | None:
    """Return the objects in the images of all processes in COCO's format, by image; None but in the main process.

    Each process finds those of its own loader; of the targets, only the `image_id` is used. `category_ids` are the ids
    of the categories by label. `on_detections` is called with the id of each image and its objects, on the CPU.

    Raises:
        Interrupted: On all processes, if any process received a signal to stop; the others finish their part.
    """
    model.eval()
    results = []
    for images, targets in show_progress(data_loader, "evaluation"):
        if stop_requested():
            break
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            batch = model(to_device(images, device))
        for target, found in zip(targets, batch, strict=True):
            found = {name: value.cpu() for name, value in found.items()}
            results += to_results(target["image_id"], found, category_ids)
            if on_detections is not None:
                on_detections(target["image_id"], found)
    stop_if_requested(device)
    shares = gather_on_main(results)
    if shares is None:
        return None
    return sorted(chain(*shares), key=lambda result: result["image_id"])  # the same for any number of processes


def to_results(image_id: int, found: dict[str, Tensor], category_ids: list[int]) -> list[dict]:
    """Convert the objects found in an image to COCO's format: boxes as x, y, width, height; masks as run lengths."""
    boxes = box_convert(found["boxes"].double(), "xyxy", "xywh")
    results = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for box, score, label in zip(boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
    ]
    for result, mask in zip(results, found.get("masks", ()), strict=False):
        result["segmentation"] = encode_mask(mask.numpy())
    return results


def summarise(
    truth: COCO, image_ids: list[int], results: list[dict] | None, kinds: Iterable[str], tables: bool = True
) -> dict[str, float]:
    """Return the figures of results in COCO's format: `bbox_AP`, `bbox_AP50` and so on, from 0 to 1.

    All processes must call this together. The main process, which alone needs the results, computes the figures. With
    `tables`, it logs pycocotools' twelve lines and a table of the classes for each of `kinds`, `"bbox"` and `"segm"`.
    """

    def compute() -> dict[str, float]:
        figures = {}
        for kind in kinds:
            evaluation, lines = evaluate_kind(truth, image_ids, results, kind)
            for name, value in zip(METRICS, evaluation.stats.tolist(), strict=False):
                figures[f"{kind}_{name}"] = value
            if tables:
                logger.info("%s:\n%s\n%s", kind, lines, _per_class(truth, evaluation, kind))
        return figures

    return on_main(compute)


def write_results(results: list[dict], path: Path) -> None:
    """Write results to a JSON file that COCO's server accepts."""
    make_folder(path.parent)
    write_text(path, json.dumps(results))


def read_results(path: Path, truth: COCO, kinds: Iterable[str]) -> list[dict]:
    """Read results in COCO's format, as `write_results` and mmdetection write them, and check them by the annotations.

    Raises a UserError if the file cannot be read or holds other things than results of `kinds`, `"bbox"` and `"segm"`.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({one_line(error)}); write it by --out") from error
    keys = {"image_id", "category_id", "bbox", "score"} | ({"segmentation"} if "segm" in kinds else set())
    if not isinstance(results, list) or not all(isinstance(row, dict) and keys <= set(row) for row in results):
        raise UserError(f"{path}: is not a list of results in COCO's format, each with {', '.join(sorted(keys))}")
    for row in results:
        for kind, known in (("image", truth.imgs), ("category", truth.cats)):
            number = row[f"{kind}_id"]
            if not isinstance(number, int) or number not in known:
                raise UserError(f"{path}: has a result of {kind} {number}, which the annotations do not list")
    return results


def evaluate_kind(truth: COCO, image_ids: list[int], results: list[dict], kind: str) -> tuple[COCOeval, str]:
    """Run pycocotools and return its lines, too. Without any results the figures are 0, or -1 for undefined ones."""
    lines = io.StringIO()
    with contextlib.redirect_stdout(lines):
        # Without its box, pycocotools takes the size of a result from its mask.
        rows = [{key: row[key] for key in row if key != "bbox" or kind == "bbox"} for row in results]
        evaluation = COCOeval(truth, truth.loadRes(rows) if rows else COCO(), kind)
        evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        lines.truncate(0)
        lines.seek(0)
        evaluation.summarize()
    return evaluation, lines.getvalue().rstrip()


def _per_class(truth: COCO, evaluation: COCOeval, kind: str) -> str:
    """Return a table of the AP and AP50 of each class, in percent."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes
    names = [truth.cats[category]["name"] for category in evaluation.params.catIds]
    width = max(12, *map(len, names))
    rows = [f"{f'{kind}, class':<{width}}  {'AP':>6}  {'AP50':>6}"]
    for i, name in enumerate(names):
        means = (mean_precision(part) for part in (precision[:, :, i], precision[0, :, i]))
        ap, ap50 = (f"{100 * mean:.2f}" if mean == mean else "-" for mean in means)
        rows.append(f"{name:<{width}}  {ap:>6}  {ap50:>6}")
    return "\n".join(rows)


def mean_precision(precision: np.ndarray) -> float:
    """Return the mean of the precisions that are defined, which are not -1 or NaN; NaN if there are none."""
    defined = precision[precision > -1]
    return defined.mean().item() if defined.size else float("nan")
