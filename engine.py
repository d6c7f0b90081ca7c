"""The training loop of all three tasks, and the evaluation of classifiers."""

import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import all_reduce, get_rank, get_world_size

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
) -> dict[str, float]:
    """Train for one pass over the loader, in steps of `accumulation` batches.

    Args:
        model: The network, in DistributedDataParallel if there are several processes.
        compute_losses: `(model, batch) -> {name: scalar}`; their sum is minimised.
        data_loader: Batches: tensors, or lists, tuples and dicts of them. Its length is a multiple of
            `accumulation`.
        optimizer: Its learning rates are those of the scheduler.
        device: Where the model is and the batches go.
        epoch: Number of this epoch, from 0.
        scaler: Scales fp16 losses; made with `enabled=False` otherwise.
        amp_dtype: Type of autocast; None for full precision.
        accumulation: Batches whose mean gradient makes one step; processes exchange gradients on the last.
        clip_grad: Largest norm of the gradient; None for no clipping.
        model_ema: timm's ModelEmaV3 of the bare model, updated after each step.
        lr_scheduler: timm's, told of each update; one that counts epochs ignores that.
        print_freq: Steps between log lines, which wait for a GPU; so does fp16, on each step, for the verdict of
            its scaler, but nothing else.

    Returns:
        Means over the epoch and all processes: `loss`, its parts where there are several, and `lr`.

    Raises:
        FloatingPointError: On all processes together, if the loss of any of them is not finite.
    """
    model.train()
    steps = len(data_loader) // accumulation
    guard = FiniteGuard(device, epoch)
    meter = TrainMeter(device, epoch, steps, print_freq)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    batches = meter.timed(data_loader)
    for step in range(steps):
        for micro_step in range(accumulation):
            batch = to_device(next(batches), device)
            last = micro_step == accumulation - 1
            with _gradient_sync(model, last):
                with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                    losses = compute_losses(model, batch)
                loss = sum(losses.values())
                guard.watch(loss, step)
                scaler.scale(loss / accumulation).backward()
            meter.add(loss, losses)
        if clip_grad is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if model_ema is not None:
            model_ema.update(unwrap_model(model))
        meter.end_step(step, batch, accumulation, optimizer)
        if lr_scheduler is not None:
            lr_scheduler.step_update(epoch * steps + step + 1)
    guard.finish()
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
        ValueError: If there is no image to evaluate.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # correct at 1, correct at 5, loss, images
    for images, targets in data_loader:
        images, targets = to_device((images, targets), device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(images)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]  # (B, 5)
        losses = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
        counts = hits[:, 0].sum(), hits.sum(), losses.double().sum(), (targets != ignore_index).sum()
        sums += torch.stack([count.double() for count in counts])
    if sharded:
        all_reduce(sums)
    correct1, correct5, loss, images = sums.tolist()
    if not images:
        raise ValueError("there is no image to evaluate")
    return {
        "acc1": 100 * correct1 / images,
        "acc5": 100 * correct5 / images,
        "loss": loss / images,
        "images": int(images),
    }


class FiniteGuard:
    """Stops all processes together, at the same step, when any of them has a loss that is not finite.

    On a GPU the verdict is read two steps late, when it has long been computed, so that the guard never
    waits for the step under way.
    """

    def __init__(self, device: torch.device, epoch: int):
        self.epoch = epoch
        self.lag = 2 if device.type == "cuda" else 0
        self.pending = deque()

    def watch(self, loss: Tensor, step: int) -> None:
        """Note the loss of a step, and read the verdict on one `lag` batches ago."""
        culprit = torch.where(torch.isfinite(loss.detach()), 0, get_rank() + 1)
        all_reduce(culprit, dist.ReduceOp.MAX)
        self.pending.append((step, *_to_host(culprit)))
        while len(self.pending) > self.lag:
            self._read()

    def finish(self) -> None:
        """Read the verdicts that are left."""
        while self.pending:
            self._read()

    def _read(self) -> None:
        step, culprit, arrived = self.pending.popleft()
        if arrived is not None:
            arrived.synchronize()
        if culprit:
            raise FloatingPointError(
                f"the loss is not finite in epoch {self.epoch}, step {step}, on process {int(culprit) - 1}; training "
                "has stopped. A lower --lr, a longer --warmup-epochs, --clip-grad or --amp bf16 usually help"
            )


class TrainMeter:
    """Means of the losses, kept on the device, and the log lines of an epoch."""

    def __init__(self, device: torch.device, epoch: int, steps: int, print_freq: int):
        self.device = device
        self.epoch = epoch
        self.steps = steps
        self.print_freq = print_freq
        self.names: list[str] = []
        self.sums: Tensor | None = None  # of the loss and its parts
        self.batches = 0
        self.lr_sum = 0.0
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

    def add(self, loss: Tensor, losses: Losses) -> None:
        """Add the losses of one batch."""
        values = torch.stack([loss, *losses.values()]).detach().double()
        assert "loss" not in losses or len(losses) == 1, "'loss' is the name of the sum of several losses"
        self.names = ["loss", *losses]
        self.sums = values if self.sums is None else self.sums + values
        self.batches += 1

    def end_step(self, step: int, batch: Any, accumulation: int, optimizer: torch.optim.Optimizer) -> None:
        """Count a step, and print a line for each `print_freq`-th and the last."""
        lr = max(group["lr"] for group in optimizer.param_groups)
        self.lr_sum += lr
        self.window_images += _count_images(batch) * accumulation * get_world_size()
        if step % self.print_freq and step != self.steps - 1:
            return
        loss = self.sums[0].item() / self.batches  # waits for the GPU, so the times below are true
        now = time.perf_counter()
        elapsed = max(now - self.window_start, 1e-9)
        eta = timedelta(seconds=int((now - self.start) / (step + 1) * (self.steps - step - 1)))
        logger.info(
            f"epoch {self.epoch} [{step + 1:>{len(str(self.steps))}}/{self.steps}]  loss {loss:.4f}  lr {lr:.6f}  "
            f"{self.window_images / elapsed:.0f} images/s  waiting for data {self.window_waiting / elapsed:.0%}  "
            f"eta {eta}  peak memory {peak_memory(self.device) / 2**20:.0f} MiB"
        )
        self.window_start, self.window_waiting, self.window_images = now, 0.0, 0

    def averages(self) -> dict[str, float]:
        """Return the means over the epoch and all processes."""
        means = (all_reduce(self.sums / self.batches) / get_world_size()).tolist()
        parts = dict(zip(self.names, means, strict=True))
        if len(parts) == 2:  # the loss and its only part
            parts = {"loss": means[0]}
        return {"lr": self.lr_sum / self.steps, **parts}


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of nested lists, tuples and dicts to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def peak_memory(device: torch.device) -> int:
    """Return the most memory taken so far in bytes: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
