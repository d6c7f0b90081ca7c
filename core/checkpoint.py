"""The state of a training run and its file format."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

import utils
from core.distributed import gather, get_rank, get_world_size
from core.meters import EpochMeter
from utils import UserError

FORMAT = 2  # of the checkpoints written here; files of format 1 have no such entry


REQUIRED_KEYS = {
    *("model", "model_ema", "optimizer", "scheduler", "scaler"),
    *("epoch", "position", "global_batch", "meters", "best", "history", "random_states", "args", "versions"),
}


@dataclass
class TrainState:
    """Everything that a run changes as it goes: what a checkpoint holds beside arguments and versions."""

    model: nn.Module  # bare: neither DistributedDataParallel nor anything else around it
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any  # one of timm's
    scaler: torch.amp.GradScaler
    sampler: Any  # an EpochSampler of samplers.py, of the training set
    model_ema: nn.Module | None = None  # timm's ModelEmaV3
    epoch: int = 0  # epochs done
    meter: EpochMeter = field(default_factory=EpochMeter)  # of the epoch under way
    best: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # the lines of log.txt

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer updates."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def position(self) -> int:
        """Images of the epoch under way that all processes together have done."""
        return self.meter.step * self.sampler.global_batch

    def to_checkpoint(self, args: dict[str, Any]) -> dict[str, Any]:
        """Return a dict that loads with `weights_only=True`. All processes must call it together."""
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
            "versions": utils.versions(),
            "format": FORMAT,
        }

    def load_training(self, checkpoint: dict[str, Any], seed: int) -> list[str]:
        """Restore everything but the weights, which `models.load_state_dict` loads with its checks.

        Args:
            checkpoint: What `to_checkpoint` returned.
            seed: Seed of new random numbers, where those of the checkpoint are for other processes.

        Returns:
            What could not be restored exactly, in words; nothing for the same processes and global batch.
        """
        state = {"params", "lookahead_step"}  # the others are options
        chosen = [{key: g[key] for key in g if key not in state} for g in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (KeyError, ValueError) as error:
            raise UserError(f"its optimizer does not fit these options ({error}); repeat those of its run") from error
        for group, options in zip(self.optimizer.param_groups, chosen, strict=True):
            group.update(options)  # the options of this run; with those of the old run they are the same
        if checkpoint["scaler"]:  # empty where the old run had no use for it
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint["epoch"]
        if self.epoch > 0:  # a schedule depends on the options and the epoch alone
            self.lr_scheduler.step(self.epoch - 1)
        self.best = checkpoint["best"]
        self.history = checkpoint["history"]
        return self._load_place(checkpoint) + self._load_randomness(checkpoint, seed)

    def _load_place(self, checkpoint: dict[str, Any]) -> list[str]:
        """Restore the place in the epoch and its meter."""
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
        """Restore the random states, or start new ones for other processes."""
        states, processes, rank = checkpoint["random_states"], get_world_size(), get_rank()
        if len(states) == processes:
            utils.set_random_state(states[rank])
            return []
        place = np.random.SeedSequence((seed, self.epoch, self.position, rank))
        utils.seed_everything(int(place.generate_state(1)[0]))
        return [f"{processes} process(es), not {len(states)}, so mixup, drop path and dropout draw other numbers"]
