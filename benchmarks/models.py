"""Measure models, side by side with timm's, the input pipeline, and parts of both.

    python benchmark.py                                        # all six models, on a GPU if there is one
    python benchmark.py --compare timm --device cpu            # in turns with timm's twins_*, on the same weights
    python benchmark.py alt_gvt_small --compare timm --features --input-size 800 1333 --batch-size 1
    python benchmark.py --data path_to_imagenet                # images/s of one data-loading process
    python benchmark.py alt_gvt_small --data --epoch --images 96 --turns 2  # epochs of training, beside timm's
    python benchmark.py --parts                                # what makes them fast on a CPU, each alone

Two models are timed in turns, so that a machine whose speed drifts treats both alike; the ratio is the median of
those of the pairs. Memory is measured in a process of its own on a CPU.
"""

import argparse
import json
import logging
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.data import FastCollateMixup, ImageDataset, create_loader
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.loss import SoftTargetCrossEntropy
from timm.models.twins import LocallyGroupedAttn
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, dispatch_clip_grad
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from core import shapes
from core.distributed import Processes, cores_per_process
from core.images import load_image
from core.launch import run_script
from core.meters import peak_memory
from core.options import (
    COUNT,
    POSITIVE_INT,
    ArgumentParser,
    add_compute_options,
    add_process_options,
    choose_amp,
    nearest,
)
from engine import train_one_epoch
from models import cpu
from models.complexity import count_macs, count_parameters
from models.cpu import Linear
from models.twins import LocallyGroupedAttention
from transforms import STATISTICS, RandomCrop, adapt_policy
from utils import UserError

logger = logging.getLogger("twins")

PUBLISHED = ("pcpvt_small", "pcpvt_base", "pcpvt_large", "alt_gvt_small", "alt_gvt_base", "alt_gvt_large")
MODES = {"inference": 1, "training": 3}  # and how many times the forward pass's operations each takes
TURN_SECONDS = 0.3  # least length of a turn; short steps are repeated
TOLERANCES = {None: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}  # relative; outputs of both models, by autocast
MODEL_OPTIONS = ("compare", "mode", "input_size", "features", "amp", "compile", "channels_last", "grad_checkpointing")
PIPELINE_SIDES = (500, 375)  # pixels, width and height, of images drawn for the pipeline: ImageNet's usual ones


# ---------------------------------------------------------------------------------------------------------- counting


# ------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Setting:
    """How models are measured.

    Attributes:
        device: Where.
        amp_dtype: Type of autocast; None for full precision.
        batch_size: Images of a step.
        input_size: Height and width of the images, in pixels.
        features: Measure the backbone of dense tasks: four maps, no classifier.
        compile: Compile the models.
        channels_last: Give images and convolutions in channels-last memory.
        grad_checkpointing: Recompute blocks in the backward pass.
        threads: Of a CPU; 0 for torch's choice.
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
    """A model that is measured, with its input and optimizer."""

    def __init__(self, name: str, setting: Setting, state: dict[str, Tensor] | None = None):
        self.setting = setting
        layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        self.model = build_model(name, setting)
        if state is not None:
            self.model.load_state_dict(state)
        self.model.to(setting.device, memory_format=layout)
        if setting.compile:
            self.model.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(setting.batch_size, 3, *setting.input_size, generator=generator)
        self.images = images.to(setting.device, memory_format=layout)
        self.targets = torch.arange(setting.batch_size, device=setting.device) % 10

    def step(self, mode: str) -> None:
        """Take one step of inference or training."""
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
        """Forward and backward pass and an update of the weights by AdamW."""
        self.model.train()
        with self.autocast():
            output = self.model(self.images)
            if self.setting.features:
                loss = sum(each.float().square().mean() for each in output)
            else:
                loss = F.cross_entropy(output, self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def autocast(self):
        dtype = self.setting.amp_dtype
        return torch.autocast(self.setting.device.type, dtype) if dtype else nullcontext()


def build_model(name: str, setting: Setting) -> nn.Module:
    """Build a model of ours or of timm as it is measured: with its classifier, or as a backbone of dense tasks."""
    # What lies over the border takes part in timm's windows, so in ours, too, where both are to agree.
    padding = {"window_padding": "zero"} if name.startswith("alt_gvt") else {}
    model = timm.create_model(name, features_only=setting.features, **padding)
    if setting.grad_checkpointing:
        try:
            (model.model if setting.features else model).set_grad_checkpointing()
        except AssertionError as error:
            raise UserError(f"--grad-checkpointing: {name} does not support it") from error
    return model


def name_peer(name: str) -> str:
    """Return timm's name of one of the published models."""
    if name not in PUBLISHED:
        raise UserError(f"timm has no twin of {name} to compare it with, only of {', '.join(PUBLISHED)}")
    return name.replace("pcpvt", "twins_pcpvt").replace("alt_gvt", "twins_svt")


