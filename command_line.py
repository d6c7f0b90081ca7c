"""What the scripts of all three tasks share on the command line: the parser, common options, and how a script ends."""

import argparse
import difflib
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch

import utils
from models import TwinsError
from utils import Processes, UserError

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


# ------------------------------------------------------------------------------------------------------- the parser


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose options may be written with hyphens or underscores."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        spellings = {option.replace("_", "-"): option for option in self._option_string_actions}
        args = [self._spell(arg, spellings) for arg in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = nearest(unknown[0].split("=")[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]}{near}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    @staticmethod
    def _spell(arg: str, spellings: dict[str, str]) -> str:
        name, equals, value = arg.partition("=")
        return spellings.get(name.replace("_", "-"), name) + equals + value if arg.startswith("--") else arg


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default is argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"


LARGEST = 2**63  # more is taken for a mistake, and infinity for no number


def number(kind: type, low: float, high: float = float("inf"), above: bool = False) -> Callable[[str], float]:
    """Return an argument type: a number from `low` (or above it) to `high`."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        too_low = value is None or not (low < value if above else low <= value)
        if too_low or value > high or value >= LARGEST:
            what = "whole number" if kind is int else "number"
            limits = f"{'above' if above else 'of at least'} {low:g}" + (f" and at most {high:g}" if high < 1e9 else "")
            raise argparse.ArgumentTypeError(f"{text!r} is no {what} {limits}")
        return value

    return convert


POSITIVE_INT, COUNT = number(int, 1), number(int, 0)
POSITIVE, NON_NEGATIVE, SHARE = number(float, 0, above=True), number(float, 0), number(float, 0, 1)


def nearest(name: str, known, cutoff: float = 0.6) -> str:
    """Return `; did you mean ...?` with the known names that are most like one that is unknown, or nothing."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else ""


# --------------------------------------------------------------------------------------------------- common options


def add_process_options(parser: ArgumentParser) -> None:
    """Add the options that every script has: the device, the other processes, what is shown of an error."""
    group = parser.add_argument_group("processes")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    group.add_argument(
        "--dist_url", default="env://", metavar="URL", help="where the processes of a distributed run meet"
    )
    group.add_argument("--local-rank", type=COUNT, help=argparse.SUPPRESS)  # set by torch.distributed.launch, unused
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same results on the same GPU, too, which costs time there; on a CPU they are the same anyway",
    )
    group.add_argument("--traceback", action="store_true", help="show the whole traceback of an error in the input")


def add_loader_options(group, num_workers: int = 10) -> None:
    """Add the options of data loading; `loader_options` reads them."""
    group.add_argument(
        "--num_workers",
        default=num_workers,
        type=COUNT,
        metavar="N",
        help="data-loading processes of each process, at most one for each core it has; 0: load in the process itself",
    )
    group.add_argument(
        "--loader-timeout",
        default=600,
        type=COUNT,
        metavar="SECONDS",
        help="longest wait for a batch from a data-loading process; 0: for ever",
    )
    group.add_argument(
        "--pin-mem",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="page-locked memory for faster transfers to the GPU",
    )


def add_compute_options(group, amp: str = "auto") -> None:
    """Add the options of how a network is computed."""
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    group.add_argument(
        "--amp",
        nargs="?",
        const="auto",
        default=amp,
        choices=("auto", "off", "bf16", "fp16"),
        help="mixed precision; auto: bf16 where the GPU has it, fp16 on older ones, off on a CPU",
    )


