"""What the benchmarks share: options, timing in turns, measurements in a new process, tables and reports."""

import argparse
import json
import logging
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch

import models  # noqa: F401  registers our models with timm
from core.options import POSITIVE_INT, ArgumentParser, find_fault
from core.recipes import PUBLISHED
from utils import UserError

logger = logging.getLogger("twins")

TURN_SECONDS = 0.3  # minimum duration of a turn; short steps are repeated
Row = dict[str, str | float | None]  # a row of a table: values by the headings of their columns


def build_parser(name: str, description: str, models_help: str = "") -> ArgumentParser:
    """Build the parser of `python -m benchmarks.NAME`; `models_help` says which models are measured, if any are."""
    usage = f"python -m benchmarks.{name} {'[MODEL ...] ' if models_help else ''}[options]"
    parser = ArgumentParser(prog=f"{name}.py", usage=usage, description=description)
    group = parser.add_argument_group("measurement")
    group.add_argument("--batch-size", default=8, type=POSITIVE_INT, metavar="N", help="images per batch")
    group.add_argument("--turns", default=7, type=POSITIVE_INT, metavar="N", help="number of timed turns")
    group.add_argument("--json", type=_report_file, metavar="FILE", help="also write the results to this file")
    if models_help:
        parser.add_argument("models", nargs="*", default=list(PUBLISHED), metavar="MODEL", help=models_help)
        threads = torch.get_num_threads()
        group.add_argument("--threads", default=threads, type=POSITIVE_INT, metavar="N", help="CPU threads")
    parser.set_defaults(loader_timeout=0)  # for `run_script`
    return parser


def _report_file(path: str) -> str:
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: name a file in a folder that exists")
    return path


def name_models(names: Sequence[str], peers: bool) -> list[tuple[str, ...]]:
    """Return the name of each model, followed by that of timm's version of it if `peers` is True."""
    for name in names:
        if fault := find_fault(name):
            raise UserError(f"model {fault}")
        if peers and name not in PUBLISHED:
            raise UserError(f"timm has no model like {name} to compare it with, only {', '.join(PUBLISHED)}")
    return [(name, name.replace("pcpvt", "twins_pcpvt").replace("alt_gvt", "twins_svt"))[: 1 + peers] for name in names]


def time_in_turns(steps: Sequence[Callable[[], Any]], turns: int, device: torch.device, what: str) -> list[list[float]]:
    """Return the seconds per call of each function in each of several turns.

    The turns alternate between the functions, so that a change of the machine's speed affects all of them. Each
    function is called twice before, as a warm-up. `what` names the measurement in a progress message.
    """
    print(f"{what}: warm-up and {turns} turns", file=sys.stderr, flush=True)
    repeats = []
    for step in steps:
        time_calls(step, 1, device)  # the first call compiles, selects kernels and fills caches
        repeats.append(math.ceil(TURN_SECONDS / time_calls(step, 1, device)))
    times = [[] for _ in steps]
    for _ in range(turns):
        for step, repeat, step_times in zip(steps, repeats, times, strict=True):
            step_times.append(time_calls(step, repeat, device) / repeat)
    return times


def time_calls(step: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Return the seconds that a number of calls take."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(our_times: Sequence[float], their_times: Sequence[float]) -> dict[str, float]:
    """Return our speed as a multiple of theirs: the median, minimum and maximum over the turns."""
    ratios = [theirs / ours for ours, theirs in zip(our_times, their_times, strict=True)]
    return {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def run_in_new_process(function: Callable[..., Any], *args) -> Any:
    """Call a function in a new process and return its result; the peak memory of a process never decreases."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def describe_machine(device: torch.device) -> str:
    """Return the device and the versions of the libraries in words."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}, timm {timm.__version__}"


def print_table(rows: Iterable[Row]) -> list[Row]:
    """Print rows as they arrive, under the headings of the first one, and return them."""
    printed = []
    for row in rows:
        cells = [_format(value) for value in row.values()]
        for first, *others in [cells] if printed else [list(row), cells]:
            padded = [cell.rjust(max(len(heading), 6) + 2) for heading, cell in zip(list(row)[1:], others, strict=True)]
            logger.info("%s", first.ljust(28) + "".join(padded))
        printed.append(row)
    return printed


def _format(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1e}"


def write_report(args: argparse.Namespace, device: torch.device, rows: list[Row]) -> None:
    """Write the results to the file of `--json`, if it is given."""
    if args.json:
        report = {"machine": describe_machine(device), "options": vars(args), "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=1))
