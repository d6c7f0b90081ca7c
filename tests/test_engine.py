"""Tests of the training loop against updates computed by hand, and of the evaluation against counts by hand."""

import copy
import math
import os
import signal
import time
from datetime import timedelta
from typing import NamedTuple

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import models  # noqa: F401  registers our models
from core.checkpoint import TrainState
from core.distributed import Processes, parallelise
from core.meters import EpochMeter, _count_images
from core.options import TrainSettings
from core.signals import Interrupted, signals_noted
from engine import evaluate, to_device, train_one_epoch
from tests import forks

CPU = torch.device("cpu")


def cross_entropy(model, batch):
    images, targets = batch
    return {"loss": F.cross_entropy(model(images), targets)}


def make_batches(count: int, size: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]


class Schedule:
    """Schedule of a constant learning rate that records its arguments."""

    def __init__(self):
        self.seen = ()

    def step_update(self, num_updates):
        self.seen += (num_updates,)


class Saves:
    """Replacement of a `Run` that calls a function instead of saving."""

    def __init__(self, save=None):
        self.save = save or (lambda: None)

    def remaining_time(self, steps):
        return timedelta(0)

    def log_step(self, place, values):
        pass


def train(model, batches, compute_losses=cross_entropy, lr=0.1, save=None, state=None, **settings):
    """Train an epoch by SGD; `state` replaces fields of the TrainState."""
    fields = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=lr),
        "lr_scheduler": Schedule(),
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "sampler": None,
    }
    state = TrainState(model, **(fields | (state or {})))
    return train_one_epoch(model, compute_losses, batches, state, TrainSettings(CPU, **settings), Saves(save))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("alt_gvt_tiny", num_classes=5)


def assert_close_weights(a: nn.Module, b: nn.Module, **tolerance):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_accumulated_batches_equal_one_batch(model):
    whole = make_batches(3, 8)
    halves = [half for images, targets in whole for half in zip(images.chunk(2), targets.chunk(2), strict=True)]
    other = copy.deepcopy(model)
    stats = train(model, whole, max_norm=5.0)
    half_stats = train(other, halves, max_norm=5.0, accumulation=2)
    assert_close_weights(model, other, atol=1e-6, rtol=0)
    assert stats["loss"] == pytest.approx(half_stats["loss"], abs=1e-6)


def test_steps_equal_a_plain_loop(model):
    batches = make_batches(2, 4)
    expected = copy.deepcopy(model)
    ema = ModelEmaV3(model, decay=0.9)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []
    for images, targets in batches:
        expected.zero_grad()
        loss = F.cross_entropy(expected(images), targets)
        loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in expected.parameters()))
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter -= 0.1 * parameter.grad * min(1.0, 0.5 / norm)
        average = {name: 0.9 * value + 0.1 * expected.state_dict()[name] for name, value in average.items()}
        losses.append(loss.item())
    stats = train(model, batches, max_norm=0.5, state={"model_ema": ema})
    assert norm > 0.5
    assert_close_weights(model, expected, atol=1e-6, rtol=1e-5)
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, average[name], atol=1e-6, rtol=1e-5)
    assert stats == {"lr": pytest.approx(0.1), "loss": pytest.approx(sum(losses) / 2)}


def test_scaled_losses_take_the_same_steps(model):
    """As in fp16, gradients are unscaled before clipping."""
    batches = make_batches(3, 4)
    other = copy.deepcopy(model)
    train(model, batches, max_norm=0.5)
    train(other, batches, max_norm=0.5, state={"scaler": torch.amp.GradScaler("cpu", init_scale=2.0**12)})
    assert_close_weights(model, other, atol=1e-6, rtol=1e-5)


def test_parts_of_the_loss_are_summed_and_reported(model):
    def compute_losses(model, batch):
        loss = cross_entropy(model, batch)["loss"]
        return {"decode": loss, "aux": 0.4 * loss}

    stats = train(model, make_batches(2, 4), compute_losses, lr=0.0)
    assert set(stats) == {"lr", "loss", "decode", "aux"}
    assert stats["loss"] == pytest.approx(1.4 * stats["decode"])


