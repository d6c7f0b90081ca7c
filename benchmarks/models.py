"""Measure the speed and memory of models, in inference and in training, beside timm's.

    python -m benchmarks.models                                        # the six published models
    python -m benchmarks.models --compare timm --device cpu            # in turns with timm's, on the same weights
    python -m benchmarks.models alt_gvt_small --compare timm --features --input-size 800 1333 --batch-size 1

Our model and timm's are timed in turns, and the ratio is the median over the turns, so a change of the machine's
speed affects both alike. On a CPU memory is measured in a new process.
"""

import argparse
import logging
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import (
    add_batch_size_option,
    add_measurement_options,
    add_models_argument,
    add_threads_option,
    build_parser,
    check_report,
    choose_models,
    compare,
    describe_machine,
    name_peer,
    run_in_new_process,
    set_threads,
    time_in_turns,
    write_report,
)
from core.distributed import Processes
from core.launch import run_script
from core.meters import peak_memory
from core.options import POSITIVE_INT, ArgumentParser, add_compute_options, add_process_options, choose_amp
from models.complexity import count_macs, count_parameters
from models.cpu import accelerate
from utils import UserError

logger = logging.getLogger("twins")

MODES = {"inference": 1, "training": 3}  # operations of a step, as a multiple of those of the forward pass
TOLERANCES = {None: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}  # relative difference of outputs, by autocast type


# ------------------------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class Setting:
    """How models are measured.

    Attributes:
        device: Device of the models.
        amp_dtype: Type of autocast; None for full precision.
        batch_size: Images per step.
        input_size: Height and width of the images, in pixels.
        features: Measure the backbone of dense tasks: four maps, no classifier.
        compile: Compile the models.
        channels_last: Use the channels-last memory format.
        grad_checkpointing: Recompute activations in the backward pass.
        threads: Number of CPU threads; 0 for torch's default.
    """

    device: torch.device
    amp_dtype: torch.dtype | None = None
    batch_size: int = 8
    input_size: tuple[int, int] = (224, 224)
    features: bool = False
    compile: bool = False
    channels_last: bool = False
    grad_checkpointing: bool = False
    threads: int = 0


class Subject:
    """A model that is measured, with its input and optimizer.

    Args:
        name: Name of a model of ours or of timm.
        setting: How it is measured.
        state: Weights of the model; None for random ones.
    """

    def __init__(self, name: str, setting: Setting, state: dict[str, Tensor] | None = None):
        self.setting = setting
        memory_format = torch.channels_last if setting.channels_last else torch.contiguous_format
        self.model = build_model(name, setting)
        if state is not None:
            self.model.load_state_dict(state)
        self.model.to(setting.device, memory_format=memory_format)
        if setting.compile:
            self.model.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(setting.batch_size, 3, *setting.input_size, generator=generator)
        self.images = images.to(setting.device, memory_format=memory_format)
        self.targets = torch.arange(setting.batch_size, device=setting.device) % 10

    def step(self, mode: str) -> None:
        """Run one step of inference or training."""
        if mode == "inference":
            self.infer()
        else:
            self.train()

    @torch.inference_mode()
    def infer(self) -> Tensor | list[Tensor]:
        """Return the logits, or the maps of the four stages."""
        self.model.eval()
        with self.autocast():
            return self.model(self.images)

    def train(self) -> None:
        """Run a forward pass, a backward pass and an update by AdamW."""
        self.model.train()
        with self.autocast():
            output = self.model(self.images)
            if self.setting.features:
                loss = sum(feature_map.float().square().mean() for feature_map in output)
            else:
                loss = F.cross_entropy(output, self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def autocast(self):
        """Return the context of a forward pass."""
        dtype = self.setting.amp_dtype
        return torch.autocast(self.setting.device.type, dtype) if dtype else nullcontext()


def build_model(name: str, setting: Setting) -> nn.Module:
    """Build a model of ours or of timm: a classifier, or a backbone of dense tasks.

    Raises:
        UserError: If the model does not support gradient checkpointing, which the setting asks for.
    """
    # In timm's models the padding takes part in attention; ours must do the same for outputs to agree.
    padding = {"window_padding": "zero"} if name.startswith("alt_gvt") else {}
    model = timm.create_model(name, features_only=setting.features, **padding)
    if not name.startswith("twins_"):
        accelerate(model)
    if setting.grad_checkpointing:
        try:
            (model.model if setting.features else model).set_grad_checkpointing()
        except AssertionError as error:
            raise UserError(f"--grad-checkpointing: {name} does not support it; leave it out") from error
    return model


def check_outputs(ours: Subject, peer: Subject) -> float:
    """Return the largest difference between the outputs of two models, relative to the largest value.

    Raises:
        RuntimeError: If the difference is too large for the precision; then the times cannot be compared.
    """
    outputs = [subject.infer() for subject in (ours, peer)]
    pairs = zip(*outputs, strict=True) if ours.setting.features else [outputs]
    error = max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)
    if not error <= TOLERANCES[ours.setting.amp_dtype]:
        raise RuntimeError(
            f"the outputs of the two models differ by {error:.1e} of the largest value, so their times cannot be "
            "compared"
        )
    return error


