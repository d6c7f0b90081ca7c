"""Measure the speed and memory of models, in inference and in training, beside timm's.

    python -m benchmarks.models                                        # the six published models
    python -m benchmarks.models --compare timm --device cpu            # in turns with timm's, on the same weights
    python -m benchmarks.models alt_gvt_small --compare timm --features --input-size 800 1333 --batch-size 1

Our model and timm's are timed in turns, and the ratio is the median over the turns, so a change of the machine's
speed affects both alike. Memory is what a step adds to the peak memory of a new process.
"""

import argparse
import logging
import statistics
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import Row
from core.distributed import Processes, choose_kernels
from core.launch import run_script
from core.meters import peak_memory
from core.options import POSITIVE_INT, ArgumentParser, add_compute_options, add_process_options, choose_amp
from models.complexity import count_macs, count_module_parameters
from models.cpu import accelerate
from utils import UserError

logger = logging.getLogger("twins")

MODES = {"inference": 1, "training": 3}  # operations of a step, as a multiple of those of the forward pass
TOLERANCES = {None: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}  # relative difference of outputs, by autocast type


class Subject:
    """A model that is measured, with its input and optimizer; `args` are the options of the script."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device):
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.device, self.amp_dtype = device, choose_amp(args.amp, device)
        self.model = build_model(name, args).to(device, memory_format=memory_format)
        if args.compile:
            self.model.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        images = torch.randn(args.batch_size, 3, *args.input_size, generator=torch.Generator().manual_seed(0))
        self.images = images.to(device, memory_format=memory_format)

    def step(self, mode: str) -> list[Tensor]:
        """Run a step of a key of `MODES`; return the maps of the four stages, or a list of the logits."""
        self.model.train(mode == "training")
        autocast = torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)
        with torch.inference_mode(mode == "inference"), autocast:
            output = self.model(self.images)
        outputs = output if isinstance(output, list) else [output]
        if mode == "training":
            sum(output.float().square().mean() for output in outputs).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return outputs


def build_model(name: str, args: argparse.Namespace) -> nn.Module:
    """Build a model of ours or of timm: a classifier, or a backbone of dense tasks."""
    # In timm's models the padding takes part in attention; ours must do the same for outputs to agree.
    padding = {"window_padding": "zero"} if name.startswith("alt_gvt") else {}
    model = timm.create_model(name, features_only=args.features, **padding)
    if not name.startswith("twins_"):
        accelerate(model)
    if args.grad_checkpointing:
        try:
            (model.model if args.features else model).set_grad_checkpointing()
        except AssertionError as error:
            raise UserError(f"--grad-checkpointing: {name} does not support it; leave it out") from error
    return model


def check_outputs(ours: Subject, peer: Subject) -> float:
    """Return the largest difference between the outputs of two models, as a share of the largest value."""
    choose_kernels(tf32=False, one_size=True)  # the outputs of TF32 differ by 1e-3
    outputs = [subject.step("inference") for subject in (ours, peer)]
    pairs = [(a.float(), b.float()) for a, b in zip(*outputs, strict=True)]
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    if not error <= TOLERANCES[ours.amp_dtype]:
        found = f"the outputs of the two models differ by {error:.1e} of the largest value"
        raise RuntimeError(f"{found}, so their times cannot be compared")
    return error


@cache
def measure_peak(amp_dtype: torch.dtype | None, device: torch.device) -> float:
    """Return the operations per second in a large matrix product; a multiply-accumulate is two operations."""
    side = 8192 if device.type == "cuda" else 2048
    x = torch.randn(side, side, device=device, dtype=amp_dtype)
    layer = accelerate(nn.Linear(side, side, device=device, dtype=x.dtype))
    with torch.inference_mode():
        times = common.time_in_turns([lambda: x @ x, lambda: layer(x)], 5, device, "matrix product")
    return 2 * side**3 / min(map(min, times))


def measure_memory(name: str, mode: str, args: argparse.Namespace, device: torch.device) -> float | None:
    """Return the MiB that a step adds to the peak memory of this process; None for a compiled model on a CPU."""
    if args.compile and device.type == "cpu":
        return None  # the compiler takes its memory in the same process
    torch.set_num_threads(args.threads)
    choose_kernels(args.tf32, one_size=True)  # this is a process of its own
    subject = Subject(name, args, device)
    if device.type == "cuda":
        subject.step(mode)  # the first step compiles and tries kernels
        torch.cuda.reset_peak_memory_stats(device)
    before = peak_memory(device)
    subject.step(mode)
    return (peak_memory(device) - before) / 2**20


def write_profile(subject: Subject, mode: str, path: str) -> None:
    """Write a table of the operations of three steps of a model, by the time that each takes."""
    subject.step(mode)
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            subject.step(mode)
    key = f"self_{subject.device.type}_time_total"
    Path(path).write_text(profiler.key_averages().table(sort_by=key, row_limit=60))


def measure_model(names: Sequence[str], args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Yield a row for each mode of a model, beside its peer if there are two names."""
    macs = count_macs(names[0], args.input_size, features_only=args.features)
    subjects = [Subject(name, args, device) for name in names]
    counts = {"parameters": count_module_parameters(subjects[0].model)}
    counts |= {"G layers": macs.layers / 1e9, "G total": macs.total / 1e9}
    if args.compare:
        subjects[1].model.load_state_dict(subjects[0].model.state_dict())
        counts["difference"] = check_outputs(*subjects)
        choose_kernels(args.tf32, one_size=True)
    for mode in MODES if args.mode == "both" else [args.mode]:
        what = f"{names[0]}, {mode}"
        steps = [partial(subject.step, mode) for subject in subjects]
        times = common.time_in_turns(steps, args.turns, device, what)
        speeds = [args.batch_size / statistics.median(model_times) for model_times in times]
        memory = [common.run_in_new_process(measure_memory, name, mode, args, device) for name in names]
        share = 2 * macs.total * MODES[mode] * speeds[0] / measure_peak(subjects[0].amp_dtype, device)
        if args.profile and names[0] == args.models[0]:
            write_profile(subjects[0], mode, args.profile)
        row = {"model": what, **counts, "images/s": speeds[0], "MiB": memory[0], "% of peak": 100 * share}
        if args.compare:
            row |= {"timm": speeds[1], "timm MiB": memory[1], **common.compare(*times)}
        yield row


