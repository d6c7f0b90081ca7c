"""Measure the throughput of the models of the paper's table 1, and compare it with the paper's figures.

    python -m benchmarks.throughput --picture throughput.png
    python -m benchmarks.throughput alt_gvt_small swin_tiny_patch4_window7_224 --device cpu --batch-size 8

As in the paper: inference in fp32 at 224x224, in batches of 192. The paper's figures are from a V100.
timm has the second version of PVT only.
"""

import argparse
import logging
import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks import common
from benchmarks.models import Subject
from core.distributed import Processes
from core.launch import run_script
from core.options import ArgumentParser, add_compute_options, add_process_options
from utils import require_package

logger = logging.getLogger("twins")

# Images/s on a V100 and top-1 in percent, by the paper (arXiv 2104.13840, table 1).
PAPER = {
    "pcpvt_small": (815, 81.2),
    "pcpvt_base": (525, 82.7),
    "pcpvt_large": (367, 83.1),
    "alt_gvt_small": (1059, 81.7),
    "alt_gvt_base": (469, 83.2),
    "alt_gvt_large": (288, 83.7),
    "regnety_040": (1157, 80.0),
    "regnety_080": (592, 81.7),
    "regnety_160": (335, 82.9),
    "deit_small_patch16_224": (437, 79.9),
    "deit_base_patch16_224": (292, 81.8),
    "swin_tiny_patch4_window7_224": (766, 81.3),
    "swin_small_patch4_window7_224": (444, 83.0),
    "swin_base_patch4_window7_224": (275, 83.3),
    "tnt_s_patch16_224": (None, None),
    "coat_lite_small": (None, None),
    "pvt_v2_b1": (None, None),
    "pvt_v2_b2": (None, None),
}


def measure(names: Sequence[str], args: argparse.Namespace, device: torch.device) -> Iterator[common.Row]:
    """Yield a row for each model."""
    for name in names:
        step = partial(Subject(name, args, device).step, "inference")
        (times,) = common.time_in_turns([step], args.turns, device, name)
        on_v100, top1 = PAPER.get(name, (None, None))
        speed = args.batch_size / statistics.median(times)
        yield {"model": name, "images/s": speed, "V100, paper": on_v100, "top-1, paper": top1}


def draw(rows: Sequence[common.Row], machine: str, path: str) -> None:
    """Draw accuracy against throughput, here and on the paper's V100."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, column, title in zip(axes, ("images/s", "V100, paper"), (machine, "V100, by the paper"), strict=True):
        for row in rows:
            if row["top-1, paper"] is None:
                continue
            is_ours = row["model"].startswith(("pcpvt", "alt_gvt"))
            ax.plot(row[column], row["top-1, paper"], "o", color="tab:red" if is_ours else "tab:gray")
            name = row["model"].split("_patch")[0]
            ax.annotate(name, (row[column], row["top-1, paper"]), xytext=(4, 3), textcoords="offset points", fontsize=7)
        ax.set(xlabel="images/s", title=title)
        ax.title.set_fontsize(8)
        ax.margins(x=0.25)  # for the names
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("ImageNet top-1 in %")
    figure.savefig(path, dpi=150)


def get_parser() -> ArgumentParser:
    """Return the parser."""
    parser = common.build_parser("throughput", __doc__, "models of models/twins.py or of timm")
    group = parser.add_argument_group("throughput")
    group.add_argument("--picture", metavar="FILE", help="draw accuracy against throughput; needs matplotlib")
    add_compute_options(group, amp="off")
    add_process_options(parser)
    parser.set_defaults(
        models=list(PAPER), batch_size=192, input_size=[224, 224], features=False, channels_last=False,
        grad_checkpointing=False,
    )  # fmt: skip
    return parser


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Measure the models and print a table."""
    if args.picture:
        require_package("matplotlib", "--picture")
    common.name_models(args.models, peers=False)
    torch.set_num_threads(args.threads)
    machine = common.describe_machine(processes.device)
    logger.info("%s, batch %d, --amp %s", machine, args.batch_size, args.amp)
    rows = common.print_table(measure(args.models, args, processes.device))
    common.write_report(args, processes.device, rows)
    if args.picture:
        draw(rows, machine, args.picture)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; `core.launch.run_script` says how it ends."""
    run_script("throughput.py", run, get_parser().parse_args(argv), one_size=True)


if __name__ == "__main__":
    main()
