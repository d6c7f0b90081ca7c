"""Parameter groups of AdamW, and learning-rate schedules by iteration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(model: nn.Module, weight_decay: float, not_decayed: Sequence[str]) -> list[dict[str, Any]]:
    """Return the parameters that are not frozen as groups of an optimizer, with and without weight decay.

    Parameters with one of `not_decayed` in their name are not decayed.
    """
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = groups[1] if any(part in name for part in not_decayed) else groups[0]
        group["params"].append(parameter)
    return [group for group in groups if group["params"]]


def build_scaler(device: torch.device, loss_scale: float, enabled: bool) -> torch.amp.GradScaler:
    """Build the gradient scaler of fp16; a loss scale of 0 adapts without a limit, as usual in PyTorch."""
    if loss_scale and enabled:
        return LimitedScaler(device.type, loss_scale)
    return torch.amp.GradScaler(device.type, enabled=enabled)


class LimitedScaler(torch.amp.GradScaler):
    """Gradient scaler with a constant loss scale, the limit, which is lowered for a while if gradients overflow.

    Differs from the original: a step with an overflow is skipped, and halves the scale for the next 2000 steps. The
    original's scale was static.
    """

    def __init__(self, device: str, limit: float):
        super().__init__(device, init_scale=limit)
        self.limit = limit

    def update(self, new_scale: float | None = None) -> None:
        super().update(new_scale)
        self._scale.clamp_(max=self.limit)  # not by `get_scale`, which waits for the GPU

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"scale": min(state_dict["scale"], self.limit)})


def linear_warmup(iteration: int, length: int, ratio: float) -> float:
    """Return the factor of a linear warm-up from `ratio` at iteration 0 to 1 at iteration `length`."""
    return 1 - (1 - iteration / length) * (1 - ratio) if iteration < length else 1.0


@dataclass
class IterationSchedule:
    """Sets the learning rates of an iteration, which depend on its number alone: a run can resume at any step."""

    optimizer: torch.optim.Optimizer  # with the peak learning rates
    factor: Callable[[int], float]  # from an iteration, counted from 0, to the factor of the peak learning rates

    def __post_init__(self):
        self.step_update(0)

    def step_update(self, iteration: int) -> None:
        """Set the learning rates of an iteration."""
        # The constructor sets the rates of iteration `last_epoch + 1`.
        LambdaLR(self.optimizer, self.factor, last_epoch=iteration - 1)

    def step(self, epoch: int) -> None:
        """Do nothing at the end of an epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict: there is nothing to save."""
        return {}