def check_outputs(ours: Subject, peer: Subject) -> float:
    """Return how far the outputs of two models are apart, over the largest value.

    Raises:
        RuntimeError: If they are further apart than the precision explains: then there is nothing to compare.
    """
    outputs = [each.infer() for each in (ours, peer)]
    pairs = zip(*outputs, strict=True) if ours.setting.features else [outputs]
    error = max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)
    if not error <= TOLERANCES[ours.setting.amp_dtype]:
        raise RuntimeError(
            f"the outputs of the two models differ by {error:.1e} of the largest; their times say nothing"
        )
    return error


# ------------------------------------------------------------------------------------------------------------- timing


def time_in_turns(steps: Sequence[Callable[[], Any]], turns: int, device: torch.device) -> list[list[float]]:
    """Time functions in turns, after a warm-up that is not counted.

    Returns:
        Seconds of one call in each turn, for each function.
    """
    repeats = []
    for step in steps:
        for _ in range(2):  # the first compiles, picks kernels and fills caches
            seconds = _time(step, 1, device)
        repeats.append(max(1, math.ceil(TURN_SECONDS / seconds)))
        if repeats[-1] > 1:
            _time(step, repeats[-1], device)
    times = [[] for _ in steps]
    for _ in range(turns):
        for step, repeat, of_step in zip(steps, repeats, times, strict=True):
            of_step.append(_time(step, repeat, device) / repeat)
    return times


def _time(step: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Return the seconds that some calls take, on a GPU by its own clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return time.perf_counter() - start


def measure_peak(setting: Setting) -> float:
    """Return the operations per second, two for a multiply-accumulate, of a large matrix product on this machine."""
    side = 8192 if setting.device.type == "cuda" else 2048
    dtype = setting.amp_dtype or torch.float32
    x = torch.randn(side, side, device=setting.device, dtype=dtype)
    layer = Linear(side, side, device=setting.device, dtype=dtype)
    with torch.inference_mode():
        times = time_in_turns([lambda: x @ x, lambda: layer(x)], 5, setting.device)
    return 2 * side**3 / min(map(min, times))


# ------------------------------------------------------------------------------------------------------------- memory


def measure_memory(name: str, setting: Setting, mode: str) -> int | None:
    """Return the bytes that a step adds to the peak memory: on a CPU to that of a process of its own.

    None where the compiler, at work in that process, would count, too.
    """
    if setting.device.type == "cuda":
        return _add_memory(name, setting, mode)
    if setting.compile:
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_add_memory, name, setting, mode).result()


def _add_memory(name: str, setting: Setting, mode: str) -> int:
    set_threads(setting.threads)
    subject = Subject(name, setting)
    if setting.device.type == "cuda":
        subject.step(mode)  # the first compiles and tries kernels
        torch.cuda.reset_peak_memory_stats(setting.device)
    before = peak_memory(setting.device)
    subject.step(mode)
    return peak_memory(setting.device) - before


def set_threads(threads: int) -> None:
    """Use so many threads of the CPU; 0 for torch's choice."""
    if threads:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------------- report


