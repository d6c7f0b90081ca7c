"""What the benchmarks share: options, timing in turns, measurements in a new process, and the report."""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch

import models  # noqa: F401  registers our models with timm
from core.options import COUNT, POSITIVE_INT, ArgumentParser, nearest
from core.recipes import PUBLISHED
from utils import UserError

TURN_SECONDS = 0.3  # minimum duration of a turn; short steps are repeated
PROGRESS_SECONDS = 20  # time between progress messages


# ----------------------------------------------------------------------------------------------------------- options


def build_parser(name: str, description: str, arguments: str = "[options]") -> ArgumentParser:
    """Build the parser of `python -m benchmarks.NAME`."""
    usage = f"python -m benchmarks.{name} {arguments}"
    return ArgumentParser(prog=f"{name}.py", usage=usage, description=description)


def add_models_argument(parser: ArgumentParser, help: str) -> None:
    """Add the names of the models; `choose_models` reads them."""
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{help} (default: the six published ones)")


def add_measurement_options(parser: ArgumentParser):
    """Add the options of measuring and reporting, and return their group."""
    group = parser.add_argument_group("measurement")
    group.add_argument("--turns", default=7, type=POSITIVE_INT, metavar="N", help="number of timed turns")
    group.add_argument("--json", metavar="FILE", help="also write the results to this file")
    return group


def add_batch_size_option(group) -> None:
    """Add `--batch-size`."""
    group.add_argument("--batch-size", default=8, type=POSITIVE_INT, metavar="N", help="images per batch")


def add_threads_option(group) -> None:
    """Add `--threads`."""
    group.add_argument("--threads", default=0, type=COUNT, metavar="N", help="CPU threads; 0: torch's default")


def add_script_options(parser: ArgumentParser, cpu_only: bool = True) -> None:
    """Add `--traceback` and, unless `cpu_only`, `--device`; set the other options that `run_script` reads."""
    group = parser.add_argument_group("script")
    parser.set_defaults(device="cpu", dist_url="env://", deterministic=False, loader_timeout=0)
    if not cpu_only:
        group.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    group.add_argument("--traceback", action="store_true", help="show the whole traceback of an error in the input")


def check_report(path: str | None) -> None:
    """Check before the measurements that the report can be written.

    Raises:
        UserError: If the path is a folder, or in a folder that does not exist.
    """
    if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
        raise UserError(f"--json {path}: name a file in a folder that exists")


def choose_models(names: Sequence[str], need_peers: bool) -> Sequence[str]:
    """Return the models to measure: those given, or else the published ones.

    Args:
        names: Models given on the command line.
        need_peers: True if timm must have each of the models too.

    Raises:
        UserError: If there is no such model.
    """
    for name in names:
        if not timm.is_model(name):
            raise UserError(f"model {name!r} is unknown{nearest(name, timm.list_models())}")
        if need_peers:
            name_peer(name)
    return names or list(PUBLISHED)


def name_peer(name: str) -> str:
    """Return timm's name of a published model."""
    if name not in PUBLISHED:
        raise UserError(f"timm has no model like {name} to compare it with, only {', '.join(PUBLISHED)}; choose these")
    return name.replace("pcpvt", "twins_pcpvt").replace("alt_gvt", "twins_svt")


# ------------------------------------------------------------------------------------------------------- measurement


def set_threads(threads: int) -> None:
    """Set the number of CPU threads; 0 keeps torch's default."""
    if threads:
        torch.set_num_threads(threads)


def print_progress(message: str) -> None:
    """Print a progress message on standard error; the results go to standard output."""
    print(message, file=sys.stderr, flush=True)


def time_in_turns(
    steps: Sequence[Callable[[], Any]], turns: int, device: torch.device, what: str | None = None
) -> list[list[float]]:
    """Time functions in turns, so that a change of the machine's speed affects all of them.

    Args:
        steps: Functions to time; each is called two or three times before, as a warm-up.
        turns: Number of times of each function.
        device: Device that the functions compute on.
        what: Name of the measurement in progress messages; None to print none.

    Returns:
        Seconds per call in each turn, for each function.
    """
    if what:
        print_progress(f"{what}: warm-up")
    repeats = []
    for step in steps:
        for _ in range(2):  # the first call compiles, selects kernels and fills caches
            seconds = time_calls(step, 1, device)
        repeats.append(max(1, math.ceil(TURN_SECONDS / seconds)))
        if repeats[-1] > 1:
            time_calls(step, repeats[-1], device)
    times = [[] for _ in steps]
    shown = time.perf_counter()
    for turn in range(1, turns + 1):
        if what and time.perf_counter() - shown >= PROGRESS_SECONDS:
            print_progress(f"{what}: turn {turn} of {turns}")
            shown = time.perf_counter()
        for step, repeat, step_times in zip(steps, repeats, times, strict=True):
            step_times.append(time_calls(step, repeat, device) / repeat)
    return times


def time_calls(step: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Return the seconds that a number of calls take; on a GPU they are measured with CUDA events."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - start


def compare(our_times: Sequence[float], their_times: Sequence[float]) -> dict[str, float]:
    """Return our speed as a multiple of theirs: the median, minimum and maximum over the turns."""
    ratios = [theirs / ours for ours, theirs in zip(our_times, their_times, strict=True)]
    return {"ratio": statistics.median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios)}


def run_in_new_process(function: Callable[..., Any], *args) -> Any:
    """Call a function in a new process and return its result; the peak memory of a process never decreases."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# ------------------------------------------------------------------------------------------------------------ report


def describe_machine(device: torch.device) -> str:
    """Return the device and the versions of the libraries in words."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}, timm {timm.__version__}"


def write_report(args: argparse.Namespace, device: torch.device, rows: list[dict[str, Any]]) -> None:
    """Write the results to the file of `--json`, if it is given."""
    if args.json:
        report = {"machine": describe_machine(device), "options": vars(args), "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=1))
