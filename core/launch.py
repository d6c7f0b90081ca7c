"""How a script starts and ends: processes, exit codes and one-line errors."""

import argparse
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

import utils
from core.distributed import Processes, SharedError, end_processes, get_rank, init_processes
from core.signals import Interrupted, kill_children
from models import TwinsError
from utils import UserError

# Parts of the messages of errors that torch raises where this code is not at fault, and what to do.
LOST = "another process of the run has ended or cannot be reached; its message says why. Continue with --auto-resume"


KNOWN_FAULTS = {
    "DataLoader timed out": "{}; raise --loader-timeout if the disk is that slow, or look for what blocks it",
    "DataLoader worker (pid": "{}; a data-loading process has died, often for want of memory; lower --num_workers",
    "does not have a deterministic implementation": "{}; leave --deterministic out",
    "Connection closed by peer": LOST,
    "Connection reset by peer": LOST,
    "NCCL": "{}; " + LOST,
}


def run_script(
    name: str, run: Callable[[argparse.Namespace, Processes], None], args: argparse.Namespace, kept: bool = False
) -> None:
    """Run a script among the processes that a launcher started.

    Bad input and known faults end with one line and exit code 1, internal errors with their traceback; a run that a
    signal stops ends with 128 plus the signal's number.

    Args:
        name: Of the script, for messages.
        run: What it does.
        args: With the options of `add_process_options` and `add_loader_options`.
        kept: Whether a stopped run can go on another time.
    """
    try:
        # A process whose loader hangs tells so itself, before the others give it up.
        patience = 600 + args.loader_timeout if args.loader_timeout else 86400
        processes = init_processes(args.device, args.dist_url, patience)
        if args.deterministic:
            utils.make_deterministic()
        run(args, processes)
    except Interrupted as stop:
        go_on = "run the same command with --auto-resume to go on" if kept else "nothing was kept"
        end_run(f"{name}: stopped by {stop.signal.name}; {go_on}", 128 + stop.signal, agreed=True)
    except KeyboardInterrupt:
        end_run(f"{name}: stopped at once", 128 + signal.SIGINT, agreed=False)
    except Exception as error:
        cause = find_cause(error)
        if cause is None or args.traceback:
            kill_children()
            raise
        end_run(f"{name}: error: {cause}", 1, agreed=isinstance(error, SharedError))
    end_processes()


def find_cause(error: Exception) -> str | None:
    """Return in one line what is wrong and what to do; None if the fault may be in this code."""
    message = one_line(error)
    if isinstance(error, (UserError, TwinsError, SharedError)):
        return message
    if isinstance(error, torch.OutOfMemoryError):
        return f"{message}; lower the batch size of a process, keeping the global batch, or pass --grad-checkpointing"
    texts = [text for part, text in KNOWN_FAULTS.items() if part in str(error) and isinstance(error, RuntimeError)]
    return texts[0].format(message) if texts else None


def end_run(message: str, code: int, agreed: bool) -> NoReturn:
    """Print why the run ends, once where all processes end it together, and exit; nothing that hangs may keep it."""
    if not agreed or get_rank() == 0:
        print(message, file=sys.stderr, flush=True)
    kill_children()
    if agreed:  # otherwise leaving the group would wait for processes that wait for this one
        end_processes()
    sys.exit(code)


def one_line(error: Exception) -> str:
    """Return the message of an error in one line; of one from a data-loading process, less the traceback before it."""
    message = str(error).strip() or type(error).__name__
    if re.match(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal ", message):
        raised = message.rpartition("Traceback (most recent call last):\n")[2]
        raised = re.sub(r"\A(?:[ \t].*\n|\n)*", "", raised)  # the lines of code that lead to it
        message = raised.partition(": ")[2] or raised
    return " ".join(message.split())
