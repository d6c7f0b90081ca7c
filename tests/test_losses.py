"""The criterion that is chosen, and distillation against its formulas written out."""

import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from losses import DistillationLoss, choose_criterion


@pytest.mark.parametrize(
    ("soft_targets", "smoothing", "kind"),
    [
        (True, 0.1, SoftTargetCrossEntropy),
        (True, 0.0, SoftTargetCrossEntropy),
        (False, 0.1, LabelSmoothingCrossEntropy),
        (False, 0.0, nn.CrossEntropyLoss),
    ],
)
def test_criterion_fits_the_targets(soft_targets, smoothing, kind):
    assert type(choose_criterion(soft_targets=soft_targets, smoothing=smoothing)) is kind


def distil(kind: str, alpha: float, tau: float):
    generator = torch.Generator().manual_seed(0)
    images, logits, teacher_logits = (torch.randn(4, 5, generator=generator) for _ in range(3))
    targets = torch.tensor([0, 3, 1, 4])
    teacher = nn.Linear(5, 5)
    teacher.forward = lambda seen: teacher_logits if seen is images else None
    losses = DistillationLoss(nn.CrossEntropyLoss(), teacher, kind, alpha, tau)(images, logits, targets)
    return losses, logits, teacher_logits, targets


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -logits.softmax(1)[range(len(targets)), targets].log().mean()


def test_soft_distillation():
    losses, logits, teacher_logits, targets = distil("soft", alpha=0.3, tau=2.0)
    student, teacher = (logits / 2).softmax(1), (teacher_logits / 2).softmax(1)
    divergence = (teacher * (teacher.log() - student.log())).sum() * 2**2 / logits.numel()
    torch.testing.assert_close(losses["base"], 0.7 * cross_entropy(logits, targets))
    torch.testing.assert_close(losses["distillation"], 0.3 * divergence)


def test_hard_distillation():
    losses, logits, teacher_logits, targets = distil("hard", alpha=0.5, tau=1.0)
    torch.testing.assert_close(losses["base"], 0.5 * cross_entropy(logits, targets))
    torch.testing.assert_close(losses["distillation"], 0.5 * cross_entropy(logits, teacher_logits.argmax(1)))


def test_unknown_distillation():
    with pytest.raises(ValueError, match="distillation 'warm' is unknown"):
        DistillationLoss(nn.CrossEntropyLoss(), nn.Identity(), "warm", 0.5, 1.0)
