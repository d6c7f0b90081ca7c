"""Epoch meter, step log, and the check for non-finite losses on all processes."""

import logging
import math
import re
import resource
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
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
Losses = dict[str, Tensor]

MAX_WAITING = 0.1  # share of the time spent waiting for data; above it there is a warning


@dataclass
class EpochMeter:
    """Progress of one process within an epoch, and the sums of its losses."""

    step: int = 0  # completed steps of the epoch, including skipped ones
    taken: int = 0  # steps whose losses are in the sums: all but those of --on-nonfinite skip
    skipped: int = 0  # skipped steps of the epoch, also by the gradient scaler of fp16
    skipped_in_a_row: int = 0  # consecutive skipped steps up to now, including those of earlier epochs
    overflows_in_a_row: int = 0  # the same of steps that the scaler of fp16 has skipped
    lr_sum: float = 0.0  # sum of the learning rates
    names: tuple[str, ...] = ()  # of the losses
    sums: Tensor | None = None  # sums of the losses, float64 on their device; None before the first step

    def add(self, losses: Losses, lr: float) -> None:
        values = torch.stack(list(losses.values()))
        self.names = tuple(losses)
        self.sums = values if self.sums is None else self.sums + values
        self.lr_sum += lr
        self.step += 1
        self.taken += 1
        self.skipped_in_a_row = 0

    def add_skipped(self) -> None:
        """Add a step that did not change the weights."""
        self.step += 1
        self.skipped += 1
        self.skipped_in_a_row += 1

    def means(self) -> dict[str, float]:
        """Return the means of this process; an empty dict before the first step."""
        if not self.taken:
            return {}
        losses = (self.sums / self.taken).tolist()
        return {"lr": self.lr_sum / self.taken} | dict(zip(self.names, losses, strict=True))

    def averages(self) -> dict[str, float]:
        """Return the means over all processes. All processes must call it."""
        all_means = gather(self.means())
        return {name: sum(means[name] for means in all_means) / len(all_means) for name in all_means[0]}

    def start_epoch(self) -> None:
        """Reset the meter, except for the number of consecutive skipped steps."""
        in_a_row = {name: getattr(self, name) for name in ("skipped_in_a_row", "overflows_in_a_row")}
        self.load_state_dict(EpochMeter().state_dict() | in_a_row)

    @staticmethod
    def merge(states: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the mean of the states of all processes, used if their number has changed."""
        if states[0]["sums"] is None:
            return states[0]
        return {**states[0], "sums": torch.stack([state["sums"] for state in states]).mean(0)}

    def state_dict(self) -> dict[str, Any]:
        """Return the fields, in types that load with `weights_only=True`."""
        return {**vars(self), "sums": None if self.sums is None else self.sums.cpu()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Restore the fields that `state_dict` returned."""
        vars(self).update(state)
        if self.sums is not None:
            self.sums = self.sums.to(device)


class NonFiniteError(SharedError, FloatingPointError):
    """The loss or the gradient is infinite or NaN. All processes raise this error together."""


class StepGuard:
    """Checks each step on all processes: are loss and gradient finite, has any process received a signal to stop?

    The processes agree once in each step. On a GPU the result is read four steps later, when it has been computed, so
    that the check does not wait for the current step. If non-finite steps are skipped there is no delay: the result is
    needed before the update. Non-finite gradients of fp16 are no error until `max_overflows` steps in a row have them,
    because the gradient scaler skips these steps and lowers the loss scale.
    """

    def __init__(self, model: nn.Module, epoch: int, meter: EpochMeter, settings: TrainSettings):
        self.model = model
        self.epoch = epoch
        self.meter = meter
        self.max_skipped = settings.max_skipped
        self.max_overflows = settings.max_overflows if settings.amp_dtype == torch.float16 else 0
        self.lag = 4 if settings.device.type == "cuda" and not settings.max_skipped else 0
        self.pending = deque()
        self.finite_losses: list[Tensor] = []  # of the current step, bool scalars
        self.signal = 0  # number of the signal that any process has received
        self.buffers: list[Tensor] = []

    def start_step(self) -> None:
        """Start a step. If steps may be skipped, copy the buffers of the model."""
        self.finite_losses = []
        self.buffers = [buffer.clone() for buffer in self.model.buffers()] if self.max_skipped else []

    def restore_buffers(self) -> None:
        """Restore the buffers, such as running statistics, after a skipped step."""
        for buffer, before in zip(self.model.buffers(), self.buffers, strict=True):
            buffer.copy_(before)

    def add_loss(self, loss: Tensor) -> None:
        """Note whether the loss of a batch of the current step is finite."""
        self.finite_losses.append(torch.isfinite(loss.detach()))

    def check(self, gradient_norm: Tensor) -> bool:
        """End a step. Return False if it must be skipped because its losses or its gradient are not finite."""
        culprit = torch.where(torch.stack(self.finite_losses).all(), 0, get_rank() + 1)
        overflow = ~torch.isfinite(gradient_norm)
        verdict = torch.stack([culprit, overflow.to(culprit.dtype), torch.full_like(culprit, stop_requested())])
        self.pending.append((self.meter.step, *_to_host(all_reduce(verdict, dist.ReduceOp.MAX))))
        finite = True
        while len(self.pending) > self.lag:
            finite &= self._read()
        return finite

    def finish(self) -> None:
        while self.pending:
            self._read()

    def _read(self) -> bool:
        """Read the oldest result. Return True if its step was finite, False if it may be skipped."""
        step, verdict, arrived = self.pending.popleft()
        if arrived is not None:
            arrived.synchronize()
        culprit, overflow, number = verdict.tolist()
        self.signal = max(self.signal, number)
        if not culprit and self._is_harmless(overflow):
            return True
        found = f"the {'loss' if culprit else 'gradient'} is not finite in epoch {self.epoch}, step {step}"
        if culprit:  # the gradient is the mean over all processes
            found += f", on process {culprit - 1}"
        if self.meter.skipped_in_a_row < self.max_skipped:
            logger.info("skipped: %s", found)
            return False
        if skipped := self.max_skipped or self.meter.overflows_in_a_row:
            found += f", after {skipped} consecutive skipped steps"
        raise NonFiniteError(
            f"{found}; training has stopped. Try a lower learning rate, a longer warm-up, gradient clipping or "
            "--amp bf16"
        )

    def _is_harmless(self, overflow: bool) -> bool:
        """Return True for a finite gradient, and for an overflow that the gradient scaler has skipped; count these."""
        if not overflow:
            self.meter.overflows_in_a_row = 0
            return True
        if self.max_skipped or self.meter.overflows_in_a_row >= self.max_overflows:
            return False
        self.meter.overflows_in_a_row += 1
        self.meter.skipped += 1
        return True


class StepLog:
    """Log lines of an epoch, with throughput and remaining time."""

    def __init__(self, epoch: int, meter: EpochMeter, settings: TrainSettings, steps: int, run: Any):
        self.epoch = epoch
        self.meter = meter
        self.settings = settings
        self.steps = steps
        self.run = run
        self.first_step = meter.step
        self.start = self.window_start = time.perf_counter()
        self.window_waiting = 0.0
        self.waiting = self.elapsed = 0.0  # seconds after the first line: waiting for data, and all
        self.window_images = self.images = 0

    def timed(self, data_loader: Iterable) -> Iterator:
        """Iterate over the loader and measure the time spent waiting for it."""
        batches = iter(data_loader)
        start = time.perf_counter()
        for batch in batches:
            self.window_waiting += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def end_step(self, batch: Any, lr: float) -> None:
        """Count the images of a step; log a line after the first, every `print_freq`-th from it, and the last.

        The losses are means of this process since the start of the epoch. The last line is followed by one of the
        whole epoch, or of the part after a resume.
        """
        images = _count_images(batch) * self.settings.accumulation * get_world_size()
        self.window_images += images
        self.images += images
        done = self.meter.step
        if (done - 1) % self.settings.print_freq and done != self.steps:
            return
        means = self.meter.means()  # waits for the GPU, so that the times are right
        loss = means.get("loss", math.nan)
        now = time.perf_counter()
        elapsed = max(now - self.window_start, 1e-9)
        if done - 1 > self.first_step:  # before the first line, the loader starts
            self.waiting += self.window_waiting
            self.elapsed += elapsed
        eta = timedelta(seconds=int((now - self.start) / (done - self.first_step) * (self.steps - done)))
        logger.info(
            f"epoch {self.epoch} [{done:>{len(str(self.steps))}}/{self.steps}]  loss {loss:.4f}  lr {lr:.4g}  "
            f"{self.window_images / elapsed:.0f} images/s  waiting for data {self.window_waiting / elapsed:.0%}  "
            f"eta {eta}, run {self.run.remaining_time(self.steps)}  "
            f"peak memory {peak_memory(self.settings.device) / 2**20:.0f} MiB"
        )
        place = {"epoch": self.epoch, "step": done, "steps": self.steps, "global_step": self.epoch * self.steps + done}
        self.run.log_step(place | {"taken": self.meter.taken}, means | {"lr": lr})
        self.window_start, self.window_waiting, self.window_images = now, 0.0, 0
        if done == self.steps:
            logger.info("epoch %d: %d images in %.2f s", self.epoch, self.images, now - self.start)
            if self.waiting > MAX_WAITING * self.elapsed:
                logger.info(
                    "warning: %.0f %% of the time was spent waiting for data; raise --num_workers or use a faster disk",
                    100 * self.waiting / self.elapsed,
                )


def show_progress(batches: Collection, what: str, seconds: float = 20.0) -> Iterator:
    """Iterate over the batches and log the progress every `seconds` seconds."""
    start = logged = time.perf_counter()
    for done, batch in enumerate(batches, 1):
        yield batch
        now = time.perf_counter()
        if now - logged > seconds:
            eta = timedelta(seconds=int((now - start) / done * (len(batches) - done)))
            logger.info("%s [%d/%d]  eta %s", what, done, len(batches), eta)
            logged = now


def add_losses(sums: Losses, loss: Tensor, parts: Losses, batches: int) -> Losses:
    """Add the losses of one of several batches to the means of a step: the total as `loss`, and its parts."""
    assert "loss" not in parts or len(parts) == 1, "the name 'loss' is reserved for the sum of several losses"
    values = {"loss": loss} | (parts if len(parts) > 1 else {})
    return {name: sums.get(name, 0.0) + value.detach().double() / batches for name, value in values.items()}


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # unlike ru_maxrss, VmHWM does not include the peak of the parent process
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        peak = None
    if peak:
        return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _count_images(batch: Any) -> int:
    """Return the number of images of a batch: the length of its first entry."""
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return _count_images(first) if isinstance(first, tuple) else len(first)


def _to_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start copying a flag to the host. Return the copy and the event of its completion, None on a CPU."""
    if flag.device.type != "cuda":
        return flag, None
    copy = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
    copy.copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived
