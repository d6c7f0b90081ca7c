"""Command line of all three tasks: the parser, argument types, and common options."""

import argparse
import difflib
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import timm
import torch
from timm.models import get_arch_name
from torch import nn

from core.distributed import cores_per_process
from core.signals import outlive_signals
from utils import UserError

logger = logging.getLogger("twins")


class ArgumentParser(argparse.ArgumentParser):
    """Parser with one-line errors, whose options may be written with hyphens or underscores."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        """Parse arguments, with the parser's spelling of the options."""
        spellings = {option.replace("_", "-"): option for option in self._option_string_actions}
        spelled = []
        for arg in sys.argv[1:] if args is None else args:
            name, equals, value = arg.partition("=")
            known = spellings.get(name.replace("_", "-"), name) if arg.startswith("--") else name
            spelled.append(known + equals + value)
        return super().parse_known_args(spelled, namespace)

    def parse_args(self, args=None, namespace=None, intermixed=False):
        """Parse arguments; if they are intermixed, options may stand between positional arguments."""
        parse = self.parse_known_intermixed_args if intermixed else self.parse_known_args
        parsed, unknown = parse(args, namespace)
        if unknown:
            near = nearest(unknown[0].split("=")[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]}{near}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Formatter that shows the default of each option that has one, and the placeholder of its type."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default is argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "metavar", None) or super()._get_default_metavar_for_optional(action)


LARGEST = 2**63  # larger numbers, among them infinity, are rejected


def number(
    kind: type, low: float, high: float = float("inf"), above: bool = False, metavar: str | None = None
) -> Callable[[str], float]:
    """Return an argument type for an int or float from `low` to `high`, without `low` itself if it must be `above`.

    `metavar` is the placeholder of its options in the help; by default N for an int, and their names for a float.
    """

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        too_low = value is None or not (low < value if above else low <= value)
        if too_low or value > high or value >= LARGEST:
            what = "whole number" if kind is int else "number"
            limits = f"above {low:g}" if above else f"of at least {low:g}"
            if high < 1e9:
                limits += f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what} {limits}")
        return value

    convert.metavar = metavar or ("N" if kind is int else None)
    return convert


POSITIVE_INT, COUNT = number(int, 1), number(int, 0)
POSITIVE, NON_NEGATIVE, SHARE = number(float, 0, above=True), number(float, 0), number(float, 0, 1)
FRACTION, PROBABILITY = number(float, 0, 1, above=True), number(float, 0, 1, metavar="P")
RATE = number(float, 0, 0.99, metavar="RATE")
SWITCH = {"action": argparse.BooleanOptionalAction, "default": False}  # arguments of an option that is off by default


def nearest(name: str, known, cutoff: float = 0.6) -> str:
    """Return `; did you mean ...?` with the known names most similar to an unknown one, or an empty string."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def find_fault(model: str) -> str:
    """Return what is wrong with the name of a model of timm or of this code; an empty string if nothing is."""
    if timm.is_model(get_arch_name(model)):
        return ""
    return f"{model!r} is unknown{nearest(model, timm.list_models(), cutoff=0.4)}"


def add_process_options(parser: ArgumentParser) -> None:
    """Add the options of every script: device, rendezvous, determinism and tracebacks."""
    group = parser.add_argument_group("processes")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu; auto: a GPU if there is one")
    group.add_argument(
        "--dist_url",
        default="env://",
        metavar="URL",
        help="URL of the rendezvous of a distributed run, as in torch.distributed",
    )
    group.add_argument("--local-rank", type=COUNT, help=argparse.SUPPRESS)  # set by torch.distributed.launch, unused
    group.add_argument(
        "--deterministic", action="store_true", help="make GPU runs reproducible, slower; CPU runs already are"
    )
    group.add_argument("--traceback", action="store_true", help="show the traceback of input errors, too")


def add_loader_options(group, num_workers: int = 10) -> None:
    """Add the options of data loading; `loader_options` reads them."""
    group.add_argument(
        "--num_workers",
        default=num_workers,
        type=COUNT,
        help="data-loading workers per process, at most one per CPU core; 0: load in the process itself",
    )
    group.add_argument(
        "--loader-timeout",
        default=600,
        type=COUNT,
        metavar="SECONDS",
        help="timeout of a batch from a data-loading worker in seconds; 0: no timeout",
    )
    group.add_argument(
        "--pin-mem",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use page-locked memory, for faster transfers to the GPU",
    )


def add_compute_options(group, amp: str = "auto", tf32: bool = False) -> None:
    """Add the options of compilation and precision, by default `amp` and `tf32`; `"published"` is an experiment's."""
    published = "published: that of the experiment on a GPU, off on a CPU; " if amp == "published" else ""
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    group.add_argument(
        "--amp",
        nargs="?",
        const="auto",
        default=amp,
        choices=tuple(dict.fromkeys((amp, "auto", "off", "bf16", "fp16"))),
        help=f"mixed precision; {published}auto: bf16 on GPUs that support it, fp16 on other GPUs, off on a CPU",
    )
    add_tf32_option(group, tf32)