def add_training_options(parser: ArgumentParser, kept: str = "nothing is kept without it"):
    """Add the options of a training run and its folder; return their group. `engine_options` reads some of them.

    Args:
        parser: Where to.
        kept: What is done where no folder is named.
    """
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir",
        "--work-dir",
        metavar="FOLDER",
        help=f"where args.json, log.txt and checkpoints go; {kept}",
    )
    group.add_argument("--resume", metavar="FILE", help="checkpoint to continue from")
    group.add_argument(
        "--auto-resume",
        action="store_true",
        help="continue from the newest checkpoint in the output folder; options that name the first weights count "
        "only for the first start, when there is none",
    )
    group.add_argument(
        "--save-every",
        type=POSITIVE_INT,
        metavar="STEPS",
        help="write a checkpoint after each so many steps of an epoch, besides the one at its end",
    )
    group.add_argument(
        "--keep",
        default=2,
        type=POSITIVE_INT,
        metavar="N",
        help="checkpoints to keep, besides those of the best epochs",
    )
    group.add_argument(
        "--on-nonfinite",
        default="stop",
        choices=("stop", "skip"),
        help="stop at a loss or gradient that is not finite, or skip that step on all processes; on a GPU skip waits "
        "for each step",
    )
    group.add_argument(
        "--max-skipped", default=10, type=POSITIVE_INT, metavar="N", help="skipped steps in a row before a stop"
    )
    group.add_argument(
        "--seed",
        default=0,
        type=number(int, 0, 2**32 - 1),
        metavar="N",
        help="seed of initialisation, order and augmentation",
    )
    group.add_argument("--print-freq", default=10, type=POSITIVE_INT, metavar="STEPS", help="steps between log lines")
    return group


def loader_options(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the arguments of a DataLoader that come from the options of `add_loader_options`."""
    workers = min(args.num_workers, utils.cores_per_process())
    return {
        "num_workers": workers,
        "worker_init_fn": utils.outlive_signals,
        "timeout": args.loader_timeout if workers else 0,
        "pin_memory": args.pin_mem and device.type == "cuda",
        "persistent_workers": workers > 0,
        "generator": torch.Generator(),  # the loader draws from it, not from the generator that the model uses
    }


def engine_options(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `engine.train_one_epoch` that come from the options of `add_training_options`."""
    return {
        "amp_dtype": choose_amp(args.amp, device),
        "print_freq": args.print_freq,
        "max_skipped": args.max_skipped if args.on_nonfinite == "skip" else 0,
        "save_every": args.save_every,
    }


def choose_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type that `--amp` means on a device, None for full precision."""
    if name == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; use --amp bf16 or off on a CPU")
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


# ------------------------------------------------------------------------------------------- how a script runs and ends


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
        processes = utils.init_processes(args.device, args.dist_url, patience)
        if args.deterministic:
            utils.make_deterministic()
        run(args, processes)
    except utils.Interrupted as stop:
        go_on = "run the same command with --auto-resume to go on" if kept else "nothing was kept"
        end_run(f"{name}: stopped by {stop.signal.name}; {go_on}", 128 + stop.signal, agreed=True)
    except KeyboardInterrupt:
        end_run(f"{name}: stopped at once", 128 + signal.SIGINT, agreed=False)
    except Exception as error:
        cause = find_cause(error)
        if cause is None or args.traceback:
            utils.kill_children()
            raise
        end_run(f"{name}: error: {cause}", 1, agreed=isinstance(error, utils.SharedError))
    utils.end_processes()


def find_cause(error: Exception) -> str | None:
    """Return in one line what is wrong and what to do; None if the fault may be in this code."""
    message = one_line(error)
    if isinstance(error, (UserError, TwinsError, utils.SharedError)):
        return message
    if isinstance(error, torch.OutOfMemoryError):
        return f"{message}; lower the batch size of a process, keeping the global batch, or pass --grad-checkpointing"
    texts = [text for part, text in KNOWN_FAULTS.items() if part in str(error) and isinstance(error, RuntimeError)]
    return texts[0].format(message) if texts else None


def end_run(message: str, code: int, agreed: bool) -> NoReturn:
    """Print why the run ends, once where all processes end it together, and exit; nothing that hangs may keep it."""
    if not agreed or utils.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)
    utils.kill_children()
    if agreed:  # otherwise leaving the group would wait for processes that wait for this one
        utils.end_processes()
    sys.exit(code)


def one_line(error: Exception) -> str:
    """Return the message of an error in one line; of one from a data-loading process, less the traceback before it."""
    message = str(error).strip() or type(error).__name__
    if re.match(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal ", message):
        raised = message.rpartition("Traceback (most recent call last):\n")[2]
        raised = re.sub(r"\A(?:[ \t].*\n|\n)*", "", raised)  # the lines of code that lead to it
        message = raised.partition(": ")[2] or raised
    return " ".join(message.split())
