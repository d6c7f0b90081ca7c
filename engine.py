"""The training loop of all three tasks, and the evaluation of classifiers."""

import logging
import math
import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import (
    EpochMeter,
    Interrupted,
    SharedError,
    UserError,
    all_reduce,
    broadcast_buffers,
    get_rank,
    get_world_size,
    stop_if_requested,
    stop_requested,
)

logger = logging.getLogger("twins")

Losses = dict[str, Tensor]


def train_one_epoch(
    model: nn.Module,
    compute_losses: Callable[[nn.Module, Any], Losses],
    data_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    *,
    scaler: torch.amp.GradScaler,
    amp_dtype: torch.dtype | None = None,
    accumulation: int = 1,
    clip_grad: float | None = None,
    model_ema: nn.Module | None = None,
    lr_scheduler=None,
    print_freq: int = 10,
    max_skipped: int = 0,
    meter: EpochMeter | None = None,
    save: Callable[[], None] | None = None,
    save_every: int | None = None,
) -> dict[str, float]:
    """Train for one pass over the loader, in steps of `accumulation` batches.

    Args:
        model: The network, in DistributedDataParallel if there are several processes.
        compute_losses: `(model, batch) -> {name: scalar}`; their sum is minimised.
        data_loader: Batches: tensors, or lists, tuples and dicts of them. Its length is a multiple of
            `accumulation`. In an epoch that goes on it gives the batches that are left.
        optimizer: Its learning rates are those of the scheduler.
        device: Where the model is and the batches go.
        epoch: Number of this epoch, from 0.
        scaler: Scales fp16 losses; made with `enabled=False` otherwise.
        amp_dtype: Type of autocast; None for full precision.
        accumulation: Batches whose mean gradient makes one step; processes exchange gradients on the last.
        clip_grad: Largest norm of the gradient; None for no clipping.
        model_ema: timm's ModelEmaV3 of the bare model, updated after each step.
        lr_scheduler: timm's, told of the updates done before each step; one that counts epochs ignores that.
        print_freq: Steps between log lines, which wait for a GPU; so does fp16, on each step, for the verdict of
            its scaler, and so does each step with `max_skipped`, but nothing else.
        max_skipped: Steps in a row that are skipped, if a loss or the gradient is not finite, before training stops.
        meter: Counts the steps and losses; in an epoch that goes on, that of its beginning.
        save: Called on all processes together after the last step of the epoch, and before a stop on a signal.
        save_every: Steps of the epoch after each of which `save` is called, too; None for none.

    Returns:
        Means over the steps of the epoch and all processes: `loss`, its parts where there are several, and `lr`;
        nothing if all steps were skipped.

    Raises:
        NonFiniteError: On all processes together, if the loss of any of them, or the gradient, is not finite.
        Interrupted: On all processes together, after the step in which any of them was asked to stop.
    """
    model.train()
    meter = EpochMeter() if meter is None else meter
    steps = meter.step + len(data_loader) // accumulation
    guard = StepGuard(device, epoch, max_skipped, meter)
    log = StepLog(device, epoch, steps, print_freq, meter)
    max_norm = math.inf if clip_grad is None else clip_grad
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    batches = log.timed(data_loader)
    for step in range(meter.step, steps):
        if lr_scheduler is not None:
            lr_scheduler.step_update(epoch * steps + step)
        buffers = [buffer.clone() for buffer in model.buffers()] if max_skipped else []
        step_losses, finite = {}, True
        for micro_step in range(accumulation):
            batch = to_device(next(batches), device)
            if not finite:
                continue  # the rest of a skipped step is loaded, but not computed
            with _gradient_sync(model, last=micro_step == accumulation - 1):
                with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                    losses = compute_losses(model, batch)
                loss = sum(losses.values())
                finite = guard.watch(loss, "loss")
                if finite:
                    scaler.scale(loss / accumulation).backward()
            step_losses = _add_losses(step_losses, loss, losses, accumulation)
        if finite:
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, max_norm)
            finite = scaler.is_enabled() or guard.watch(norm, "gradient")  # the scaler skips by its own rule
        lr = max(group["lr"] for group in optimizer.param_groups)
        if finite:
            scaler.step(optimizer)
            scaler.update()
            if model_ema is not None:
                model_ema.update(unwrap_model(model))
            meter.add(step_losses, lr)
        else:
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)  # running statistics of a loss that is not finite may not be either
            meter.add_skipped()
        optimizer.zero_grad(set_to_none=True)
        log.end_step(batch, accumulation, lr)
        if guard.signal or meter.step == steps or (save_every and meter.step % save_every == 0):
            guard.finish()
            if meter.step == steps:
                broadcast_buffers(model, *([] if model_ema is None else [model_ema]))
            if save is not None:
                save()
        if guard.signal:
            raise Interrupted(guard.signal)
    return meter.averages()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data_loader: Iterable,
    device: torch.device,
    *,
    amp_dtype: torch.dtype | None = None,
    sharded: bool = False,
    ignore_index: int = -1,
) -> dict[str, float]:
    """Evaluate a classifier, each image counted exactly once.

    Args:
        model: Maps images `(B, 3, H, W)` to logits `(B, classes)`.
        data_loader: Batches of `(images, class indices)`.
        device: Where the model is.
        amp_dtype: Type of autocast; None for full precision.
        sharded: The loader gives this process's share alone; sums are then taken over all processes.
        ignore_index: Target of images that do not count.

    Returns:
        `acc1` and `acc5` in percent, the mean cross-entropy `loss`, and the number of `images`.

    Raises:
        UserError: If there is no image to evaluate.
        Interrupted: On all processes together, if any of them was asked to stop; the others finish their share.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # correct at 1, correct at 5, loss, images
    for images, targets in data_loader:
        if stop_requested():
            break
        images, targets = to_device((images, targets), device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(images)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]  # (B, 5)
        losses = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
        counts = hits[:, 0].sum(), hits.sum(), losses.double().sum(), (targets != ignore_index).sum()
        sums += torch.stack([count.double() for count in counts])
    stop_if_requested(device)
    if sharded:
        all_reduce(sums)
    correct1, correct5, loss, images = sums.tolist()
    if not images:
        raise UserError("there is no image to evaluate")
    return {
        "acc1": 100 * correct1 / images,
        "acc5": 100 * correct5 / images,
        "loss": loss / images,
        "images": int(images),
    }


class NonFiniteError(SharedError, FloatingPointError):
    """The loss or the gradient is infinite or not a number; all processes raise it together."""


class StepGuard:
    """Has all processes agree, at each step, on what concerns them all: is it finite, was any asked to stop?

    On a GPU the verdict is read four values late, when it has long been computed, so that the guard never waits
    for the step under way; unless steps are to be skipped, which needs the verdict before the update.
    """

    def __init__(self, device: torch.device, epoch: int, max_skipped: int, meter: EpochMeter):
        self.epoch = epoch
        self.max_skipped = max_skipped
        self.meter = meter
        self.lag = 4 if device.type == "cuda" and not max_skipped else 0
        self.pending = deque()
        self.signal = 0  # the number of the signal that asked any process to stop

    def watch(self, value: Tensor, what: str) -> bool:
        """Note a value of the step under way; tell whether those read now, `lag` values late, are finite."""
        culprit = torch.where(torch.isfinite(value.detach()), 0, get_rank() + 1)
        verdict = all_reduce(torch.stack([culprit, torch.full_like(culprit, stop_requested())]), dist.ReduceOp.MAX)
        self.pending.append((self.meter.step, what, *_to_host(verdict)))
        return all([self._read() for _ in range(len(self.pending) - self.lag)])

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

    def __init__(self, device: torch.device, epoch: int, steps: int, print_freq: int, meter: EpochMeter):
        self.device = device
        self.epoch = epoch
        self.steps = steps
        self.print_freq = print_freq
        self.meter = meter
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

    def end_step(self, batch: Any, accumulation: int, lr: float) -> None:
        """Count the images of a step, and print a line after the first, each `print_freq`-th from it and the last."""
        self.window_images += _count_images(batch) * accumulation * get_world_size()
        done = self.meter.step
        if (done - 1) % self.print_freq and done != self.steps:
            return
        loss = self.meter.means().get("loss", math.nan)  # waits for the GPU, so the times below are true
        now = time.perf_counter()
        elapsed = max(now - self.window_start, 1e-9)
        eta = timedelta(seconds=int((now - self.start) / (done - self.first_step) * (self.steps - done)))
        logger.info(
            f"epoch {self.epoch} [{done:>{len(str(self.steps))}}/{self.steps}]  loss {loss:.4f}  lr {lr:.6f}  "
            f"{self.window_images / elapsed:.0f} images/s  waiting for data {self.window_waiting / elapsed:.0%}  "
            f"eta {eta}  peak memory {peak_memory(self.device) / 2**20:.0f} MiB"
        )
        self.window_start, self.window_waiting, self.window_images = now, 0.0, 0


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of nested lists, tuples and dicts to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        values = [to_device(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)  # a NamedTuple takes each
    return batch


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


def _add_losses(sums: Losses, loss: Tensor, parts: Losses, batches: int) -> Losses:
    """Add the share that one of several batches has in the mean losses of a step: their sum, `loss`, and its parts."""
    assert "loss" not in parts or len(parts) == 1, "'loss' is the name of the sum of several losses"
    values = {"loss": loss} | (parts if len(parts) > 1 else {})
    return {name: sums.get(name, 0.0) + value.detach().double() / batches for name, value in values.items()}


def _gradient_sync(model: nn.Module, last: bool):
    """Exchange gradients between processes on the last batch of a step alone."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def _count_images(batch: Any) -> int:
    """Return the length of the first tensor or list in a batch."""
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(first)


def _to_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start copying a flag to the host; return the copy and the event of its arrival, None if it is there."""
    if flag.device.type != "cuda":
        return flag, None
    copy = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
    copy.copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived
