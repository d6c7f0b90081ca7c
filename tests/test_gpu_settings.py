"""Settings of GPUs, checked without one: kernels, fused optimizers, agreement of processes, overflows of fp16."""

import argparse
import copy
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.optim import AdamW

import main
import predict
from core import distributed, launch
from core.checkpoint import TrainState
from core.distributed import Processes, choose_kernels, parallelise
from core.meters import EpochMeter
from core.optimizer import build_optimizer
from dense.experiments import load_experiment
from dense.training import build_state
from detection import test as detection_test
from detection import train as detection_train
from segmentation import test as segmentation_test
from segmentation import train as segmentation_train
from tests.helpers import ROOT, TINY, assert_equal, fails
from tests.test_engine import cross_entropy, make_batches, model, train  # noqa: F401  model is a fixture
from utils import UserError

GPU = torch.device("cuda", 0)


# -------------------------------------------------------------------------------------------------------- kernels

CONFIG = str(ROOT / "segmentation/configs/upernet_alt_gvt_tiny_shapes.py")
DETECTOR = str(ROOT / "detection/configs/mask_rcnn_alt_gvt_tiny_shapes.py")
SCRIPTS = [  # script, arguments, and its defaults: TF32, and batches of one size
    (main, TINY, False, True),
    (main, [*TINY, "--eval", "--pretrained"], False, True),
    (segmentation_train, [CONFIG], True, False),
    (detection_train, [DETECTOR], True, False),
    (segmentation_test, [CONFIG, "x.pth", "--eval", "mIoU"], False, False),
    (detection_test, [DETECTOR, "x.pth", "--eval", "bbox"], False, False),
    (predict, ["x.pth", "x.jpg"], False, False),
]


@pytest.mark.parametrize(("script", "argv", "tf32", "one_size"), SCRIPTS)
def test_kernels_of_each_script(script, argv, tf32, one_size, monkeypatch, capsys):
    chosen = []

    def choose(*args):
        chosen.append(args)
        raise UserError("chosen")

    monkeypatch.setattr(launch, "init_processes", lambda *_: Processes(GPU))
    monkeypatch.setattr(launch, "choose_kernels", choose)
    for options in ([], ["--tf32"], ["--no-tf32"]):
        fails(capsys, script, *argv, *options)
    assert chosen == [(tf32, one_size), (True, one_size), (False, one_size)]


def test_chosen_kernels():
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends], torch.backends.cudnn.benchmark
    try:
        for value in (True, False):
            choose_kernels(tf32=value, one_size=not value)
            assert [backend.allow_tf32 for backend in backends] == [value, value]
            assert torch.backends.cudnn.benchmark == torch.backends.cuda.cudnn_sdp_enabled() == (not value)
    finally:
        for backend, allowed in zip(backends, before[0], strict=True):
            backend.allow_tf32 = allowed
        torch.backends.cudnn.benchmark = before[1]
        torch.backends.cuda.enable_cudnn_sdp(True)


# ------------------------------------------------------------------------------------------------ processes, steps


def test_buffers_are_not_exchanged_in_each_step(monkeypatch):
    options = {}
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda _, **kwargs: options.update(kwargs))
    parallelise(torch.nn.BatchNorm2d(2), Processes(GPU, 0, 2))
    assert options == {"device_ids": [0], "gradient_as_bucket_view": True, "broadcast_buffers": False}


def test_processes_agree_once_in_a_step(model, monkeypatch):  # noqa: F811
    calls = []
    monkeypatch.setattr("core.meters.all_reduce", lambda tensor, op: calls.append(tensor.tolist()) or tensor)
    train(model, make_batches(4, 2), accumulation=2)
    assert calls == [[0, 0, 0], [0, 0, 0]]


def overflow_in(steps: set[int], seen: list):
    """Return a function of losses whose gradient, but not value, is infinite in some steps."""

    def compute(model, batch):  # noqa: F811
        loss = cross_entropy(model, batch)["loss"]
        seen.append(len(seen))
        return {"loss": loss + (torch.sqrt((loss - loss.detach()) * 0) if seen[-1] in steps else 0)}

    return compute


def scaled(meter: EpochMeter, **settings) -> dict:
    """Return arguments of `train` for fp16 with a gradient scaler, whose scale is 4 at first."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    return {"state": {"meter": meter, "scaler": scaler}, "amp_dtype": torch.float16, **settings}


@pytest.mark.parametrize("max_skipped", [0, 3])
def test_overflows_of_fp16_are_skipped_and_counted(model, max_skipped):  # noqa: F811
    meter, other, batches = EpochMeter(), copy.deepcopy(model), make_batches(4, 2)
    options = scaled(meter, max_skipped=max_skipped)
    train(model, batches, overflow_in({1, 2}, []), **options)
    assert (meter.step, meter.skipped, meter.overflows_in_a_row) == (4, 2, 0)
    assert options["state"]["scaler"].get_scale() == 1.0  # halved twice
    options = scaled(EpochMeter())
    train(other, [batches[0], batches[3]], overflow_in(set(), []), **options)
    for (name, parameter), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-4, msg=name)  # other loss scales


@pytest.mark.parametrize("max_skipped", [0, 3])
def test_overflows_of_fp16_end_after_max_skipped(model, max_skipped):  # noqa: F811
    meter = EpochMeter()
    message = "the gradient is not finite in epoch 0, step 5, after 3 consecutive skipped steps"
    options = scaled(meter, max_skipped=max_skipped, max_overflows=3)
    with pytest.raises(FloatingPointError, match=message):
        train(model, make_batches(8, 2), overflow_in({0, 2, 3, 4, 5, 6, 7}, []), **options)
    assert meter.skipped == 4


# ----------------------------------------------------------------------------------------------- fused optimizers


@contextmanager
def on_gpu():
    """Let tensors and modules be created on a GPU that is not there, without values."""
    with FakeTensorMode(), torch.device("cuda"):
        yield


@pytest.mark.parametrize(("name", "fused"), [("adamw", True), ("adam", True), ("sgd", None), ("lion", None)])
def test_optimizers_are_fused_on_gpus(name, fused):
    args = main.get_args_parser().parse_args(["--opt", name])
    with on_gpu():
        optimizer = build_optimizer(args, torch.nn.Linear(3, 2), 64)
    assert optimizer.defaults.get("fused") == fused
    assert not build_optimizer(args, torch.nn.Linear(3, 2), 64).defaults.get("fused")


def test_optimizers_of_dense_tasks_are_fused_on_gpus():
    experiment = load_experiment(CONFIG)
    task = argparse.Namespace(lr_factor=lambda iteration: 1.0, sampler=None)
    args = argparse.Namespace(amp="off")
    with on_gpu():
        state = build_state(args, experiment, torch.nn.Linear(3, 2), task, GPU)
    assert state.optimizer.defaults["fused"]
    state = build_state(args, experiment, torch.nn.Linear(3, 2), task, torch.device("cpu"))
    assert not state.optimizer.defaults["fused"]


def build_plain_state(model, fused: bool) -> TrainState:  # noqa: F811
    """Build the state of a training with AdamW and a constant learning rate, in its first epoch of two steps."""
    optimizer = AdamW(model.parameters(), lr=0.1, fused=fused)
    sampler = argparse.Namespace(global_batch=4, steps=2, nearest_step=lambda step, batch: step)
    schedule = argparse.Namespace(step_update=lambda step: None, step=lambda epoch: None, state_dict=dict)
    return TrainState(model, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False), sampler)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_takes_the_state_of_another_implementation(fused, model, monkeypatch, tmp_path):  # noqa: F811
    """It must know its implementation when it loads the step counts, which fused ones keep on the GPU."""

    cross_entropy(model, make_batches(1, 2)[0])["loss"].backward()
    old = build_plain_state(model, not fused)
    old.optimizer.step()
    seen = []

    def load(self, state, wrapped=AdamW.load_state_dict):
        seen.extend(group["fused"] for group in state["param_groups"])
        wrapped(self, state)

    monkeypatch.setattr(AdamW, "load_state_dict", load)
    new = build_plain_state(model, fused)
    new.load_training(old.to_checkpoint({}, {}), seed=0)
    assert seen == [fused]
    assert new.optimizer.param_groups[0]["fused"] is fused
    assert_equal(new.optimizer.state_dict()["state"], old.optimizer.state_dict()["state"])