def add_tf32_option(group, default: bool) -> None:
    """Add `--tf32`; `core.launch.run_script` reads it."""
    group.add_argument(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        default=default,
        help="on a GPU, round the factors of fp32 products and convolutions to TF32: faster, with a precision of 1e-3",
    )


def add_freeze_option(group) -> None:
    """Add `--freeze`; the value is an argument of `freeze_stages` of the Twins models."""
    group.add_argument(
        "--freeze",
        default=0,
        type=number(int, 0, 4),
        metavar="STAGES",
        help="number of first stages of the backbone, 0 to 4, that keep their initial weights and have no drop path",
    )


def add_training_options(parser: ArgumentParser, kept: str = "without it nothing is saved"):
    """Add the options of `train_settings` and `Run`; return their group. `kept` is the default of --output_dir."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir",
        "--work-dir",
        metavar="FOLDER",
        help=f"folder of args.json, log.txt, metrics.jsonl and checkpoints; {kept}",
    )
    group.add_argument("--resume", metavar="FILE", help="checkpoint to resume from")
    group.add_argument(
        "--auto-resume",
        action="store_true",
        help="resume from the newest checkpoint in the output folder, if there is one; otherwise start a new run from "
        "the initial weights of the other options",
    )
    group.add_argument(
        "--save-every",
        type=POSITIVE_INT,
        metavar="STEPS",
        help="also save a checkpoint every STEPS steps within an epoch",
    )
    group.add_argument(
        "--keep", default=2, type=POSITIVE_INT, help="number of newest checkpoints to keep, besides the best ones"
    )
    group.add_argument(
        "--on-nonfinite",
        default="stop",
        choices=("stop", "skip"),
        help="for a non-finite loss or gradient: stop the run, or skip the step on all processes; skip is slower on a "
        "GPU",
    )
    group.add_argument(
        "--max-skipped",
        default=10,
        type=POSITIVE_INT,
        metavar="N",
        help="consecutive skipped steps after which the run stops, also of fp16's gradient scaler",
    )
    group.add_argument(
        "--seed",
        default=0,
        type=number(int, 0, 2**32 - 1),
        help="seed of initialisation, sample order and augmentation, 0 to 2^32 - 1",
    )
    group.add_argument("--print-freq", default=10, type=POSITIVE_INT, metavar="STEPS", help="steps between log lines")
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write the losses, learning rates and metrics for TensorBoard, into the folder tensorboard of the "
        "output folder",
    )
    return group


def loader_options(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the arguments of a DataLoader for the options of `add_loader_options`."""
    workers = min(args.num_workers, cores_per_process())
    return {
        "num_workers": workers,
        "worker_init_fn": outlive_signals,
        "timeout": args.loader_timeout if workers else 0,
        "pin_memory": args.pin_mem and device.type == "cuda",
        "persistent_workers": workers > 0,
        "generator": torch.Generator(),  # otherwise the loader would draw from the generator of the model
    }


@dataclass(frozen=True)
class TrainSettings:
    """Settings of `engine.train_one_epoch`, constant during a run.

    Each log line synchronises with the GPU. So do steps in fp16 and steps that may be skipped, but no others.
    """

    device: torch.device  # of the model
    amp_dtype: torch.dtype | None = None  # of autocast; None to disable mixed precision
    accumulation: int = 1  # batches per step (gradient accumulation)
    max_norm: float = math.inf  # maximum gradient norm; infinity to disable clipping
    print_freq: int = 10  # steps between log lines
    max_skipped: int = 0  # consecutive non-finite steps that are skipped before training stops; 0 to stop at the first
    max_overflows: int = 10  # consecutive steps that the gradient scaler of fp16 skips before training stops
    save_every: int | None = None  # steps between checkpoints within an epoch; None to save at its end only

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the forward pass."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def saves_at(self, step: int) -> bool:
        """Return True if a checkpoint is due after `step` steps of an epoch."""
        return self.save_every is not None and step % self.save_every == 0


def train_settings(args: argparse.Namespace, device: torch.device, accumulation: int) -> TrainSettings:
    """Return the settings for the options of a training run."""
    return TrainSettings(
        device=device,
        amp_dtype=choose_amp(args.amp, device),
        accumulation=accumulation,
        max_norm=getattr(args, "clip_grad", 0) or math.inf,
        print_freq=args.print_freq,
        max_skipped=args.max_skipped if args.on_nonfinite == "skip" else 0,
        max_overflows=args.max_skipped,
        save_every=args.save_every,
    )


def compile_if_asked(model: nn.Module, asked: bool) -> None:
    """Compile a model in place, which keeps the names of its parameters."""
    if asked:
        logger.info("the model is compiled in the first steps, which can take minutes")
        model.compile()


def choose_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Return the data type of autocast for `--amp` on a device; None to disable mixed precision."""
    if name == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; use --amp bf16 or off on a CPU")
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
