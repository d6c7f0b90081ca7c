"""Mean intersection over union and its relatives, from one confusion matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils import all_reduce


class ConfusionMatrix:
    """Counts pixels by true class and predicted class, exactly: whole numbers, added over all processes.

    Args:
        num_classes: Classes. Pixels with a label outside `0 .. num_classes - 1` do not count.
        device: Where the counts are kept.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)  # [true, predicted]

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add images: predicted and true classes of pixels, whole numbers of one shape, such as `(H, W)`."""
        counted = (labels >= 0) & (labels < self.num_classes)
        pairs = labels[counted].long() * self.num_classes + predictions[counted].long()
        self.counts += torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.counts)

    def reduce(self) -> None:
        """Add the counts of all processes. All must call it, once."""
        all_reduce(self.counts)

    def per_class(self) -> dict[str, Tensor]:
        """Return `IoU` and `Acc` of each class, 0 to 1, on the CPU; NaN for a class of which there is no pixel."""
        counts = self.counts.cpu().double()
        hits, labelled, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        return {"IoU": hits / (labelled + predicted - hits), "Acc": hits / labelled}

    def summary(self) -> dict[str, float]:
        """Return `mIoU` and `mAcc`, means over the classes that occur, and `aAcc`, of all pixels; 0 to 1."""
        classes = self.per_class()
        counts = self.counts.cpu().double()
        return {
            "mIoU": classes["IoU"].nanmean().item(),
            "mAcc": classes["Acc"].nanmean().item(),
            "aAcc": (counts.diag().sum() / counts.sum()).item(),
        }

    def table(self, names: Sequence[str]) -> str:
        """Return the figures of each class in percent as lines of text."""
        width = max(map(len, names))
        rows = zip(names, *self.per_class().values(), strict=True)
        lines = [f"{name:<{width}}  {100 * iou:6.2f}  {100 * accuracy:6.2f}" for name, iou, accuracy in rows]
        return "\n".join([f"{'class':<{width}}  {'IoU':>6}  {'Acc':>6}", *lines])