# ------------------------------------------------------------------------------------------------------ measurements


def measure_peak(setting: Setting) -> float:
    """Return the operations per second in a large matrix product; a multiply-accumulate is two operations."""
    side = 8192 if setting.device.type == "cuda" else 2048
    dtype = setting.amp_dtype or torch.float32
    x = torch.randn(side, side, device=setting.device, dtype=dtype)
    layer = accelerate(nn.Linear(side, side, device=setting.device, dtype=dtype))
    with torch.inference_mode():
        times = time_in_turns([lambda: x @ x, lambda: layer(x)], 5, setting.device)
    return 2 * side**3 / min(map(min, times))


def measure_memory(name: str, setting: Setting, mode: str) -> int | None:
    """Return the bytes that a step adds to the peak memory.

    On a CPU a new process measures this; there it is None for a compiled model, since the compiler runs in the same
    process.
    """
    if setting.device.type == "cuda":
        return _measure_added_memory(name, setting, mode)
    if setting.compile:
        return None
    return run_in_new_process(_measure_added_memory, name, setting, mode)


def _measure_added_memory(name: str, setting: Setting, mode: str) -> int:
    set_threads(setting.threads)
    subject = Subject(name, setting)
    if setting.device.type == "cuda":
        subject.step(mode)  # the first step compiles and tries kernels
        torch.cuda.reset_peak_memory_stats(setting.device)
    before = peak_memory(setting.device)
    subject.step(mode)
    return peak_memory(setting.device) - before


def benchmark_model(
    name: str, peer: str | None, setting: Setting, modes: Sequence[str], turns: int, peak: float
) -> Iterator[dict[str, Any]]:
    """Yield a row of results for each mode.

    Args:
        name: Name of the model.
        peer: Name of the model to compare it with; None for no comparison.
        setting: How the models are measured.
        modes: Keys of `MODES`.
        turns: Number of timed turns.
        peak: Operations per second from `measure_peak`.
    """
    options = {"features_only": True} if setting.features else {}
    macs = count_macs(name, setting.input_size, **options)
    subjects = [Subject(name, setting)]
    row = {"model": name, "parameters": count_parameters(name, **options), **macs._asdict()}
    if peer:
        subjects.append(Subject(peer, setting, subjects[0].model.state_dict()))
        row |= {"peer": peer, "output_difference": check_outputs(*subjects)}
    for mode in modes:
        steps = [lambda subject=subject, mode=mode: subject.step(mode) for subject in subjects]
        times = time_in_turns(steps, turns, setting.device, f"{name}, {mode}")
        seconds = statistics.median(times[0])
        results = {
            "mode": mode,
            "images_per_second": setting.batch_size / seconds,
            "memory": measure_memory(name, setting, mode),
            "share_of_peak": 2 * macs.total * MODES[mode] * setting.batch_size / seconds / peak,
        }
        if peer:
            results |= {
                "peer_images_per_second": setting.batch_size / statistics.median(times[1]),
                "peer_memory": measure_memory(peer, setting, mode),
                **compare(*times),
            }
        yield row | results


# ------------------------------------------------------------------------------------------------------------- table


def print_header(peer: bool) -> None:
    """Print the names of the columns."""
    columns = f"{'model':<16}{'parameters':>12}{'G layers':>10}{'G total':>9}  {'mode':<10}{'images/s':>9}"
    columns += f"{'MiB':>8}{'% of peak':>11}"
    if peer:
        columns += f"{'timm':>9}{'MiB':>8}{'ratio':>8}  least to most"
    logger.info("%s", columns)


