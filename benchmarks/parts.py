"""Measure single parts of the models and of the input pipeline on one CPU core, beside what they replace.

    python -m benchmarks.parts

Both ways have the same result; they are timed in turns.
"""

import argparse
import copy
import logging
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.layers import Mlp
from timm.models.twins import LocallyGroupedAttn
from torch import nn

from benchmarks.common import (
    add_measurement_options,
    add_script_options,
    build_parser,
    check_report,
    compare,
    time_in_turns,
    write_report,
)
from benchmarks.pipeline import PHOTO_SIZE, draw_photo
from core.distributed import Processes
from core.launch import run_script
from core.options import ArgumentParser
from models.cpu import accelerate
from models.layers import LocallyGroupedAttention
from transforms import RandomCrop, adapt_policy

logger = logging.getLogger("twins")


class Part(NamedTuple):
    """A computation that is done in another way than by torch, timm or Pillow, with the same result.

    Attributes:
        what: Description of the part and its input.
        before: Function that does it the usual way.
        after: Function that does it our way.
    """

    what: str
    before: Callable[[], Any]
    after: Callable[[], Any]


def build_parts() -> list[Part]:
    """Build the parts: of models, at batch 8 and 224x224 pixels, and of the input pipeline."""
    return [_linear_part(), _mlp_part(), _windows_part(), _crop_part(), _shears_part()]


def _linear_part() -> Part:
    x, layer = torch.randn(8 * 14 * 14, 320), nn.Linear(320, 1280)
    fast = accelerate(copy.deepcopy(layer))
    what = "linear layer by oneDNN; PCPVT-S, third stage, 320 to 1280"
    return Part(what, lambda: layer(x), lambda: fast(x))


def _mlp_part() -> Part:
    x, mlp = torch.randn(8 * 56 * 56, 64), Mlp(64, 512)
    fast = accelerate(copy.deepcopy(mlp))
    what = "GELU inside the product, and the MLP in parts; PCPVT-S, first stage"
    return Part(what, lambda: mlp(x), lambda: fast(x))


def _windows_part() -> Part:
    ours, timms = LocallyGroupedAttention(64, num_heads=2, window_size=7), LocallyGroupedAttn(64, num_heads=2, ws=7)
    timms.qkv, timms.proj = ours.qkv, ours.proj
    accelerate(ours)  # the shared layers
    x = torch.randn(8, 56 * 56, 64)
    what = "windows in the batch dimension, for fused attention; SVT-S, first stage"
    return Part(what, lambda: timms(x, (56, 56)), lambda: ours(x.view(8, 56, 56, 64)))


def _crop_part() -> Part:
    timms = RandomResizedCropAndInterpolation(224, interpolation="bicubic")
    ours = RandomCrop(224, interpolation="bicubic")
    photo = draw_photo(0, PHOTO_SIZE)
    return Part("random crop resized by torch; 500x375 to 224x224", lambda: timms(photo), lambda: ours(photo))


def _shears_part() -> Part:
    timms, ours = (rand_augment_transform("rand-m9-mstd0.5-inc1", {"interpolation": Image.BICUBIC}) for _ in range(2))
    for policy in (timms, ours):
        policy.ops = [operation for operation in policy.ops if operation.name.startswith(("Shear", "Translate"))]
        policy.num_layers = 1
        for operation in policy.ops:
            operation.prob = 1
    adapt_policy(ours)
    photo = draw_photo(0, (224, 224))
    return Part("shears and shifts by moving rows; 224x224", lambda: timms(photo), lambda: ours(photo))


def run_parts(turns: int) -> list[dict[str, Any]]:
    """Measure the parts in both ways, print a table, and return its rows."""
    logger.info("%s", f"{'ms, on one core':<70}{'before':>8}{'after':>8}{'ratio':>7}  least to most")
    rows = []
    for part in build_parts():
        with torch.inference_mode():
            before, after = time_in_turns([part.before, part.after], turns, torch.device("cpu"))
        milliseconds = [1000 * statistics.median(times) for times in (before, after)]
        row = {"part": part.what, "before": milliseconds[0], "after": milliseconds[1], **compare(after, before)}
        rows.append(row)
        logger.info("%-70s%8.2f%8.2f%7.2f  %.2f to %.2f", *row.values())
    return rows


def get_parser() -> ArgumentParser:
    """Return the parser."""
    parser = build_parser("parts", __doc__)
    add_measurement_options(parser)
    add_script_options(parser)
    return parser


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Measure the parts and report the results."""
    check_report(args.json)
    torch.set_num_threads(1)
    write_report(args, processes.device, run_parts(args.turns))


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; `core.launch.run_script` says how it ends."""
    parser = get_parser()
    run_script(parser.prog, run, parser.parse_args(argv))


if __name__ == "__main__":
    main()
