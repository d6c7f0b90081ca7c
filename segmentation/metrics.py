"""Evaluation of segmentation: intersection over union and accuracy from a confusion matrix."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.distributed import all_reduce
from core.meters import show_progress
from core.signals import stop_if_requested, stop_requested
from models.weights import shorten
from segmentation.data import IGNORED_LABEL, read_labels
from utils import UserError

# Function of the index of an image, the image in one or more sizes `(3, h, w)`, and the height and width of the result,
# the predicted classes `(H, W)`.
PredictImage = Callable[[int, Sequence[Tensor], tuple[int, int]], Tensor]


class ConfusionMatrix:
    """Counts of pixels by true and predicted class: integers, so exact for any number of processes.

    Pixels with a label outside `0 .. num_classes - 1` are not counted.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)  # [true, predicted]

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count pixels by their predicted and true classes, two integer tensors of one shape, such as `(H, W)`."""
        counted = (labels >= 0) & (labels < self.num_classes)
        pairs = labels[counted].long() * self.num_classes + predictions[counted].long()
        self.counts += torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.counts)

    def per_class(self) -> dict[str, Tensor]:
        """Return the `IoU` and `Acc` of each class, from 0 to 1, on the CPU; NaN for a class without pixels."""
        counts = self.counts.cpu().double()
        hits, labelled, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        return {"IoU": hits / (labelled + predicted - hits), "Acc": hits / labelled}

    def summary(self) -> dict[str, float]:
        """Return `mIoU` and `mAcc`, means over the classes that occur, and `aAcc`, over all pixels; from 0 to 1.

        Raises a UserError if there is no labelled pixel.
        """
        if not self.counts.any():
            raise UserError("there is no labelled pixel to evaluate")
        classes = self.per_class()
        counts = self.counts.cpu().double()
        return {
            "mIoU": classes["IoU"].nanmean().item(),
            "mAcc": classes["Acc"].nanmean().item(),
            "aAcc": (counts.diag().sum() / counts.sum()).item(),
        }

    def table(self, names: Sequence[str]) -> str:
        """Return a table of the figures of each class in percent, then the names of the classes without labels."""
        width = max(map(len, names))
        rows = list(zip(names, *self.per_class().values(), strict=True))
        lines = [f"{name:<{width}}  {100 * iou:6.2f}  {100 * acc:6.2f}" for name, iou, acc in rows if iou == iou]
        unlabelled = [name for name, _, acc in rows if acc != acc]
        if unlabelled:
            lines.append(f"classes without labelled pixels: {shorten(unlabelled, 8)}")
        return "\n".join([f"{'class':<{width}}  {'IoU':>6}  {'Acc':>6}", *lines])


def evaluate(
    predict_image: PredictImage,
    data_loader: Iterable,
    device: torch.device,
    num_classes: int,
    on_prediction: Callable[[int, Tensor, Tensor], None] | None = None,
) -> ConfusionMatrix:
    """Evaluate the predictions of images; each image is counted exactly once.

    Each process has its own loader of `EvalViews`, and the counts are those of all processes. `on_prediction` is called
    with the index of each image, its predicted classes and its labels, on the CPU.

    Raises:
        Interrupted: On all processes, if any process received a signal to stop; the others finish their part.
    """
    matrix = ConfusionMatrix(num_classes, device)
    for index, images, labels in show_progress(data_loader, "evaluation"):
        if stop_requested():
            break
        prediction = predict_image(index, images, tuple(labels.shape))
        matrix.update(prediction.to(device), labels.to(device, non_blocking=True))
        if on_prediction is not None:
            on_prediction(index, prediction.cpu(), labels)
    stop_if_requested(device)
    all_reduce(matrix.counts)
    return matrix


def build_reader(folder: Path, dataset: Dataset) -> PredictImage:
    """Return a function for `evaluate` that reads predictions as test.py writes them; it raises a `UserError`."""

    def read_prediction(index: int, images: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        path = folder / f"{dataset.name(index)}.png"
        prediction = read_labels(path, len(dataset.classes), dataset.first_label)
        if prediction.shape != size or (prediction == IGNORED_LABEL).any():
            raise UserError(
                f"{path}: does not fit the image: a prediction has {size[1]}x{size[0]} pixels, each with a class; "
                "predict the image again with --out"
            )
        return prediction

    return read_prediction
