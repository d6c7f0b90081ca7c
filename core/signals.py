"""Requests to stop a run."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from core.distributed import all_reduce, get_rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # schedulers, the keyboard, SLURM's --signal=USR1


_received_signal = 0


class Interrupted(Exception):  # noqa: N818  not an error: the run goes on another time
    """Raised on all processes together when one of them was asked to stop and its work is safe."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextmanager
def signals_noted() -> Iterator[None]:
    """Have signals that ask this process to stop only noted in the block, for `stop_requested` to tell."""
    global _received_signal
    _received_signal = 0
    handlers = {each: signal.signal(each, _note_signal) for each in STOP_SIGNALS}
    try:
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


def stop_requested() -> int:
    """Return the number of the signal that asked this process to stop, 0 if none has."""
    return _received_signal


def stop_if_requested(device: torch.device) -> None:
    """Raise `Interrupted` on all processes if any of them was asked to stop. All must call it."""
    number = int(all_reduce(torch.tensor(stop_requested(), device=device), dist.ReduceOp.MAX))
    if number:
        raise Interrupted(number)


def outlive_signals(_worker: int) -> None:
    """Let a data-loading process live on when its whole group is signalled: the step under way needs its images."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def kill_children() -> None:
    """End data-loading processes, even hanging ones, which this process would wait for at its exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or the loader would raise an error at each death
    for child in multiprocessing.active_children():
        child.kill()


def _note_signal(number: int, _frame) -> None:
    global _received_signal
    _received_signal = number
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if number == signal.SIGINT and get_rank() == 0:
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print may be what was interrupted
