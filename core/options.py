"""What the scripts of all three tasks share on the command line: the parser, common options, and how a script ends."""

import argparse
import difflib
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from core.distributed import cores_per_process
from core.signals import outlive_signals
from utils import UserError

logger = logging.getLogger("twins")


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
    """Add the options of a training run and its folder; return their group. `train_settings` reads some of them.

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
    workers = min(args.num_workers, cores_per_process())
    return {
        "num_workers": workers,
        "worker_init_fn": outlive_signals,
        "timeout": args.loader_timeout if workers else 0,
        "pin_memory": args.pin_mem and device.type == "cuda",
        "persistent_workers": workers > 0,
        "generator": torch.Generator(),  # the loader draws from it, not from the generator that the model uses
    }


@dataclass(frozen=True)
class TrainSettings:
    """What `engine.train_one_epoch` is told and does not change.

    Attributes:
        device: Device of the model.
        amp_dtype: Type of autocast; None for full precision.
        accumulation: Batches whose mean gradient makes one step.
        max_norm: Norm that gradients are clipped to; infinite for no clipping.
        print_freq: Steps between log lines. Each line waits for a GPU; so does each step in fp16, for its scaler, and
            each step where non-finite ones are skipped, but nothing else.
        max_skipped: Non-finite steps in a row that are skipped before training stops.
        save_every: Steps of an epoch between checkpoints; None for none within an epoch.
    """

    device: torch.device
    amp_dtype: torch.dtype | None = None
    accumulation: int = 1
    max_norm: float = math.inf
    print_freq: int = 10
    max_skipped: int = 0
    save_every: int | None = None

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def saves_at(self, step: int) -> bool:
        """Return True if a checkpoint is due after so many steps of an epoch."""
        return self.save_every is not None and step % self.save_every == 0


def train_settings(args: argparse.Namespace, device: torch.device, accumulation: int) -> TrainSettings:
    """Return the settings that the options of a training ask for."""
    return TrainSettings(
        device=device,
        amp_dtype=choose_amp(args.amp, device),
        accumulation=accumulation,
        max_norm=getattr(args, "clip_grad", 0) or math.inf,
        print_freq=args.print_freq,
        max_skipped=args.max_skipped if args.on_nonfinite == "skip" else 0,
        save_every=args.save_every,
    )


def compile_if_asked(model: nn.Module, asked: bool) -> None:
    """Compile a model in place, so that the names of its parameters stay."""
    if asked:
        logger.info("the model is compiled in its first steps, which can take minutes")
        model.compile()


def choose_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type that `--amp` means on a device, None for full precision."""
    if name == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; use --amp bf16 or off on a CPU")
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