def benchmark_model(name: str, peer: str | None, setting: Setting, modes: Sequence[str], turns: int, peak: float):
    """Yield a row of figures for each mode.

    Args:
        name: The model.
        peer: The model to compare it with, None for none.
        setting: How.
        modes: Keys of `MODES`.
        turns: Times that each is measured.
        peak: From `measure_peak`.
    """
    counts = {"features_only": True} if setting.features else {}
    macs = count_macs(name, setting.input_size, **counts)
    subjects = [Subject(name, setting)]
    row = {"model": name, "parameters": count_parameters(name, **counts), **macs._asdict()}
    if peer:
        subjects.append(Subject(peer, setting, subjects[0].model.state_dict()))
        row |= {"peer": peer, "output_difference": check_outputs(*subjects)}
    for mode in modes:
        steps = [lambda subject=subject, mode=mode: subject.step(mode) for subject in subjects]
        times = time_in_turns(steps, turns, setting.device)
        seconds = statistics.median(times[0])
        figures = {
            "mode": mode,
            "images_per_second": setting.batch_size / seconds,
            "memory": measure_memory(name, setting, mode),
            "share_of_peak": 2 * macs.total * MODES[mode] * setting.batch_size / seconds / peak,
        }
        if peer:
            figures |= {
                "peer_images_per_second": setting.batch_size / statistics.median(times[1]),
                "peer_memory": measure_memory(peer, setting, mode),
                **compare(*times),
            }
        yield row | figures


def compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return how many times as fast ours is: the median, the least and the most of the pairs of times."""
    ratios = [peer / own for own, peer in zip(ours, theirs, strict=True)]
    return {"ratio": statistics.median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios)}


def print_header(peer: bool) -> None:
    """Print the names of the columns."""
    columns = f"{'model':<16}{'parameters':>12}{'G layers':>10}{'G total':>9}  {'mode':<10}{'images/s':>9}"
    columns += f"{'MiB':>8}{'% of peak':>11}" + (f"{'timm':>9}{'MiB':>8}{'ratio':>8}  least to most" if peer else "")
    logger.info("%s", columns)


def print_row(row: dict[str, Any]) -> None:
    """Print a row of figures."""
    line = f"{row['model']:<16}{row['parameters']:>12,}{row['layers'] / 1e9:>10.3f}{row['total'] / 1e9:>9.3f}  "
    line += f"{row['mode']:<10}{row['images_per_second']:>9.2f}{_in_mib(row['memory'])}"
    line += f"{100 * row['share_of_peak']:>11.0f}"
    if "peer" in row:
        line += f"{row['peer_images_per_second']:>9.2f}{_in_mib(row['peer_memory'])}{row['ratio']:>8.3f}  "
        line += f"{row['ratio_least']:.3f} to {row['ratio_most']:.3f}"
    logger.info("%s", line)


def _in_mib(memory: int | None) -> str:
    return f"{'-':>8}" if memory is None else f"{memory / 2**20:>8.0f}"


def run_models(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure the models that the options name, and print a table."""
    setting = Setting(
        device=device,
        amp_dtype=choose_amp(args.amp, device),
        batch_size=args.batch_size,
        input_size=tuple(args.input_size) if len(args.input_size) == 2 else (args.input_size[0],) * 2,
        features=args.features,
        compile=args.compile,
        channels_last=args.channels_last,
        grad_checkpointing=args.grad_checkpointing,
        threads=args.threads,
    )
    peers = [name_peer(name) if args.compare else None for name in args.models]
    modes = list(MODES) if args.mode == "both" else [args.mode]
    set_threads(args.threads)
    peak = measure_peak(setting)
    logger.info("%s; a large matrix product: %.0f GFLOP/s", describe_machine(device), peak / 1e9)
    logger.info("batch %d, %dx%d pixels, %s", args.batch_size, *setting.input_size, setting.amp_dtype or "float32")
    print_header(bool(args.compare))
    rows = []
    for name, peer in zip(args.models, peers, strict=True):
        for row in benchmark_model(name, peer, setting, modes, args.turns, peak):
            print_row(row)
            rows.append(row)
    for mode in modes if args.compare else []:
        ratios = [row["ratio"] for row in rows if row["mode"] == mode]
        logger.info("%s: geometric mean %.3f x timm, least %.3f", mode, statistics.geometric_mean(ratios), min(ratios))
    return rows


