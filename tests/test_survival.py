"""Tests of fault tolerance: killed, stopped and failing runs, compared with uninterrupted runs."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import forks
from tests.helpers import ROOT, TINY, Run, assert_same_run, read_log, run_processes

pytestmark = pytest.mark.slow

EVERYTHING = [*TINY, "--batch-size", "2", "--global-batch", "8", "--epochs", "4", "--model-ema", "--repeated-aug"]
EVERYTHING += ["--drop-path", "0.3", "--num_workers", "2", "--warmup-epochs", "1", "--lr", "1e-2", "--print-freq", "1"]
EVERYTHING += ["--dist-eval", "--sched-on-updates"]
RESUMABLE = ["--auto-resume", "--save-every", "1"]


@pytest.fixture(scope="session")
def uninterrupted(image_folder, tmp_path_factory):
    """Function that returns the folder of an uninterrupted run on a number of processes."""
    folders = {}

    def run(processes: int) -> Path:
        if processes not in folders:
            folder = tmp_path_factory.mktemp("uninterrupted") / "run"
            straight = Run(processes, [*EVERYTHING, "--data-path", image_folder], folder)
            try:
                assert straight.end() == 0, straight.output
            finally:
                straight.kill()
            folders[processes] = folder
        return folders[processes]

    return run


def lines(run: Run, pattern: str) -> int:
    return len(re.findall(pattern, run.output))


INSTANTS = {
    "in an epoch": lambda run: lines(run, r"\[[12]/3\]"),
    "while a checkpoint is written": lambda run: (
        lines(run, r"\[2/3\]") and (run.folder / ".checkpoint.pth.tmp").exists()
    ),
    "after a log line": lambda run: lines(run, r"\[2/3\]"),
    "between epochs": lambda run: lines(run, "Accuracy of the network"),
    "at any time": lambda run: lines(run, "batch: "),
}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_ends_as_an_uninterrupted_one(processes, uninterrupted, image_folder, tmp_path, start):
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    print(f"instants of seed {seed}")
    command = [*EVERYTHING, *RESUMABLE, "--data-path", image_folder]
    for instant, condition in INSTANTS.items():
        for _ in range(3):
            run = start(processes, command)
            run.wait_for(condition, instant)
            if instant != "while a checkpoint is written":
                time.sleep(draw.uniform(0, 0.5 if instant == "at any time" else 0.05))
            run.kill()
            if instant != "while a checkpoint is written" or list(run.folder.glob(".checkpoint*.tmp")):
                break  # otherwise the write ended before the kill
        else:
            pytest.fail("no kill happened while a checkpoint was written")
        assert run.process.exitcode == -signal.SIGKILL or instant == "at any time"
    run = start(processes, command)
    assert run.end() == 0, run.output
    assert "resumed" in run.output
    assert_same_run(tmp_path / "run", uninterrupted(processes))
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_signalled_run_ends_as_an_uninterrupted_one(uninterrupted, image_folder, tmp_path, start):
    command = [*EVERYTHING, "--auto-resume", "--data-path", image_folder]  # within an epoch it only saves at a stop
    positions = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        run = start(1, command)
        run.wait_for(lambda run: lines(run, r"\[[12]/3\]"), "step")
        os.kill(run.process.pid, number)
        assert run.end() == 128 + number, run.output
        message = f"main.py: stopped by {number.name}; run the same command with --auto-resume to continue"
        assert run.output.splitlines()[-1] == message
        checkpoint = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
        positions.append(24 * checkpoint["epoch"] + checkpoint["position"])
    assert positions == sorted(positions)
    assert any(position % 24 for position in positions)
    run = start(1, command)
    assert run.end() == 0, run.output
    assert_same_run(tmp_path / "run", uninterrupted(1))


def test_two_signalled_processes_end_as_uninterrupted_ones(uninterrupted, image_folder, tmp_path, start):
    """Send the signal to the launcher, and then to one of its processes."""
    command = [*EVERYTHING, "--auto-resume", "--data-path", image_folder]
    for target in ("launcher", "process 1"):
        run = start(2, command)
        run.wait_for(lambda run: lines(run, r"\[[12]/3\]"), "step")
        os.kill(run.process.pid if target == "launcher" else run.processes()[1], signal.SIGTERM)
        assert run.end() != 0
        assert lines(run, "main.py: stopped by SIGTERM; run the same command with --auto-resume to continue") == 1
    run = start(2, command)
    assert run.end() == 0, run.output
    assert_same_run(tmp_path / "run", uninterrupted(2))


def test_the_launcher_restarts_a_killed_process(uninterrupted, image_folder, tmp_path, start):
    command = [*EVERYTHING, *RESUMABLE, "--data-path", image_folder]
    run = start(2, command, launcher_options=["--max-restarts=3"])
    run.wait_for(lambda run: lines(run, r"epoch 1 \[2/3\]"), "step")
    os.kill(run.processes()[1], signal.SIGKILL)
    assert run.end() == 0, run.output
    assert lines(run, r"resumed .*checkpoint\.pth") == 1
    assert_same_run(tmp_path / "run", uninterrupted(2))


def test_a_signal_during_evaluation(uninterrupted, image_folder, tmp_path):
    """The checkpoint is written before the evaluation, which is repeated."""
    script = write_script(
        tmp_path,
        """
        import os, signal
        def evaluate(*args, wrapped=main.evaluate, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return wrapped(*args, **kwargs)
        main.evaluate = evaluate
        """,
    )
    command = [*EVERYTHING, "--auto-resume", "--data-path", image_folder, "--output_dir", tmp_path / "run"]
    result = forks.run([script, *command])
    assert result.returncode == 143, result.stderr
    assert "Acc@1" not in result.stdout
    result = forks.run(["main.py", *command])
    assert result.returncode == 0, result.stderr
    assert "checkpoint.pth: 0 epochs and 24 images of the next are done" in result.stdout
    assert_same_run(tmp_path / "run", uninterrupted(1))


def test_another_number_of_processes_continues_near_the_same_place(uninterrupted, image_folder, tmp_path):
    """Resume a run of two processes on one process, in the middle of an epoch and with another global batch."""
    shutil.copytree(uninterrupted(2), tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    sums = torch.tensor([[6.0], [10.0]], dtype=torch.float64)  # of two steps
    meters = [{**checkpoint["meters"][rank], "taken": 2, "names": ("loss",), "sums": sums[rank]} for rank in range(2)]
    checkpoint |= {"epoch": 3, "position": 16, "meters": meters, "history": checkpoint["history"][:3]}
    torch.save(checkpoint, tmp_path / "run/checkpoint.pth")
    command = ["main.py", *EVERYTHING, "--auto-resume", "--data-path", image_folder, "--output_dir", tmp_path / "run"]
    result = forks.run([*command, "--global-batch", "12", "--lr", "1e-30", "--unscale-lr"])
    assert result.returncode == 0, result.stderr
    assert "checkpoint.pth: 3 epochs and 12 images of the next are done" in result.stdout
    assert "not an exact resume: the global batch changed from 8 to 12; epoch 3" in result.stdout
    assert "epoch 3 continues after step 1 of 2, and was at step 2" in result.stdout
    assert "not an exact resume: the number of processes changed from 2 to 1; mixup, drop path and" in result.stdout
    assert "option changed: global_batch from 8 to 12" in result.stdout
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [0, 1, 2, 3]
    # The mean loss of both processes in the two old steps, 4, and the loss of the remaining step of 12 images.
    assert read_log(tmp_path / "run")[3]["train_loss"] == pytest.approx((4 + 4 + 1.1) / 3, abs=0.1)


def test_a_file_size_limit_leaves_the_old_checkpoint(uninterrupted, image_folder, tmp_path):
    shutil.copytree(uninterrupted(1), tmp_path / "run")
    before = (tmp_path / "run/checkpoint.pth").read_bytes()
    command = [*EVERYTHING, "--auto-resume", "--data-path", image_folder, "--output_dir", tmp_path / "run"]
    command = [sys.executable, "main.py", *map(str, command), "--epochs", "5"]
    limited = ["bash", "-c", 'ulimit -f 4000; exec "$@"', "limited", *command]  # KiB
    result = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 1, result.stderr
    (line,) = result.stderr.splitlines()
    assert re.fullmatch(
        r"main\.py: error: .*checkpoint\.pth: cannot be written \(File too large\); the previous file is .*", line
    )
    assert (tmp_path / "run/checkpoint.pth").read_bytes() == before
    assert torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["epoch"] == 4
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_damaged_checkpoint_does_not_stop_a_run(uninterrupted, image_folder, tmp_path):
    """The checkpoint before it was written before the last evaluation, which is repeated with the same result."""
    shutil.copytree(uninterrupted(1), tmp_path / "run")
    (tmp_path / "run/checkpoint.pth").write_bytes(b"")
    command = [*EVERYTHING, "--auto-resume", "--data-path", image_folder, "--output_dir", tmp_path / "run"]
    result = forks.run(["main.py", *command])
    assert result.returncode == 0, result.stderr
    assert "renamed to checkpoint.pth.damaged, resuming from checkpoint.1.pth" in result.stdout
    assert_same_run(tmp_path / "run", uninterrupted(1))
    for path in (tmp_path / "run").glob("checkpoint*"):
        path.write_bytes(b"garbage")
    result = forks.run(["main.py", *command])
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "there is no intact checkpoint to resume from; remove" in line


def test_a_second_run_in_the_same_folder_is_refused(image_folder, tmp_path, start):
    command = [*EVERYTHING, "--auto-resume", "--data-path", image_folder, "--epochs", 1000]
    run = start(1, command)
    run.wait_for(lambda run: lines(run, "epoch 0"), "step")
    second = ["main.py", *command, "--output_dir", tmp_path / "run"]
    for result in (forks.run(second), run_processes(2, second)):
        assert result.returncode == 1
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("main.py: error")]
        holder = f"process {run.process.pid} on {os.uname().nodename}"
        assert f"--output_dir {tmp_path / 'run'} is in use by {holder}; wait until it ends" in line


def test_a_finished_run_is_reported(uninterrupted, image_folder, run_in_process, tmp_path):
    shutil.copytree(uninterrupted(1), tmp_path / "run")
    command = [*EVERYTHING, "--auto-resume", "--data-path", image_folder, "--output_dir", tmp_path / "run"]
    output, message = run_in_process(*command)
    assert message is None
    assert "this run is complete; raise the number of epochs to continue" in output
    assert_same_run(tmp_path / "run", uninterrupted(1))


# --------------------------------------------------------------------------------------------------------- faults


def write_script(folder: Path, patch: str) -> Path:
    """Write a script that runs main.py after a patch."""
    indent = re.match(r"\n( *)", patch)[1]
    body = patch.replace(f"\n{indent}", "\n")
    path = folder / "patched_main.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport main, datasets, torch\n{body}\nmain.main()\n"
    )
    return path


NAN_ON_RANK_1 = """
def build_compute_losses(*args, wrapped=main.build_compute_losses):
    compute_losses, calls = wrapped(*args), []
    def broken(model, batch):
        calls.append(1)
        losses = compute_losses(model, batch)
        bad = torch.distributed.get_rank() == 1 and len(calls) in {steps}
        return {{"loss": losses["loss"] * (float("nan") if bad else 1)}}
    return broken
main.build_compute_losses = build_compute_losses
"""


def test_a_non_finite_loss_on_one_process_ends_both(image_folder, tmp_path):
    script = write_script(tmp_path, NAN_ON_RANK_1.format(steps=[3]))
    start = time.monotonic()
    result = run_processes(2, [script, *EVERYTHING, "--data-path", image_folder])
    assert result.returncode == 1
    assert time.monotonic() - start < 60
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("main.py")]
    assert "main.py: error: the loss is not finite in epoch 0, step 1, on process 1; training has stopped" in line


def test_non_finite_steps_are_skipped_and_counted(image_folder, tmp_path):
    skipping = ["--on-nonfinite", "skip", "--max-skipped", 2, "--data-path", image_folder]
    script = write_script(tmp_path, NAN_ON_RANK_1.format(steps=[1, 3]))
    result = run_processes(2, [script, *EVERYTHING, *skipping, "--output_dir", tmp_path / "two"])
    assert result.returncode == 0, result.stderr
    assert [line["train_skipped"] for line in read_log(tmp_path / "two")] == [2, 0, 0, 0]
    assert "skipped: the loss is not finite in epoch 0, step 0, on process 1" in result.stdout
    script = write_script(tmp_path, NAN_ON_RANK_1.format(steps=[1, 2, 3, 4, 5, 6]))
    result = run_processes(2, [script, *EVERYTHING, *skipping, "--output_dir", tmp_path / "three"])
    assert result.returncode == 1
    assert "epoch 0, step 2, on process 1, after 2 consecutive skipped steps; training has stopped" in result.stderr


FAULT_OF_ONE_IMAGE = """
import os, signal, time
def decode_image(path, mode, wrapped=datasets.decode_image):
    if path.endswith("n01443537/3.JPEG") and "/train/" in path:
        {fault}
    return wrapped(path, mode)
datasets.decode_image = decode_image
"""
FAULTS = {
    "a worker is killed": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        r"DataLoader worker \(pid.*\) (is killed by signal: Killed|exited unexpectedly).*; .* has died, often for lack",
    ),
    "the loader hangs": (
        "time.sleep(1000)",
        "DataLoader timed out after 3 seconds; raise --loader-timeout if the disk is slow",
    ),
    "an image is unreadable": (
        "raise datasets.BadImageError(f'{path}: cannot be read as an image')",
        "n01443537/3.JPEG: cannot be read as an image; repair or remove it, or pass --bad-image skip",
    ),
}


def test_an_internal_error_shows_its_traceback_and_ends(image_folder, tmp_path):
    """Data-loading processes ignore signals, but must not keep a failing process from ending."""
    script = write_script(
        tmp_path,
        """
        def evaluate(*args, **kwargs):
            raise RuntimeError("boom")
        main.evaluate = evaluate
        """,
    )
    result = forks.run([script, *TINY, "--num_workers", 1, "--data-path", image_folder, "--epochs", 1], timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.splitlines()[-1] == "RuntimeError: boom"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_fault_of_the_loader_ends_all_processes(fault, processes, image_folder, tmp_path):
    patch, message = FAULTS[fault]
    script = write_script(tmp_path, FAULT_OF_ONE_IMAGE.format(fault=patch))
    command = [*TINY, "--num_workers", 1, "--data-path", image_folder]
    if fault == "the loader hangs":
        command += ["--loader-timeout", 3]
    start = time.monotonic()
    result = run_processes(processes, [script, *command])
    assert result.returncode == 1
    assert time.monotonic() - start < 60
    said = [line for line in result.stderr.splitlines() if line.startswith("main.py: error:")]
    assert len(said) <= processes
    assert len([line for line in said if re.search(message, line)]) == 1, result.stderr
    for line in said:
        assert re.search(message, line) or "another process of the run has ended or cannot be reached" in line
    if processes == 1:
        assert result.stderr.splitlines() == said


def test_no_epoch_is_lost_by_a_bad_validation_image(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "data")
    path = tmp_path / "data/val/n01443537/3.JPEG"
    data = path.read_bytes()
    path.write_bytes(data[:100])
    command = [
        *TINY,
        "--data-path",
        tmp_path / "data",
        "--epochs",
        1,
        "--auto-resume",
        "--output_dir",
        tmp_path / "run",
    ]
    result = forks.run(["main.py", *command])
    assert result.returncode == 1
    assert f"{path}: cannot be read as an image" in result.stderr
    path.write_bytes(data)
    result = forks.run(["main.py", *command])
    assert result.returncode == 0, result.stderr
    assert "checkpoint.pth: 0 epochs and 24 images of the next are done" in result.stdout
    assert len(read_log(tmp_path / "run")) == 1


# ---------------------------------------------------------------------------------------------------- determinism


def test_the_same_seed_gives_the_same_run(uninterrupted, image_folder, tmp_path):
    """This includes another number of data-loading workers, and needs no option."""
    command = [*EVERYTHING, "--data-path", image_folder, "--output_dir", tmp_path / "run", "--num_workers", 0]
    result = forks.run(["main.py", *command])
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", uninterrupted(1))


def test_deterministic_algorithms(uninterrupted, image_folder, tmp_path):
    script = write_script(
        tmp_path,
        """
        def evaluate(*args, wrapped=main.evaluate, **kwargs):
            print("deterministic", torch.are_deterministic_algorithms_enabled())
            return wrapped(*args, **kwargs)
        main.evaluate = evaluate
        """,
    )
    command = [*EVERYTHING, "--data-path", image_folder, "--output_dir", tmp_path / "run", "--deterministic"]
    result = forks.run([script, *command])
    assert result.returncode == 0, result.stderr
    assert "deterministic True" in result.stdout
    assert_same_run(tmp_path / "run", uninterrupted(1))
