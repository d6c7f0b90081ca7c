"""Training runs on a GPU; skipped without one. `TWINS_TEST_DEVICE=cpu` runs these tests on a CPU, to test the tests."""

import os

import pytest
import timm
import torch

import main
from core.checkpoint import TrainState
from core.distributed import choose_kernels
from core.meters import EpochMeter
from core.options import TrainSettings
from engine import train_one_epoch
from tests.helpers import TINY, assert_equal, read_log
from tests.test_engine import Saves, Schedule, cross_entropy, make_batches
from tests.test_gpu_settings import build_plain_state, overflow_in

DEVICE = os.environ.get("TWINS_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("small_sets"),
]
RUN = [*TINY, "--device", DEVICE, "--data-set", "SHAPES", "--epochs", "2", "--drop-path", "0.1"]


@pytest.fixture(autouse=True)
def exact_kernels():
    """Compute in fp32 without TF32, and leave determinism as it was."""
    choose_kernels(tf32=False, one_size=True)
    yield
    torch.use_deterministic_algorithms(False)
    choose_kernels(tf32=False, one_size=True)


def run(*options) -> None:
    main.main([*RUN, *map(str, options)])


@pytest.mark.parametrize("options", [["--amp", "off"], ["--amp", "bf16", "--model-ema", "--global-batch", "8"]])
def test_a_resumed_deterministic_run_equals_an_uninterrupted_one(options, tmp_path, monkeypatch):
    folders = tmp_path / "straight", tmp_path / "resumed"
    run(*options, "--deterministic", "--output_dir", folders[0])

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(main, "evaluate_state", stop)
        with pytest.raises(SystemExit):
            run(*options, "--deterministic", "--output_dir", folders[1])
    run(*options, "--deterministic", "--output_dir", folders[1], "--auto-resume")
    states = [torch.load(folder / "checkpoint.pth", weights_only=True, map_location="cpu") for folder in folders]
    for name in ("model", "model_ema", "optimizer", "random_states"):
        assert_equal(states[1][name], states[0][name])
    losses = [[line["train_loss"] for line in read_log(folder)] for folder in folders]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_trains_as_a_cpu(amp_dtype):
    """The losses of ten steps; bf16 is compared with fp32."""
    losses = []
    for device, dtype in (("cpu", None), (DEVICE, None if amp_dtype == torch.float32 else amp_dtype)):
        torch.manual_seed(0)
        model = timm.create_model("alt_gvt_tiny", num_classes=5).to(device)
        seen = []

        def compute(model, batch, seen=seen):
            losses = cross_entropy(model, batch)
            seen.append(losses["loss"].item())
            return losses

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device != "cpu")
        scaler = torch.amp.GradScaler(device, enabled=False)
        state = TrainState(model, optimizer, Schedule(), scaler, None)
        settings = TrainSettings(torch.device(device), dtype)
        train_one_epoch(model, compute, make_batches(10, 8), state, settings, Saves())
        losses.append(seen)
    tolerance = 1e-3 if amp_dtype == torch.float32 else 0.05
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


def test_overflows_of_fp16_with_a_fused_optimizer():
    """Their results are read four steps later, without waiting for the GPU."""
    torch.manual_seed(0)
    model = timm.create_model("alt_gvt_tiny", num_classes=5).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    meter = EpochMeter()
    state = TrainState(model, optimizer, Schedule(), scaler, None, meter=meter)
    settings = TrainSettings(torch.device(DEVICE), torch.float16, max_overflows=3)
    train_one_epoch(model, overflow_in({1, 2}, []), make_batches(8, 2), state, settings, Saves())
    assert (meter.step, meter.skipped, meter.overflows_in_a_row, scaler.get_scale()) == (8, 2, 0, 1.0)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    with pytest.raises(FloatingPointError, match="after 3 consecutive skipped steps"):
        train_one_epoch(
            model, overflow_in(set(range(20)), []), make_batches(20, 2), restarted(state), settings, Saves()
        )


def restarted(state: TrainState) -> TrainState:
    """Return a state at the start of an epoch."""
    state.meter.start_epoch()
    return state


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_continues_the_steps_of_another_implementation(fused):
    """A fused optimizer has its step counts on the GPU; the second step continues from those of the first."""
    weights = []
    for kinds in ((fused, fused), (not fused, fused)):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2).to(DEVICE)
        saved = None
        for kind in kinds:
            state = build_plain_state(layer, kind)
            if saved:
                state.load_training(saved, seed=0)
            layer.zero_grad()
            layer(torch.ones(1, 3, device=DEVICE)).square().sum().backward()
            state.optimizer.step()
            saved = state.to_checkpoint({}, {})
        weights.append(layer.weight.detach().clone())
    torch.testing.assert_close(*weights)