def describe_machine(device: torch.device) -> str:
    """Name what computes."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}, timm {timm.__version__}"


# ------------------------------------------------------------------------------------------------------ input pipeline


def import_main() -> ModuleType:
    """Import main.py, late: segmentation/ and detection/ count by this file, and never import main."""
    import main

    return main


def parse_training(root: Path, batch_size: int, workers: int, *more: str) -> argparse.Namespace:
    """Return the options of main.py for a training on `root/train` in the published augmentation; `more` are others."""
    options = ["--data-path", str(root), "--batch-size", str(batch_size), "--num_workers", str(workers)]
    return import_main().get_args_parser().parse_args([*options, "--device", "cpu", *more])


def build_our_loader(args: argparse.Namespace) -> DataLoader:
    """Build main.py's loader of training images."""
    return import_main().build_train_loader(args, Processes(torch.device("cpu")), args.batch_size)


def build_timms_loader(args: argparse.Namespace, collate: Callable | None = None) -> DataLoader:
    """Build timm's loader of training images, from options of main.py."""
    return create_loader(
        ImageDataset(str(Path(args.data_path, "train"))),
        (3, args.input_size, args.input_size),
        args.batch_size,
        is_training=True,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        collate_fn=collate,
        device=torch.device("cpu"),
    )


def build_torchvisions_loader(args: argparse.Namespace) -> DataLoader:
    """Build a loader with torchvision's transforms, from options of main.py."""
    transform = v2.Compose(  # as torchvision's reference scripts put it together
        [
            v2.RandomResizedCrop(args.input_size, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(interpolation=v2.InterpolationMode.BICUBIC),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*STATISTICS),
            v2.RandomErasing(args.reprob),
        ]
    )
    return DataLoader(
        torchvision.datasets.ImageFolder(Path(args.data_path, "train"), transform),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
    )


def make_images(name: str, loader: DataLoader) -> None:
    """Go through a loader; ours gives bytes, which the training normalises."""
    for batch in loader:
        if name == "ours":
            batch[0].normalise()


