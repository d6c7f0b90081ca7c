"""Start and end of a script: processes, exit codes and one-line errors."""

import logging
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import NoReturn

import torch

import utils
from core.distributed import Processes, SharedError, choose_kernels, end_processes, get_rank, init_processes
from core.signals import Interrupted, kill_children
from models import TwinsError
from utils import UserError

logger = logging.getLogger("twins")

LOST = "another process of the run has ended or cannot be reached; see its message. Continue with --auto-resume"
RESUMABLE = "run the same command with --auto-resume to continue"  # the end of the message of a stopped training
# Parts of messages of torch that have a cause outside this code, and the message to print.
KNOWN_FAULTS = {
    "DataLoader timed out": "{}; raise --loader-timeout if the disk is slow, otherwise find out what blocks it",
    "DataLoader worker (pid": "{}; a data-loading process has died, often for lack of memory; lower --num_workers",
    "does not have a deterministic implementation": "{}; omit --deterministic",
    "Connection closed by peer": LOST,
    "Connection reset by peer": LOST,
    "NCCL": "{}; " + LOST,
}


def run_script(
    name: str,
    run: Callable[[Namespace, Processes], None],
    args: Namespace,
    when_stopped: str = "",
    one_size: bool = False,
) -> None:
    """Run a script on one or several processes.

    Bad input and known faults end with a one-line message and exit code 1, internal errors with their traceback. A run
    that a signal stops ends with exit code 128 plus the number of the signal.

    `args` has the options of processes and loaders. `when_stopped` ends the message of a stopped run: what is saved.
    `one_size` is passed to `choose_kernels`.
    """
    try:
        # The loader's timeout comes first, so that its message names the cause.
        patience = 600 + args.loader_timeout if args.loader_timeout else 86400
        processes = init_processes(args.device, args.dist_url, patience)
        if processes.device.type == "cuda":
            tf32 = getattr(args, "tf32", False)
            choose_kernels(tf32, one_size)
            logger.info("TF32 in products and convolutions of fp32: %s", "on" if tf32 else "off")
        if args.deterministic:
            utils.make_deterministic()
        run(args, processes)
    except Interrupted as stop:
        saved = when_stopped or "nothing was saved"
        end_run(f"{name}: stopped by {stop.signal.name}; {saved}", 128 + stop.signal, agreed=True)
    except KeyboardInterrupt:
        end_run(f"{name}: stopped immediately", 128 + signal.SIGINT, agreed=False)
    except Exception as error:
        cause = find_cause(error)
        if cause is None or args.traceback:
            kill_children()
            raise
        end_run(f"{name}: error: {cause}", 1, agreed=isinstance(error, SharedError))
    end_processes()


def find_cause(error: Exception) -> str | None:
    """Return a one-line message of the cause and the remedy; None for an error that may be a bug of this code."""
    message = one_line(error)
    if isinstance(error, (UserError, TwinsError, SharedError)):
        return message
    if isinstance(error, torch.OutOfMemoryError):
        return f"{message}; lower the batch size per process at the same global batch, or pass --grad-checkpointing"
    if isinstance(error, RuntimeError):
        for part, text in KNOWN_FAULTS.items():
            if part in str(error):
                return text.format(message)
    return None


def end_run(message: str, code: int, agreed: bool) -> NoReturn:
    """Print a message and exit; if all processes end together (`agreed`), only the main process prints it."""
    if not agreed or get_rank() == 0:
        print(message, file=sys.stderr, flush=True)
    kill_children()
    if agreed:  # otherwise the call could wait for other processes for ever
        end_processes()
    sys.exit(code)


def one_line(error: Exception) -> str:
    """Return the message of an error in one line, without the traceback that a data-loading process adds to it."""
    message = str(error).strip() or type(error).__name__
    if re.match(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal ", message):
        raised = message.rpartition("Traceback (most recent call last):\n")[2]
        raised = re.sub(r"\A(?:[ \t].*\n|\n)*", "", raised)  # drop the lines of the traceback
        message = raised.partition(": ")[2] or raised
    return " ".join(message.split())
