"""The state of a training run and its file format."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

import utils
from core.distributed import gather, get_rank, get_world_size
from core.meters import EpochMeter
from models.complexity import count_module_parameters
from utils import UserError

# Version of the format that this code writes. Checkpoints of format 1 have no version entry; 2 has no description.
FORMAT = 3

# fmt: off
REQUIRED_KEYS = {
    "model", "model_ema", "optimizer", "scheduler", "scaler", "epoch", "position", "global_batch", "meters", "best",
    "history", "random_states", "args", "versions",
}
# fmt: on


def check_format(path: Any, content: dict[str, Any]) -> None:
    """Raise a UserError for a checkpoint that newer code wrote."""
    if content.get("format", 1) not in range(FORMAT + 1):
        raise UserError(
            f"{path}: has format {content['format']}, but this code reads formats up to {FORMAT}; continue the run "
            "with the code that wrote it, or with a newer version of this code"
        )


@dataclass
class TrainState:
    """Everything that changes during a run. A checkpoint holds it together with arguments and versions."""

    model: nn.Module  # without DistributedDataParallel or any other wrapper
    optimizer: torch.optim.Optimizer
    # With `step_update(step)`, `step(epoch)` and `state_dict()`, as timm's have. The learning rate must depend on the
    # step and the epoch alone, since a resumed run only tells it these.
    lr_scheduler: Any
    scaler: torch.amp.GradScaler  # disabled unless the run uses fp16
    sampler: Any  # `EpochSampler` of the training set, see samplers.py
    model_ema: nn.Module | None = None  # moving average of the model, timm's `ModelEmaV3`; None if there is none
    epoch: int = 0  # number of completed epochs
    meter: EpochMeter = field(default_factory=EpochMeter)  # of the current epoch
    best: dict[str, float] = field(default_factory=dict)  # best value of each metric that selects checkpoints
    history: list[dict[str, Any]] = field(default_factory=list)  # lines of log.txt

    @property
    def n_parameters(self) -> int:
        """Number of parameters of the model."""
        return count_module_parameters(self.model)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer updates."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def position(self) -> int:
        """Number of images of the current epoch that all processes have trained on."""
        return self.meter.step * self.sampler.global_batch

    def to_checkpoint(self, args: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
        """Return the content of a checkpoint, which loads with `weights_only=True`. All processes must call it."""
        return {
            "model": self.model.state_dict(),
            "model_ema": self.model_ema.module.state_dict() if self.model_ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "position": self.position,
            "global_batch": self.sampler.global_batch,
            "meters": gather(self.meter.state_dict()),
            "best": self.best,
            "history": self.history,
            "random_states": gather(utils.get_random_state()),
            "args": args,
            "description": description,
            "versions": utils.versions(),
            "format": FORMAT,
        }

    def load_training(self, checkpoint: dict[str, Any], seed: int) -> list[str]:
        """Restore everything except the weights; return descriptions of what could not be restored exactly.

        There are none if the number of processes and the global batch are the same. For another number of processes
        new random states are drawn from `seed`.

        Raises:
            UserError: If the optimizer of the checkpoint does not fit.
        """
        state_keys = {"params", "lookahead_step"}  # the other entries of a group are options
        chosen = [
            {key: value for key, value in group.items() if key not in state_keys}
            for group in self.optimizer.param_groups
        ]
        saved = dict(checkpoint["optimizer"])
        if "fused" in self.optimizer.defaults:  # it decides where the optimizer puts its step counts when it loads them
            fused = {"fused": self.optimizer.defaults["fused"]}
            saved["param_groups"] = [group | fused for group in saved["param_groups"]]
        try:
            self.optimizer.load_state_dict(saved)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"its optimizer does not fit these options ({error}); use the options of its run"
            ) from error
        for group, options in zip(self.optimizer.param_groups, chosen, strict=True):
            group.update(options)  # the options of this start, which may differ from those of the checkpoint
        if checkpoint["scaler"]:  # empty if the scaler was disabled
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint["epoch"]
        if self.epoch > 0:  # a schedule only depends on the options and the epoch
            self.lr_scheduler.step(self.epoch - 1)
        self.best = checkpoint["best"]
        self.history = checkpoint["history"]
        changes = self._load_place(checkpoint)
        updates = self.epoch * self.sampler.steps + self.meter.step
        if updates > 0:  # the learning rate of the last step, which a checkpoint after an evaluation holds
            self.lr_scheduler.step_update(updates - 1)
        return changes + self._load_randomness(checkpoint, seed)

    def _load_place(self, checkpoint: dict[str, Any]) -> list[str]:
        meters, device = checkpoint["meters"], next(self.model.parameters()).device
        same = len(meters) == get_world_size()
        self.meter.load_state_dict(meters[get_rank()] if same else EpochMeter.merge(meters), device)
        before, after = checkpoint["global_batch"], self.sampler.global_batch
        step = checkpoint["position"] // before
        self.meter.step = self.sampler.nearest_step(step, before)
        if after == before:
            return []
        return [
            f"the global batch changed from {before} to {after}; epoch {self.epoch} continues after step "
            f"{self.meter.step} of {self.sampler.steps}, and was at step {step}"
        ]

    def _load_randomness(self, checkpoint: dict[str, Any], seed: int) -> list[str]:
        """Restore the random states, or seed new ones if the number of processes has changed."""
        states, processes, rank = checkpoint["random_states"], get_world_size(), get_rank()
        if len(states) == processes:
            utils.set_random_state(states[rank])
            return []
        place = np.random.SeedSequence((seed, self.epoch, self.position, rank))
        utils.seed_everything(int(place.generate_state(1)[0]))
        return [
            f"the number of processes changed from {len(states)} to {processes}; mixup, drop path and dropout draw "
            "other numbers"
        ]
