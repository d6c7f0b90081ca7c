"""Scripts in forks of a process that has imported them: they start in less than a second.

Arguments, environment, output, signals and exit codes are those of `python SCRIPT ARGUMENTS`, or of torchrun, whose own
code starts and watches the processes of a run.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

ROOT = Path(__file__).parents[1]
SCRIPTS = ("main", "segmentation.train", "segmentation.test", "detection.train", "detection.test")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.forks", *SCRIPTS])


def start(command: list, stdout: Path, stderr: Path, launcher: list | None = None, **environment) -> ForkServerProcess:
    """Start a script on one thread per process.

    Args:
        command: Path of the script, relative to the root, and its arguments.
        stdout: File of the standard output.
        stderr: File of the errors; it may be the same.
        launcher: Options of torchrun; None to start the script without it.
        **environment: Additional environment variables.
    """
    variables = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | environment
    process = CONTEXT.Process(target=_run, args=([str(arg) for arg in command], stdout, stderr, launcher, variables))
    process.start()
    return process


def run(
    command: list, launcher: list | None = None, timeout: float = 240, **environment
) -> subprocess.CompletedProcess:
    """Run a script like `start`, and return its exit code and output as `subprocess.run` does."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = start(command, stdout, stderr, launcher, **environment)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, stdout.read_text(), stderr.read_text())
        return subprocess.CompletedProcess(command, process.exitcode, stdout.read_text(), stderr.read_text())


def call(function: Callable, *args) -> Any:
    """Call a function in a new process and return its result, as `benchmarks.common.run_in_new_process` does."""
    with ProcessPoolExecutor(1, CONTEXT) as pool:
        return pool.submit(function, *args).result()


def _run(command: list[str], stdout: Path, stderr: Path, launcher: list | None, variables: dict[str, str]) -> None:
    """Run a script, in this process or by torchrun."""
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # data loaders use Python's default, not the fork server
    if launcher is None:
        _run_script(*command)
        return
    args = torchrun.parse_args([*map(str, launcher), "--start_method=fork", *command])
    config, _, _ = torchrun.config_from_args(args)
    try:
        elastic_launch(config, _run_script)(*command)
    except ChildFailedError as error:
        sys.exit(str(error))


def _run_script(*command: str) -> None:
    """Run a script in this process, as `python` does."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):  # torchrun handles them itself
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