def get_parser() -> ArgumentParser:
    """Return the parser."""
    parser = common.build_parser("models", __doc__, "models of models/twins.py or of timm")
    group = parser.add_argument_group("models")
    group.add_argument("--compare", choices=("timm",), help="also measure timm's version of each model, in turns")
    group.add_argument("--mode", default="both", choices=(*MODES, "both"), help="what to measure")
    sides = {"metavar": ("HEIGHT", "WIDTH"), "help": "height and width of the images in pixels"}
    group.add_argument("--input-size", nargs=2, default=[224, 224], type=POSITIVE_INT, **sides)
    group.add_argument("--profile", metavar="FILE", help="also write the time of each operation of the first model")
    group.add_argument("--features", action="store_true", help="the backbone of dense tasks: four maps, no classifier")
    add_compute_options(group, amp="off")
    group.add_argument("--channels-last", action="store_true", help="use the channels-last memory format")
    group.add_argument("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass")
    add_process_options(parser)
    return parser


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Measure the models and print a table."""
    device = processes.device
    torch.set_num_threads(args.threads)
    logger.info("%s", common.describe_machine(device))
    logger.info("batch %d, %dx%d pixels, --amp %s", args.batch_size, *args.input_size, args.amp)
    models = common.name_models(args.models, peers=bool(args.compare))
    rows = common.print_table(row for names in models for row in measure_model(names, args, device))
    peak = measure_peak(choose_amp(args.amp, device), device)
    logger.info("peak: a large matrix product with %.0f GFLOP/s", peak / 1e9)
    for mode in MODES:
        ratios = [row["ratio"] for row in rows if "ratio" in row and row["model"].endswith(mode)]
        if ratios:
            logger.info("%s: geometric mean %.3f x timm", mode, statistics.geometric_mean(ratios))
    common.write_report(args, device, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; `core.launch.run_script` says how it ends."""
    run_script("models.py", run, get_parser().parse_args(argv), one_size=True)


if __name__ == "__main__":
    main()
