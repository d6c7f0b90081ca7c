"""The training steps of all three tasks and the evaluation of classifiers."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from core.checkpoint import TrainState
from core.distributed import all_reduce, broadcast_buffers
from core.meters import Losses, StepGuard, StepLog, add_losses, show_progress
from core.options import TrainSettings
from core.run import Run
from core.signals import Interrupted, stop_if_requested, stop_requested
from datasets import IGNORED_TARGET
from transforms import to_input
from utils import UserError


def train_one_epoch(
    model: nn.Module,
    compute_losses: Callable[[nn.Module, Any], Losses],
    data_loader: Iterable,
    state: TrainState,
    settings: TrainSettings,
    run: Run,
) -> dict[str, float]:
    """Train for one epoch, or for the rest of a resumed one, in steps of `settings.accumulation` batches.

    Args:
        model: `state.model`, wrapped in DistributedDataParallel if there are several processes.
        compute_losses: Function `(model, batch) -> {name: scalar}`. The sum is minimised, and logged as `loss`, which
            none of several scalars may be called.
        data_loader: Remaining batches of the epoch; their number is a multiple of `settings.accumulation`.
        state: State of the run; each step updates all of it except `epoch`, `best` and `history`.
        settings: Mixed precision, accumulation, clipping and intervals.
        run: Run that saves checkpoints: every `settings.save_every` steps, at the end, and before a stop.

    Returns:
        Means over steps and processes of `loss`, its parts and `lr`; an empty dict if all steps were skipped.

    Raises:
        NonFiniteError: On all processes, if the loss of any process or the gradient is not finite.
        Interrupted: On all processes, after the step (on a GPU up to four later) in which any was asked to stop.
    """
    model.train()
    meter, optimizer, scaler, accumulation = state.meter, state.optimizer, state.scaler, settings.accumulation
    steps = meter.step + len(data_loader) // accumulation
    guard = StepGuard(model, state.epoch, meter, settings)
    log = StepLog(state.epoch, meter, settings, steps, run)
    batches = log.timed(data_loader)
    optimizer.zero_grad(set_to_none=True)
    while meter.step < steps:
        state.lr_scheduler.step_update(state.epoch * steps + meter.step)
        guard.start_step()
        step_losses = {}
        for micro_step in range(accumulation):
            batch = to_device(next(batches), settings.device)
            with gradient_sync(model, is_last=micro_step == accumulation - 1):
                with settings.autocast():
                    losses = compute_losses(model, batch)
                loss = sum(losses.values())
                guard.add_loss(loss)
                scaler.scale(loss / accumulation).backward()
            step_losses = add_losses(step_losses, loss, losses, accumulation)
        scaler.unscale_(optimizer)
        is_finite = guard.check(clip_gradients(state.parameters(), settings.max_norm))
        lr = max(group["lr"] for group in optimizer.param_groups)
        if is_finite:
            scaler.step(optimizer)
            if state.model_ema is not None:
                state.model_ema.update(unwrap_model(model))
            meter.add(step_losses, lr)
        else:
            guard.restore_buffers()
            meter.add_skipped()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        log.end_step(batch, lr)
        if guard.signal or meter.step == steps or settings.saves_at(meter.step):
            guard.finish()
            if meter.step == steps:
                broadcast_buffers(model, state.model_ema)
            run.save()
        if guard.signal:
            raise Interrupted(guard.signal)
    return meter.averages()


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the gradients to a norm, infinity to leave them as they are, and return their norm before."""
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm < math.inf:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def gradient_sync(model: nn.Module, is_last: bool):
    """Return a context in which gradients are synchronised only for the last batch of a step."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data_loader: Iterable,
    device: torch.device,
    *,
    amp_dtype: torch.dtype | None = None,
    sharded: bool = False,
) -> dict[str, float]:
    """Evaluate a classifier. Each image counts exactly once.

    Args:
        model: Classifier, images `(B, 3, H, W)` -> logits `(B, classes)`.
        data_loader: Batches of `(images, class indices)`; the images are uint8 or normalised. Images with the target
            `IGNORED_TARGET` do not count.
        device: Device of the model.
        amp_dtype: Data type of autocast; None to disable mixed precision.
        sharded: True if the loader has only this process's part of the images; the sums are then reduced.

    Returns:
        `acc1` and `acc5` in percent, the mean cross-entropy `loss`, and the number of `images`.

    Raises:
        UserError: If there is no image to evaluate.
        Interrupted: On all processes, if any process received a signal to stop; the others finish their part.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # correct in top 1, correct in top 5, loss, images
    for images, targets in show_progress(data_loader, "evaluation"):
        if stop_requested():
            break
        images, targets = to_device((images, targets), device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(to_input(images))
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]  # (B, 5)
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="none")
        counts = hits[:, 0].sum(), hits.sum(), losses.double().sum(), (targets != IGNORED_TARGET).sum()
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


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of nested lists, tuples and dicts to a device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)
