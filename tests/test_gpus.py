"""Runs on two GPUs; skipped with fewer. `TWINS_TEST_DEVICE=cpu` runs these tests on a CPU, to test the tests."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers import ROOT, TINY, assert_equal, read_log, torchrun_options

DEVICE = os.environ.get("TWINS_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpus,
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
RUN = [*TINY, "--device", DEVICE, "--epochs", "2", "--dist-eval", "--deterministic", "--print-freq", "1"]
UPERNET = ["segmentation/configs/upernet_alt_gvt_tiny_shapes.py", "--device", DEVICE, "--num_workers", "0"]
FIELDS = [
    "channels=16",
    "crop_size=64",
    "global_batch=4",
    "iterations=4",
    "eval_interval=4",
    "pretrained=",
    "drop_path=0",
]


def command(processes: int, script: str, *options) -> list[str]:
    launcher = ["-m", "torch.distributed.run", *torchrun_options(processes)] if processes > 1 else []
    return [sys.executable, "-W", "ignore", *launcher, script, *map(str, options)]


def run(processes: int, script: str, *arguments) -> str:
    """Run a script on some GPUs and return its output."""
    options = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "timeout": 300, "check": False}
    done = subprocess.run(command(processes, script, *arguments), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_gpus_evaluate_as_one(image_folder, tmp_path):
    data = ["--data-path", image_folder]
    run(2, "main.py", *RUN, *data, "--output_dir", tmp_path)
    weights = ["--eval", "--resume", tmp_path / "checkpoint.pth", *data]
    both, one = (run(count, "main.py", *RUN, *weights) for count in (2, 1))
    pattern = r"Acc@1 .*\n.*"
    assert re.search(pattern, both)[0] == re.search(pattern, one)[0]


def test_a_signalled_run_ends_as_an_uninterrupted_one(image_folder, tmp_path):
    options = [*RUN, "--data-path", image_folder, "--auto-resume"]
    run(2, "main.py", *options, "--output_dir", tmp_path / "straight")
    stopped = [*options, "--output_dir", tmp_path / "stopped"]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(command(2, "main.py", *stopped), cwd=ROOT, stdout=output, stderr=output)
        while "[1/" not in (tmp_path / "output").read_text():
            assert process.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) != 0
    assert "stopped by SIGTERM; run the same command with --auto-resume" in (tmp_path / "output").read_text()
    run(2, "main.py", *stopped)
    states = [torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("straight", "stopped")]
    assert_equal(states[1]["model"], states[0]["model"])


@pytest.mark.skipif(DEVICE == "cpu", reason="processes on CPUs do not share the statistics of BatchNorm")
def test_two_gpus_share_the_statistics_of_batch_norms(tmp_path):
    losses = []
    for processes in (1, 2):
        fields = [*FIELDS, f"batch_size={4 // processes}"]
        folder = tmp_path / str(processes)
        run(processes, "segmentation/train.py", *UPERNET, "--work-dir", folder, "--cfg-options", *fields)
        losses.append(read_log(folder)[-1]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
