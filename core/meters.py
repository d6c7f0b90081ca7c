"""The epoch meter, the step log, and the agreement of processes on non-finite losses."""

import logging
import math
import re
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.distributed import SharedError, all_reduce, gather, get_rank, get_world_size
from core.options import TrainSettings
from core.signals import stop_requested

logger = logging.getLogger("twins")


@dataclass
class EpochMeter:
    """What one process has seen of an epoch: how far it has come, and the sums that its means are made of."""

    step: int = 0  # steps of the epoch behind it, skipped ones included
    taken: int = 0  # steps that the sums are of
    skipped: int = 0
    skipped_in_a_row: int = 0  # just now, from the epochs before as well
    lr_sum: float = 0.0
    names: tuple[str, ...] = ()  # of the losses
    sums: torch.Tensor | None = None  # of the losses, float64 on their device

    def add(self, losses: dict[str, torch.Tensor], lr: float) -> None:
        """Count a step with its losses and learning rate."""
        values = torch.stack(list(losses.values()))
        self.names = tuple(losses)
        self.sums = values if self.sums is None else self.sums + values
        self.lr_sum += lr
        self.step += 1
        self.taken += 1
        self.skipped_in_a_row = 0

    def add_skipped(self) -> None:
        """Count a step that left the weights as they were."""
        self.step += 1
        self.skipped += 1
        self.skipped_in_a_row += 1

    def means(self) -> dict[str, float]:
        """Return the means of this process so far; nothing before the first step."""
        if not self.taken:
            return {}
        losses = (self.sums / self.taken).tolist()
        return {"lr": self.lr_sum / self.taken, **dict(zip(self.names, losses, strict=True))}

    def averages(self) -> dict[str, float]:
        """Return the means over all processes. All must call it."""
        means = gather(self.means())
        return {name: sum(each[name] for each in means) / len(means) for name in means[0]}

    def start_epoch(self) -> None:
        """Count from the beginning again, but for a row of skipped steps that the last epoch ended with."""
        self.load_state_dict({**EpochMeter().state_dict(), "skipped_in_a_row": self.skipped_in_a_row})

    @staticmethod
    def merge(states: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the state that each of another number of processes goes on from: the mean of the old ones."""
        if states[0]["sums"] is None:
            return states[0]
        return {**states[0], "sums": torch.stack([state["sums"] for state in states]).mean(0)}

    def state_dict(self) -> dict[str, Any]:
        """Return the fields, in types that load without executing code."""
        return {**vars(self), "sums": None if self.sums is None else self.sums.cpu()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Restore what `state_dict` returned."""
        vars(self).update(state)
        if self.sums is not None:
            self.sums = self.sums.to(device)


class NonFiniteError(SharedError, FloatingPointError):
    """The loss or the gradient is infinite or not a number; all processes raise it together."""


Losses = dict[str, Tensor]


class StepGuard:
    """Has all processes agree, at each step, on what concerns them all: is it finite, was any asked to stop?

    On a GPU the verdict is read four values late, when it has long been computed, so that the guard never waits
    for the step under way; unless steps are to be skipped, which needs the verdict before the update.
    """

    def __init__(self, model: nn.Module, epoch: int, meter: EpochMeter, settings: TrainSettings):
        self.model = model
        self.epoch = epoch
        self.meter = meter
        self.max_skipped = settings.max_skipped
        self.lag = 4 if settings.device.type == "cuda" and not settings.max_skipped else 0
        self.pending = deque()
        self.finite = True  # whether the step under way is, as far as is known
        self.signal = 0  # number of the signal that asked any process to stop
        self.buffers: list[Tensor] = []

    def start_step(self) -> None:
        """Begin a step; where steps may be skipped, remember the buffers of the model."""
        self.finite = True
        self.buffers = [buffer.clone() for buffer in self.model.buffers()] if self.max_skipped else []

    def restore_buffers(self) -> None:
        """Undo what a skipped step did to running statistics."""
        for buffer, before in zip(self.model.buffers(), self.buffers, strict=True):
            buffer.copy_(before)

    def check(self, value: Tensor, what: str) -> bool:
        """Note a value of the step under way; return whether those read now, `lag` values late, are finite."""
        culprit = torch.where(torch.isfinite(value.detach()), 0, get_rank() + 1)
        verdict = all_reduce(torch.stack([culprit, torch.full_like(culprit, stop_requested())]), dist.ReduceOp.MAX)
        self.pending.append((self.meter.step, what, *_to_host(verdict)))
        self.finite &= all([self._read() for _ in range(len(self.pending) - self.lag)])
        return self.finite

    def finish(self) -> None:
        """Read the verdicts that are left."""
        while self.pending:
            self._read()

    def _read(self) -> bool:
        """Read the oldest verdict: tell whether the value was finite, and raise where it may not be skipped."""
        step, what, verdict, arrived = self.pending.popleft()
        if arrived is not None:
            arrived.synchronize()
        culprit, number = verdict.tolist()
        self.signal = max(self.signal, number)
        if not culprit:
            return True
        found = f"the {what} is not finite in epoch {self.epoch}, step {step}"
        if what == "loss":  # the gradient is that of all processes
            found += f", on process {culprit - 1}"
        if self.meter.skipped_in_a_row < self.max_skipped:
            logger.info("skipped: %s", found)
            return False
        row = f", after {self.meter.skipped_in_a_row} skipped steps in a row" if self.max_skipped else ""
        raise NonFiniteError(
            f"{found}{row}; training has stopped. A lower learning rate, a longer warm-up, clipping or --amp bf16 "
            "usually help"
        )


class StepLog:
    """The log lines of an epoch, and the time between them."""

    def __init__(self, epoch: int, meter: EpochMeter, settings: TrainSettings, steps: int, run: Any):
        self.epoch = epoch
        self.meter = meter
        self.settings = settings
        self.steps = steps
        self.run = run
        self.first_step = meter.step
        self.start = self.window_start = time.perf_counter()
        self.window_waiting = 0.0
        self.window_images = 0

    def timed(self, data_loader: Iterable) -> Iterator:
        """Iterate over the loader and count the time spent waiting for it."""
        batches = iter(data_loader)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.window_waiting += time.perf_counter() - start
            yield batch

    def end_step(self, batch: Any, lr: float) -> None:
        """Count the images of a step, and log a line after the first, every `print_freq`-th from it and the last."""
        self.window_images += _count_images(batch) * self.settings.accumulation * get_world_size()
        done = self.meter.step
        if (done - 1) % self.settings.print_freq and done != self.steps:
            return
        loss = self.meter.means().get("loss", math.nan)  # waits for the GPU, so the times below are true
        now = time.perf_counter()
        elapsed = max(now - self.window_start, 1e-9)
        eta = timedelta(seconds=int((now - self.start) / (done - self.first_step) * (self.steps - done)))
        logger.info(
            f"epoch {self.epoch} [{done:>{len(str(self.steps))}}/{self.steps}]  loss {loss:.4f}  lr {lr:.6f}  "
            f"{self.window_images / elapsed:.0f} images/s  waiting for data {self.window_waiting / elapsed:.0%}  "
            f"eta {eta}, run {self.run.remaining_time(self.steps)}  "
            f"peak memory {peak_memory(self.settings.device) / 2**20:.0f} MiB"
        )
        self.window_start, self.window_waiting, self.window_images = now, 0.0, 0


def show_progress(batches: Iterable, what: str, seconds: float = 20.0) -> Iterator:
    """Iterate over the batches and log every so many seconds how many are done."""
    start = logged = time.perf_counter()
    for done, batch in enumerate(batches, 1):
        yield batch
        now = time.perf_counter()
        if now - logged > seconds:
            left = timedelta(seconds=int((now - start) / done * (len(batches) - done)))
            logger.info("%s [%d/%d]  eta %s", what, done, len(batches), left)
            logged = now


def add_losses(sums: Losses, loss: Tensor, parts: Losses, batches: int) -> Losses:
    """Add the share that one of several batches has in the mean losses of a step: their sum, `loss`, and its parts."""
    assert "loss" not in parts or len(parts) == 1, "'loss' is the name of the sum of several losses"
    values = {"loss": loss} | (parts if len(parts) > 1 else {})
    return {name: sums.get(name, 0.0) + value.detach().double() / batches for name, value in values.items()}


def peak_memory(device: torch.device) -> int:
    """Return the most memory taken so far in bytes: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # unlike getrusage's, this figure does not start at that of the process that started this one
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        peak = None
    if peak:
        return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _count_images(batch: Any) -> int:
    """Return the length of the first tensor or list in a batch."""
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return _count_images(first) if isinstance(first, tuple) else len(first)


def _to_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start copying a flag to the host; return the copy and the event of its arrival, None if it is there."""
    if flag.device.type != "cuda":
        return flag, None
    copy = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
    copy.copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived
