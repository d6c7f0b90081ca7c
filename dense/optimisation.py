"""Parameter groups of AdamW and schedules by iteration."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float, not_decayed: Sequence[str]) -> list[dict[str, Any]]:
    """Return the parameters as groups for an optimizer.

    Args:
        model: The network.
        weight_decay: Of the first group.
        not_decayed: Parts of the names of those parameters that are not decayed, the second group.
    """
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[any(part in name for part in not_decayed)]["params"].append(parameter)
    return [group for group in groups if group["params"]]


class IterationSchedule(Scheduler):
    """A schedule by iteration with a linear warm-up, which multiplies what is scheduled; timm's adds up.

    Args:
        optimizer: Its learning rates are the base of the schedule.
        warmup_iterations: Length of the warm-up.
        warmup_ratio: Share of the scheduled rate at iteration 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup_iterations: int = 0, warmup_ratio: float = 1.0):
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.warmup_iterations = warmup_iterations
        self.warmup_ratio = warmup_ratio

    def scheduled(self, iteration: int, base: float) -> float:
        """Return the learning rate of an iteration, counted from 0, but for the warm-up."""
        raise NotImplementedError

    def _get_lr(self, t: int) -> list[float]:
        done = min(1.0, t / self.warmup_iterations) if self.warmup_iterations else 1.0
        warmth = 1 - (1 - done) * (1 - self.warmup_ratio)
        return [warmth * self.scheduled(t, base) for base in self.base_values]


class PolySchedule(IterationSchedule):
    """Falls from the base to `min_lr` as a power of the share of the iterations that is left."""

    def __init__(self, optimizer, iterations: int, power: float, min_lr: float, **warmup):
        super().__init__(optimizer, **warmup)
        self.iterations = iterations
        self.power = power
        self.min_lr = min_lr

    def scheduled(self, iteration: int, base: float) -> float:
        return (base - self.min_lr) * (1 - iteration / self.iterations) ** self.power + self.min_lr


class StepSchedule(IterationSchedule):
    """Falls to a tenth at each of the milestones, in iterations."""

    def __init__(self, optimizer, milestones: Sequence[int], **warmup):
        super().__init__(optimizer, **warmup)
        self.milestones = list(milestones)

    def scheduled(self, iteration: int, base: float) -> float:
        return base * 0.1 ** sum(iteration >= milestone for milestone in self.milestones)