def print_row(row: dict[str, Any]) -> None:
    """Print a row of results."""
    line = f"{row['model']:<16}{row['parameters']:>12,}{row['layers'] / 1e9:>10.3f}{row['total'] / 1e9:>9.3f}  "
    line += f"{row['mode']:<10}{row['images_per_second']:>9.2f}{_format_memory(row['memory'])}"
    line += f"{100 * row['share_of_peak']:>11.0f}"
    if "peer" in row:
        line += f"{row['peer_images_per_second']:>9.2f}{_format_memory(row['peer_memory'])}{row['ratio']:>8.3f}  "
        line += f"{row['ratio_least']:.3f} to {row['ratio_most']:.3f}"
    logger.info("%s", line)


def _format_memory(memory: int | None) -> str:
    return f"{'-':>8}" if memory is None else f"{memory / 2**20:>8.0f}"


def print_means(rows: Sequence[dict[str, Any]], modes: Sequence[str]) -> None:
    """Print the geometric mean of the ratios in each mode."""
    for mode in modes:
        ratios = [row["ratio"] for row in rows if row["mode"] == mode]
        logger.info("%s: geometric mean %.3f x timm, least %.3f", mode, statistics.geometric_mean(ratios), min(ratios))


# ------------------------------------------------------------------------------------------------------ command line


def get_parser() -> ArgumentParser:
    """Return the parser."""
    parser = build_parser("models", __doc__, "[MODEL ...] [options]")
    add_models_argument(parser, help="models of models/twins.py or of timm")
    group = parser.add_argument_group("models")
    group.add_argument("--compare", choices=("timm",), help="also measure timm's version of each model, in turns")
    group.add_argument("--mode", default="both", choices=(*MODES, "both"), help="what to measure")
    group.add_argument(
        "--input-size",
        nargs="+",
        default=[224],
        type=POSITIVE_INT,
        metavar="PIXELS",
        help="side length of the images, or height and width",
    )
    group.add_argument("--features", action="store_true", help="the backbone of dense tasks: four maps, no classifier")
    add_compute_options(group, amp="off")
    group.add_argument("--channels-last", action="store_true", help="use the channels-last memory format")
    group.add_argument("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass")
    group = add_measurement_options(parser)
    add_batch_size_option(group)
    add_threads_option(group)
    add_process_options(parser)
    parser.set_defaults(loader_timeout=0)
    return parser


def build_setting(args: argparse.Namespace, device: torch.device) -> Setting:
    """Return the setting that the options ask for."""
    if len(args.input_size) > 2:
        raise UserError(f"--input-size {' '.join(map(str, args.input_size))}: give a side length, or height and width")
    return Setting(
        device=device,
        amp_dtype=choose_amp(args.amp, device),
        batch_size=args.batch_size,
        input_size=(args.input_size[0], args.input_size[-1]),
        features=args.features,
        compile=args.compile,
        channels_last=args.channels_last,
        grad_checkpointing=args.grad_checkpointing,
        threads=args.threads,
    )


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Measure the models and print a table."""
    device = processes.device
    setting = build_setting(args, device)
    names = choose_models(args.models, need_peers=bool(args.compare))
    check_report(args.json)
    modes = list(MODES) if args.mode == "both" else [args.mode]
    set_threads(args.threads)
    peak = measure_peak(setting)
    logger.info("%s; a large matrix product: %.0f GFLOP/s", describe_machine(device), peak / 1e9)
    logger.info("batch %d, %dx%d pixels, %s", args.batch_size, *setting.input_size, setting.amp_dtype or "float32")
    print_header(bool(args.compare))
    rows = []
    for name in names:
        peer = name_peer(name) if args.compare else None
        for row in benchmark_model(name, peer, setting, modes, args.turns, peak):
            print_row(row)
            rows.append(row)
    if args.compare:
        print_means(rows, modes)
    write_report(args, device, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; `core.launch.run_script` says how it ends."""
    parser = get_parser()
    run_script(parser.prog, run, parser.parse_args(argv))


if __name__ == "__main__":
    main()
