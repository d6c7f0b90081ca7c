"""Graceful shutdown: signals that stop a run after the current step."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from core.distributed import all_reduce, get_rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # schedulers, Ctrl-C, SLURM's --signal=USR1

_received_signal = 0


class Interrupted(Exception):  # noqa: N818  not an error: the run can be resumed
    """Raised on all processes when any of them has received a signal to stop and the checkpoint is saved."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextmanager
def signals_noted() -> Iterator[None]:
    """Record signals to stop inside the block instead of ending the process; see `stop_requested`."""
    global _received_signal
    _received_signal = 0
    with _signals_handled(_note_signal):
        yield


@contextmanager
def signals_raised() -> Iterator[None]:
    """Raise `Interrupted` inside the block as soon as a signal to stop arrives."""
    with _signals_handled(_raise_interrupted):
        yield


@contextmanager
def _signals_handled(handler: Callable) -> Iterator[None]:
    """Call a handler for signals to stop inside the block, and restore the earlier handlers at its end."""
    earlier = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)


def stop_requested() -> int:
    """Return the number of the signal to stop that this process has received; 0 if there is none."""
    return _received_signal


def stop_if_requested(device: torch.device) -> None:
    """Raise `Interrupted` on all processes if any has received a signal to stop. All processes must call it."""
    number = int(all_reduce(torch.tensor(stop_requested(), device=device), dist.ReduceOp.MAX))
    if number:
        raise Interrupted(number)


def outlive_signals(_worker: int) -> None:
    """Ignore signals to stop in a data-loading process, because the current step needs its images."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_children() -> None:
    """Kill data-loading processes; otherwise the exit of this process would wait for hanging ones."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # otherwise the loader would raise an error for each of them
    for child in multiprocessing.active_children():
        child.kill()


def _raise_interrupted(number: int, _frame) -> None:
    raise Interrupted(number)


def _note_signal(number: int, _frame) -> None:
    global _received_signal
    _received_signal = number
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if number == signal.SIGINT and get_rank() == 0:
        os.write(2, b"\nstopping after this step; press Ctrl-C again to stop immediately\n")  # print is not reentrant