def test_the_schedule_gets_the_number_of_updates(model):
    schedule = Schedule()
    train(model, make_batches(6, 2), state={"lr_scheduler": schedule}, accumulation=2)
    assert schedule.seen == (0, 1, 2)


def test_a_non_finite_loss_stops_before_the_weights_change(model):
    batches = make_batches(3, 4)
    batches[1][0][0, 0, 0, 0] = float("nan")
    reference = copy.deepcopy(model)
    train(reference, batches[:1])
    with pytest.raises(FloatingPointError, match="the loss is not finite in epoch 0, step 1, on process 0"):
        train(model, batches)
    assert_close_weights(model, reference, atol=0, rtol=0)


def in_process_group(rank: int, world_size: int, function, folder, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    results[rank] = function(rank)
    dist.destroy_process_group()


def on_processes(world_size: int, function, folder) -> list:
    """Call `function(rank)` in the processes of a group and return the results by rank."""
    with forks.CONTEXT.Manager() as manager:
        results = manager.dict()
        args = (world_size, function, folder, results)
        torch.multiprocessing.start_processes(in_process_group, args, nprocs=world_size, start_method="forkserver")
        return [results[rank] for rank in range(world_size)]


def train_into_nan(rank: int) -> str:
    batches = make_batches(4, 2, seed=rank)
    if rank == 1:
        batches[2][0][0, 0, 0, 0] = float("nan")
    model = DistributedDataParallel(timm.create_model("alt_gvt_tiny", num_classes=5))
    try:
        train(model, batches)
    except FloatingPointError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_a_non_finite_loss_stops_all_processes_together(tmp_path):
    messages = on_processes(2, train_into_nan, tmp_path)
    assert messages[0] == messages[1]
    assert "the loss is not finite in epoch 0, step 2, on process 1" in messages[0]


def train_with_a_restart(rank: int) -> bool:
    """Return True if four uninterrupted steps equal two and two steps with a new DistributedDataParallel in between."""
    batches = make_batches(4, 2, seed=rank)
    torch.manual_seed(0)
    straight = timm.create_model("alt_gvt_tiny", num_classes=5)
    restarted = copy.deepcopy(straight)
    processes = Processes(CPU, rank, dist.get_world_size())
    train(parallelise(straight, processes), batches)
    for part in (batches[:2], batches[2:]):
        train(parallelise(restarted, processes), part)
    states = straight.state_dict(), restarted.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
def test_gradients_are_added_in_the_same_order_after_a_restart(tmp_path):
    """Three processes are needed: the sum of two numbers does not depend on their order."""
    assert on_processes(3, train_with_a_restart, tmp_path) == [True, True, True]


SKIPPING = {"accumulation": 2, "max_skipped": 1, "max_norm": 1.0}


def skip_on_one(rank: int) -> list:
    """Train with a non-finite micro-batch on process 1, whose step is skipped.

    Returns:
        True if the weights equal those of a run without the step, True if the metrics are equal, and the meter.
    """
    batches = make_batches(6, 2, seed=rank)
    if rank == 1:
        batches[2][0][0, 0, 0, 0] = float("nan")
    torch.manual_seed(0)
    model = timm.create_model("alt_gvt_tiny", num_classes=5)
    reference = copy.deepcopy(model)
    processes = Processes(CPU, rank, 2)
    meter = EpochMeter()
    stats = train(parallelise(model, processes), batches, state={"meter": meter}, **SKIPPING)
    expected = train(parallelise(reference, processes), batches[:2] + batches[4:], accumulation=2, max_norm=1.0)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    return [same, stats == expected, meter.step, meter.taken, meter.skipped]


@pytest.mark.slow
def test_a_skipped_step_changes_nothing_on_any_process(tmp_path):
    assert on_processes(2, skip_on_one, tmp_path) == [[True, True, 3, 2, 1]] * 2


@pytest.mark.parametrize("max_norm", [math.inf, 1.0])
@pytest.mark.parametrize("max_skipped", [0, 1])
def test_a_non_finite_gradient_does_not_reach_the_weights(model, max_skipped, max_norm):
    batches = make_batches(3, 4)
    reference = copy.deepcopy(model)
    seen = []

    def overflow(model, batch):
        seen.append(batch)
        loss = cross_entropy(model, batch)["loss"]
        return {"loss": loss + (torch.sqrt((loss - loss.detach()) * 0) if len(seen) == 2 else 0)}  # the loss is finite

    if max_skipped:
        train(model, batches, overflow, max_norm=max_norm, max_skipped=1)
        train(reference, [batches[0], batches[2]], max_norm=max_norm)
    else:
        with pytest.raises(FloatingPointError, match="the gradient is not finite in epoch 0, step 1"):
            train(model, batches, overflow, max_norm=max_norm)
        train(reference, batches[:1], max_norm=max_norm)
    assert_close_weights(model, reference, atol=0, rtol=0)


def test_a_skipped_step_does_not_change_running_statistics():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    batches = make_batches(3, 4)
    reference = copy.deepcopy(model)
    train(reference, [batches[0], batches[2]])
    batches[1][0][0, 0, 0, 0] = float("nan")
    train(model, batches, max_skipped=1)
    assert_close_weights(model, reference, atol=0, rtol=0)


def running_statistics(rank: int) -> list[float]:
    """Train a network with BatchNorm on one of two processes; return the buffers of the model and its EMA."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    ema = ModelEmaV3(model, decay=0.5)
    train(parallelise(model, Processes(CPU, rank, 2)), make_batches(2, 2, seed=rank), state={"model_ema": ema})
    return [buffer.double().sum().item() for module in (model, ema) for buffer in module.buffers()]


@pytest.mark.slow
def test_processes_evaluate_with_the_same_statistics(tmp_path):
    statistics = on_processes(2, running_statistics, tmp_path)
    assert statistics[0] == statistics[1]
    assert any(value not in (0.0, 1.0) for value in statistics[0])


def test_too_many_consecutive_skipped_steps(model):
    batches = make_batches(6, 4)
    for i in (0, 2, 3, 4):
        batches[i][0][0, 0, 0, 0] = float("nan")
    meter = EpochMeter()
    with pytest.raises(FloatingPointError, match="step 4, on process 0, after 2 consecutive skipped steps"):
        train(model, batches, max_skipped=2, state={"meter": meter})
    assert (meter.step, meter.skipped, meter.skipped_in_a_row) == (4, 3, 2)
    meter.start_epoch()
    assert (meter.step, meter.skipped, meter.skipped_in_a_row) == (0, 0, 2)


def test_an_epoch_of_skipped_steps_has_no_loss(model):
    batches = make_batches(2, 4)
    for images, _ in batches:
        images[0, 0, 0, 0] = float("nan")
    assert train(model, batches, max_skipped=2) == {}


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_waiting_for_data_in_most_of_an_epoch_is_a_warning(seconds, model, caplog):
    class Batches(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(seconds)
                yield batch

    def losses(model, batch):
        time.sleep(0.05)
        return {"loss": model.head.bias.sum()}

    with caplog.at_level("INFO", logger="twins"):
        train(model, Batches(make_batches(5, 1)), losses, print_freq=1)
    warned = "of the time was spent waiting for data; raise --num_workers" in caplog.text
    assert warned == (seconds > 0)


def test_checkpoints_are_saved_between_steps_and_at_the_end(model):
    meter = EpochMeter()
    saved = []
    save, state = (lambda: saved.append(meter.step)), {"meter": meter}
    train(model, make_batches(10, 2), accumulation=2, state=state, save=save, save_every=2)
    assert saved == [2, 4, 5]
    train(model, [], state=state, save=save)  # resumed at the end of the epoch
    assert saved == [2, 4, 5]


def test_an_epoch_continues_with_its_meter(model):
    batches = make_batches(4, 4)
    other = copy.deepcopy(model)
    expected = train(model, batches)
    meter = EpochMeter()
    train(other, batches[:2], state={"meter": meter})
    restored = EpochMeter()
    restored.load_state_dict(meter.state_dict(), CPU)
    assert train(other, batches[2:], state={"meter": restored}) == expected


def stop_one(rank: int) -> tuple:
    """Train, with a signal to process 1 in its second step; return the saved steps and the signal of the stop."""
    meter, saved = EpochMeter(), []

    def compute_losses(model, batch):
        if rank == 1 and meter.step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return cross_entropy(model, batch)

    model = DistributedDataParallel(timm.create_model("alt_gvt_tiny", num_classes=5))
    with signals_noted():
        try:
            save = lambda: saved.append(meter.step)  # noqa: E731
            train(model, make_batches(4, 2), compute_losses, state={"meter": meter}, save=save)
        except Interrupted as stop:
            return saved, stop.signal
    return saved, None


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    assert on_processes(2, stop_one, tmp_path) == [([2], signal.SIGUSR1)] * 2


def count_exchanges(rank: int) -> list[int]:
    """Return the number of gradient exchanges in 6 batches, for steps of one, two and three batches."""
    counts = []
    for accumulation in (1, 2, 3):
        exchanges = []

        def exchange(state, bucket, exchanges=exchanges):
            exchanges.append(bucket.is_last())
            return allreduce_hook(state, bucket)

        model = DistributedDataParallel(timm.create_model("alt_gvt_tiny", num_classes=5))
        model.register_comm_hook(None, exchange)
        train(model, make_batches(6, 2, seed=rank), accumulation=accumulation)
        counts.append(sum(exchanges))
    return counts


@pytest.mark.slow
def test_accumulated_batches_exchange_gradients_once(tmp_path):
    assert on_processes(2, count_exchanges, tmp_path) == [[6, 3, 2]] * 2


def test_mixed_precision_trains(model):
    seen = []

    def compute_losses(model, batch):
        logits = model(batch[0])
        seen.append(logits.dtype)
        return {"loss": F.cross_entropy(logits, batch[1])}

    stats = train(model, make_batches(2, 4), compute_losses, amp_dtype=torch.bfloat16)
    assert seen == [torch.bfloat16] * 2
    assert 0 < stats["loss"] < 10


def test_log_line(model, caplog):
    caplog.set_level("INFO", logger="twins")
    train(model, make_batches(5, 4), print_freq=2)
    *lines, summary = [record.message for record in caplog.records]
    assert [line.split("]")[0] for line in lines] == ["epoch 0 [1/5", "epoch 0 [3/5", "epoch 0 [5/5"]
    assert summary.startswith("epoch 0: 20 images in ")
    for what in ("loss ", "lr 0.1", "images/s", "waiting for data", "eta 0:00:0", "peak memory", "MiB"):
        assert what in lines[-1]


class Fixed(nn.Module):
    """Model that returns its input as logits."""

    def forward(self, images):
        return images


@pytest.mark.parametrize("classes", [3, 12])
def test_evaluation_equals_counts_by_hand(classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(21, classes, generator=generator)
    targets = torch.randint(classes, (21,), generator=generator)
    targets[4] = -1  # does not count
    batches = list(zip(logits.split(8), targets.split(8), strict=True))
    kept = [i for i in range(21) if i != 4]
    ranks = [int((logits[i] > logits[i, targets[i]]).sum()) for i in kept]
    stats = evaluate(Fixed(), batches, CPU)
    assert stats["images"] == 20
    assert stats["acc1"] == pytest.approx(100 * sum(rank < 1 for rank in ranks) / 20)
    assert stats["acc5"] == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 20)
    assert stats["loss"] == pytest.approx(F.cross_entropy(logits[kept], targets[kept]).item())


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="there is no image to evaluate"):
        evaluate(Fixed(), [], CPU)


def test_nested_batches_are_moved():
    batch = {"images": [torch.ones(1), torch.ones(2)], "sizes": (3, "name")}
    moved = to_device(batch, torch.device("meta"))
    assert moved["images"][1].device.type == "meta"
    assert moved["sizes"] == (3, "name")


class Batch(NamedTuple):
    images: torch.Tensor
    sizes: list[int]


def test_images_of_nested_batches_are_counted():
    images, targets = torch.ones(5, 3), torch.ones(5)
    assert _count_images((Batch(images, [3]), targets)) == 5
    for batch in ([images, targets], {"images": images, "targets": targets}, ([images[0]] * 5, targets)):
        assert _count_images(batch) == 5


def test_named_tuples_are_moved():
    moved = to_device(Batch(torch.ones(1), [3]), torch.device("meta"))
    assert type(moved) is Batch
    assert moved.images.device.type == "meta"
    assert moved.sizes == [3]
