"""Classification losses: the criterion that fits the targets, and distillation from a teacher."""

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

DISTILLATION_TYPES = ("none", "soft", "hard")


def choose_criterion(*, soft_targets: bool, smoothing: float) -> nn.Module:
    """Return the cross-entropy for the targets in use.

    Args:
        soft_targets: Targets are distributions, as mixup or CutMix, alone or together, make them. Their label
            smoothing is in the targets already.
        smoothing: Label smoothing of class-index targets, 0 to 1.
    """
    if soft_targets:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss()


class DistillationLoss(nn.Module):
    """A criterion mixed with the imitation of a teacher (DeiT, https://arxiv.org/abs/2012.12877).

    Twins has no distillation token, so the class logits themselves imitate the teacher.

    Args:
        criterion: Loss of the logits against the targets.
        teacher: Frozen classifier of the same classes; it sees the same augmented images.
        kind: `"soft"` for the divergence from the teacher's distribution, `"hard"` for the cross-entropy
            against the teacher's first choice.
        alpha: Weight of the teacher's part, 0 to 1.
        tau: Temperature of the soft distributions.
    """

    def __init__(self, criterion: nn.Module, teacher: nn.Module, kind: str, alpha: float, tau: float):
        super().__init__()
        if kind not in ("soft", "hard"):
            raise ValueError(f"distillation {kind!r} is unknown; it is 'soft' or 'hard'")
        self.criterion = criterion
        self.teacher = teacher
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, images: Tensor, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the weighted parts, whose sum is the loss.

        Args:
            images: `(B, C, H, W)`, as the student saw them.
            logits: The student's, `(B, classes)`.
            targets: As the criterion takes them.
        """
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        if self.kind == "hard":
            distillation = F.cross_entropy(logits, teacher_logits.argmax(dim=1))
        else:
            student = F.log_softmax(logits / self.tau, dim=1)
            teacher = F.log_softmax(teacher_logits / self.tau, dim=1)
            divergence = F.kl_div(student, teacher, log_target=True, reduction="sum") * self.tau**2
            distillation = divergence / logits.numel()  # over images and classes, as DeiT does
        return {
            "base": (1 - self.alpha) * self.criterion(logits, targets),
            "distillation": self.alpha * distillation,
        }
