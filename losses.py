"""Classification losses: cross-entropy for the kind of targets in use, and distillation from a teacher."""

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

DISTILLATION_TYPES = ("none", "soft", "hard")


def choose_criterion(*, soft_targets: bool, smoothing: float) -> nn.Module:
    """Return the cross-entropy for the targets in use.

    `soft_targets` are distributions, as from mixup and CutMix, and include label smoothing. `smoothing` is the label
    smoothing of class-index targets, from 0 to 1.
    """
    if soft_targets:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss()


class DistillationLoss(nn.Module):
    """Weighted sum of a criterion and a distillation loss (DeiT, https://arxiv.org/abs/2012.12877).

    Twins has no distillation token, so the distillation loss is computed from the class logits.

    Args:
        criterion: Loss of the logits and the targets.
        teacher: Frozen classifier of the same classes; it is given the same augmented images.
        kind: `"soft"` for the KL divergence from the teacher's distribution, `"hard"` for the cross-entropy with the
            teacher's predicted class.
        alpha: Weight of the distillation loss, from 0 to 1.
        tau: Temperature of the distributions in soft distillation.
    """

    def __init__(self, criterion: nn.Module, teacher: nn.Module, kind: str, alpha: float, tau: float):
        super().__init__()
        if kind not in ("soft", "hard"):
            raise ValueError(f"distillation {kind!r} is unknown; use 'soft' or 'hard'")
        self.criterion = criterion
        self.teacher = teacher
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, images: Tensor, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the two weighted losses, whose sum is the total loss.

        The student's logits of the images `(B, C, H, W)` are `(B, classes)`; the targets are those of the criterion.
        """
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        if self.kind == "hard":
            distillation = F.cross_entropy(logits, teacher_logits.argmax(dim=1))
        else:
            student = F.log_softmax(logits / self.tau, dim=1)
            teacher = F.log_softmax(teacher_logits / self.tau, dim=1)
            divergence = F.kl_div(student, teacher, log_target=True, reduction="sum") * self.tau**2
            distillation = divergence / logits.numel()  # mean over images and classes, as in DeiT
        return {
            "base": (1 - self.alpha) * self.criterion(logits, targets),
            "distillation": self.alpha * distillation,
        }