def run_on_images(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the input pipelines, or epochs of training, on some images of a folder or on drawn ones."""
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            link_images(Path(args.data), Path(folder), args.images)
        else:
            write_images(Path(folder), PIPELINE_SIDES, args.images)
        count = sum(1 for _ in Path(folder).glob("train/*/*"))
        if count < args.batch_size:
            raise UserError(f"--batch-size {args.batch_size}: there are {count} images, fewer than a batch")
        set_threads(args.threads if args.epoch else 1)
        logger.info("%s, %d data-loading processes", describe_machine(torch.device("cpu")), args.workers)
        description = "%d images made 224x224, batch %d; %d turns after two or three that are not counted"
        logger.info(description, count, args.batch_size, args.turns)
        return (run_epochs if args.epoch else run_pipelines)(Path(folder), args)


def run_pipelines(root: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the input pipelines in turns on the same files, and print a table."""
    options = parse_training(root, args.batch_size, args.workers)
    loaders = {
        "ours": build_our_loader(options),
        "timm": build_timms_loader(options),
        "torchvision": build_torchvisions_loader(options),
    }
    passes = [lambda name=name: make_images(name, loaders[name]) for name in loaders]
    times = time_in_turns(passes, args.turns, torch.device("cpu"))
    counts = [len(loader) * args.batch_size for loader in loaders.values()]  # of images in a pass
    return report_loops(loaders, times, counts)


def report_loops(names: Iterable[str], times: Sequence[Sequence[float]], counts: Sequence[int]) -> list[dict[str, Any]]:
    """Print and return a row for each of some loops over images; the first one is ours.

    Args:
        names: Of the loops.
        times: Seconds of each loop in each turn.
        counts: Images of each loop.
    """
    rows = []
    seconds = [[each / count for each in of_one] for of_one, count in zip(times, counts, strict=True)]  # of one image
    for name, of_one in zip(names, seconds, strict=True):
        row = {"loop": name, "images_per_second": 1 / statistics.median(of_one), **compare(seconds[0], of_one)}
        rows.append(row)
        logger.info("%-22s%8.1f images/s   ours %.2f times as fast (%.2f to %.2f)", *row.values())
    return rows


def write_images(root: Path, sides: tuple[int, int], count: int) -> None:
    """Write shapes as JPEG files of a given width and height, in the layout of ImageNet's training set."""
    for i in range(count):
        folder = root / "train" / shapes.CLASSES[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        draw_photo(i, sides).save(folder / f"{i}.jpg", quality=90)


def link_images(source: Path, root: Path, count: int) -> None:
    """Link images of `source/train`, evenly chosen, into `root/train`, in the same classes."""
    try:
        dataset = torchvision.datasets.ImageFolder(source / "train")
    except OSError as error:
        raise UserError(f"--data {source}: {error}") from error
    count = min(count, len(dataset))
    for i in range(count):
        path, label = dataset.samples[i * len(dataset) // count]
        load_image(path)  # an image that is broken is named here, before it has the name of a link
        folder = root / "train" / dataset.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}{Path(path).suffix}").symlink_to(Path(path).resolve())


def draw_photo(i: int, sides: tuple[int, int]) -> Image.Image:
    """Draw one of many images of three shapes, of a given width and height."""
    labels = [(i + k) % len(shapes.CLASSES) for k in range(3)]
    return shapes.draw_scene((9, i), max(sides), labels=labels).image.crop((0, 0, *sides))


# ------------------------------------------------------------------------------------------------------ whole training


class Epoch(NamedTuple):
    """An epoch of training."""

    train: Callable[[], Any]
    images: int


def build_our_epoch(args: argparse.Namespace) -> Epoch:
    """Build an epoch of training as main.py does it, from its options."""
    device, loader = torch.device("cpu"), build_our_loader(args)
    classes = len(loader.dataset.dataset.classes)
    model = import_main().build_trained_model(args, classes, new=True).to(memory_format=torch.channels_last)
    state = import_main().build_state(args, model, args.batch_size, device)
    compute_losses = import_main().build_compute_losses(args, classes, device)

    def train() -> None:
        train_one_epoch(
            model,
            compute_losses,
            loader,
            state.optimizer,
            device,
            epoch=0,
            scaler=state.scaler,
            clip_grad=args.clip_grad,
            print_freq=len(loader),
        )

    return Epoch(train, len(loader) * args.batch_size)


def build_timms_epoch(args: argparse.Namespace) -> Epoch:
    """Build an epoch of training as timm's train.py does it, with timm's model and loader, from options of main.py."""
    classes = len(list(Path(args.data_path, "train").iterdir()))
    model = timm.create_model(name_peer(args.model), num_classes=classes, drop_path_rate=args.drop_path)
    mixup = FastCollateMixup(
        args.mixup, args.cutmix, prob=args.mixup_prob, label_smoothing=args.smoothing, num_classes=classes
    )
    loader, criterion = build_timms_loader(args, mixup), SoftTargetCrossEntropy()
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    losses = AverageMeter()

    def train() -> None:
        model.train()
        for images, targets in loader:
            loss = criterion(model(images), targets)
            losses.update(loss.item(), len(images))
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model.parameters(), args.clip_grad)
            optimizer.step()

    return Epoch(train, len(loader) * args.batch_size)


def run_epochs(root: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure epochs of training by main.py and as timm has it, in turns on the same files, and print a table."""
    rows = []
    for name in args.models:
        options = parse_training(root, args.batch_size, args.workers, "--model", name)
        loops = {f"{name}, ours": build_our_epoch(options), "timm": build_timms_epoch(options)}
        times = time_in_turns([epoch.train for epoch in loops.values()], args.turns, torch.device("cpu"))
        rows += report_loops(loops, times, [epoch.images for epoch in loops.values()])
    return rows


# --------------------------------------------------------------------------------------------------------------- parts


class Part(NamedTuple):
    """Something that is done in another way than by torch, timm or Pillow, on a CPU; both ways have the same result."""

    what: str
    before: Callable[[], Any]
    after: Callable[[], Any]


def build_parts() -> list[Part]:
    """Build the parts of models, at batch 8 and 224x224 pixels, and of the input pipeline."""
    return [_linear_part(), _mlp_part(), _windows_part(), _crop_part(), _moves_part()]


def _linear_part() -> Part:
    x, layer = torch.randn(8 * 14 * 14, 320), Linear(320, 1280)
    arguments = x, layer.weight, layer.bias
    what = "linear layer by oneDNN; PCPVT-S, third stage, 320 to 1280"
    return Part(what, lambda: F.linear(*arguments), lambda: cpu.linear(*arguments))


def _mlp_part() -> Part:
    x, mlp = torch.randn(8 * 56 * 56, 64), cpu.Mlp(64, 512)
    what = "GELU inside the product, and the MLP in parts; PCPVT-S, first stage"
    return Part(what, lambda: mlp.fc2(F.gelu(mlp.fc1(x))), lambda: mlp(x))


def _windows_part() -> Part:
    ours, timms = LocallyGroupedAttention(64, num_heads=2, window_size=7), LocallyGroupedAttn(64, num_heads=2, ws=7)
    timms.qkv, timms.proj = ours.qkv, ours.proj
    x = torch.randn(8, 56 * 56, 64)
    what = "windows in the batch dimension, for fused attention; SVT-S, first stage"
    return Part(what, lambda: timms(x, (56, 56)), lambda: ours(x.view(8, 56, 56, 64)))


def _crop_part() -> Part:
    timms, ours = (kind(224, interpolation="bicubic") for kind in (RandomResizedCropAndInterpolation, RandomCrop))
    photo = draw_photo(0, PIPELINE_SIDES)
    return Part("random crop resized by torch; 500x375 to 224x224", lambda: timms(photo), lambda: ours(photo))


def _moves_part() -> Part:
    timms, ours = (rand_augment_transform("rand-m9-mstd0.5-inc1", {"interpolation": Image.BICUBIC}) for _ in range(2))
    for augmentation in (timms, ours):
        augmentation.ops = [each for each in augmentation.ops if each.name.startswith(("Shear", "Translate"))]
        augmentation.num_layers = 1
        for operation in augmentation.ops:
            operation.prob = 1
    adapt_policy(ours)
    photo = draw_photo(0, (224, 224))
    return Part("shears and shifts by moving rows; 224x224", lambda: timms(photo), lambda: ours(photo))


def run_parts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the parts on one core, both ways in turns, and print a table."""
    torch.set_num_threads(1)
    logger.info("%s", f"{'ms, on one core':<70}{'before':>8}{'after':>8}{'ratio':>7}  least to most")
    rows = []
    for part in build_parts():
        with torch.inference_mode():
            before, after = time_in_turns([part.before, part.after], args.turns, torch.device("cpu"))
        milliseconds = [1000 * statistics.median(times) for times in (before, after)]
        row = {"part": part.what, "before": milliseconds[0], "after": milliseconds[1], **compare(after, before)}
        rows.append(row)
        logger.info("%-70s%8.2f%8.2f%7.2f  %.2f to %.2f", *row.values())
    return rows


# ------------------------------------------------------------------------------------------------------- command line


def get_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="benchmark.py", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=PUBLISHED, help="of models/twins.py or of timm")
    group = parser.add_argument_group("models")
    group.add_argument("--compare", choices=("timm",), help="measure timm's twin of each model, too, in turns")
    group.add_argument("--mode", default="both", choices=(*MODES, "both"), help="what is measured")
    group.add_argument(
        "--input-size",
        nargs="+",
        default=[224],
        type=POSITIVE_INT,
        metavar="PIXELS",
        help="side of the images, or height and width",
    )
    group.add_argument("--features", action="store_true", help="the backbone of dense tasks: four maps, no classifier")
    add_compute_options(group, amp="off")
    group.add_argument("--channels-last", action="store_true", help="images and convolutions in channels-last memory")
    group.add_argument("--grad-checkpointing", action="store_true", help="recompute blocks in the backward pass")
    group = parser.add_argument_group("input pipeline")
    group.add_argument(
        "--data",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="measure the input pipeline alone, on images of train/ there; without a folder on shapes drawn for it",
    )
    group.add_argument("--images", default=512, type=POSITIVE_INT, metavar="N", help="images of a pass")
    group.add_argument(
        "--epoch",
        action="store_true",
        help="train MODEL on those images, on the CPU, in main.py's loop and in one as timm has it",
    )
    group.add_argument("--workers", default=1, type=COUNT, metavar="N", help="data-loading processes")
    group = parser.add_argument_group("parts")
    group.add_argument("--parts", action="store_true", help="measure parts of both alone, on one core of the CPU")
    group = parser.add_argument_group("measurement")
    group.add_argument("--batch-size", default=8, type=POSITIVE_INT, metavar="N", help="images of a step")
    group.add_argument("--threads", default=0, type=COUNT, metavar="N", help="of the CPU; 0: torch's choice")
    group.add_argument("--turns", default=7, type=POSITIVE_INT, metavar="N", help="times that each is measured")
    group.add_argument("--json", metavar="FILE", help="write the figures there, too")
    add_process_options(parser)
    parser.set_defaults(loader_timeout=0)
    return parser


def check_values(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before anything is."""
    if len(args.input_size) > 2:
        raise UserError(f"--input-size {' '.join(map(str, args.input_size))}: give a side, or height and width")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).parent.is_dir()):
        raise UserError(f"--json {args.json}: name a file in a folder that exists")
    if args.data and not Path(args.data, "train").is_dir():
        raise UserError(f"--data {args.data}: has no folder train/ with one folder of images for each class")
    if args.workers > cores_per_process():
        raise UserError(f"--workers {args.workers}: there are {cores_per_process()} cores; give so many at most")
    for name in args.models:
        if not timm.is_model(name):
            raise UserError(f"model {name!r} is unknown{nearest(name, timm.list_models())}")
        if args.epoch:
            name_peer(name)


def check_mode(args: argparse.Namespace) -> None:
    """Refuse options that have no meaning for what is measured."""
    if args.parts and (args.data is not None or args.epoch):
        raise UserError("--parts measures on data of its own; leave --data and --epoch out")
    if args.epoch and args.data is None:
        raise UserError("--epoch trains on the images of --data; pass that, too, alone for drawn images")
    if args.epoch and args.batch_size % 2:
        raise UserError(f"--batch-size {args.batch_size}: mixup needs an even one")
    if args.parts or args.data is not None:
        parser, ignored = get_parser(), MODEL_OPTIONS if args.epoch else (*MODEL_OPTIONS, "models", "threads")
        given = [name for name in ignored if getattr(args, name) != parser.get_default(name)]
        if given:
            mode = "--parts" if args.parts else "--epoch" if args.epoch else "--data"
            raise UserError(f"{mode} has no use for {', '.join(map(spell_option, given))}; leave it out")


def spell_option(name: str) -> str:
    """Return an option as it is written on the command line."""
    return "MODEL" if name == "models" else f"--{name.replace('_', '-')}"


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Measure what the options ask for."""
    check_values(args)
    check_mode(args)
    device = torch.device("cpu")
    if args.parts:
        rows = run_parts(args)
    elif args.data is not None:
        rows = run_on_images(args)
    else:
        device = processes.device
        rows = run_models(args, device)
    if args.json:
        report = {"machine": describe_machine(device), "options": vars(args), "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=1))


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; see `command_line.run_script` for how it ends."""
    parser = get_parser()
    run_script(parser.prog, run, parser.parse_args(argv))


if __name__ == "__main__":
    main()
