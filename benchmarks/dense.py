"""Count the parameters and operations of the dense networks, and measure their time and memory.

    python -m benchmarks.dense segmentation                 # counts of the published UPerNets
    python -m benchmarks.dense segmentation --time \\
        segmentation/configs/upernet_alt_gvt_s_512x512_160k_ade20k_swin_setting.py
    python -m benchmarks.dense detection                    # counts of the detectors at 800x1280
    python -m benchmarks.dense detection --memory           # memory of backbones in training at 800x1333
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn

from benchmarks.common import add_script_options, build_parser, print_progress, run_in_new_process
from core.distributed import Processes
from core.launch import run_script
from core.meters import peak_memory
from core.options import ArgumentParser
from core.recipes import PUBLISHED
from dense.experiments import load_experiment
from dense.networks import build_backbone
from detection.configs.recipes import mask_rcnn_1x_pvt_setting, retinanet_1x_pvt_setting
from detection.network import build_detector
from models.complexity import Macs, count_module_macs, count_module_parameters
from models.cpu import accelerate
from segmentation.configs.recipes import Experiment
from segmentation.network import Segmentor, build_segmentor

logger = logging.getLogger("twins")


# ------------------------------------------------------------------------------------------------------ segmentation

ADE20K_CLASSES = 150
CONFIGS = Path(__file__).resolve().parents[1] / "segmentation" / "configs"
CONFIG = "upernet_{}_512x512_160k_ade20k_swin_setting.py"
# Multiply-accumulates in the original's README, in G.
PUBLISHED_G = {"pcpvt_s": 234, "pcpvt_b": 250, "pcpvt_l": 269, "alt_gvt_s": 228, "alt_gvt_b": 261, "alt_gvt_l": 297}
STEPS = 5  # steps to measure; the first is a warm-up and does not count


def run_segmentation(args: argparse.Namespace, processes: Processes) -> None:
    """Print the counts of the UPerNets, or the time and memory of one network."""
    if not args.time:
        print_segmentor_counts()
        return
    experiment = load_experiment(args.time, kind=Experiment)
    for mode in ("train", "test"):
        logger.info("%s", run_in_new_process(measure_segmentor, mode, experiment, processes.device))


def print_segmentor_counts() -> None:
    """Print a line for each published UPerNet."""
    header = f"{'UPerNet with':<14}{'parameters':>12}{'G at 512x512':>14}{'published':>11}{'G at 512x2048':>15}"
    logger.info("%s", header)
    for name, published in PUBLISHED_G.items():
        with torch.device("meta"):
            model = build_untrained_segmentor(load_experiment(CONFIGS / CONFIG.format(name)))
            counts = [count_module_macs(model, torch.empty(1, 3, 512, width)).total / 1e9 for width in (512, 2048)]
        parameters = count_module_parameters(model)
        logger.info("%s", f"{name:<14}{parameters:>12,}{counts[0]:>14.1f}{published:>11}{counts[1]:>15.1f}")


def build_untrained_segmentor(experiment: Experiment) -> Segmentor:
    """Build the network of an experiment for ADE20K, with random weights."""
    return build_segmentor(experiment, ADE20K_CLASSES, pretrained=False)


def measure_segmentor(mode: str, experiment: Experiment, device: torch.device) -> str:
    """Return the median time and the peak memory of a step in words; the precision is fp32.

    Args:
        mode: `"train"` or `"test"`.
        experiment: Experiment whose network is measured.
        device: Device of the network.
    """
    model = accelerate(build_untrained_segmentor(experiment)).to(device, memory_format=torch.channels_last)
    if mode == "train":
        what, step = "training step, 2 images of 512x512", build_training_step(model, device)
    else:
        what, step = "inference, 1 image of 512x2048", build_inference(model, device)
    times = []
    for number in range(1, STEPS + 1):
        print_progress(f"{what}: {number} of {STEPS}")
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds, memory = statistics.median(times[1:]), peak_memory(device) / 2**20
    return f"{what:<36}{seconds:8.2f} s{memory:8.0f} MiB peak   ({device})"


def build_training_step(model: Segmentor, device: torch.device) -> Callable[[], None]:
    """Return a function that takes a training step with AdamW on two crops; one is too few for BatchNorm."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=6e-5)
    images = torch.randn(2, 3, 512, 512, device=device)
    labels = torch.randint(ADE20K_CLASSES, (2, 512, 512), device=device)

    def train() -> None:
        sum(model(images, labels).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train


def build_inference(model: Segmentor, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that computes the logits of one image."""
    image = torch.randn(1, 3, 512, 2048, device=device)

    @torch.inference_mode()
    def infer() -> Tensor:
        return model.eval()(image)

    return infer


# --------------------------------------------------------------------------------------------------------- detection

COCO_CLASSES = 80
BOX_REGIONS, MASK_REGIONS = 1000, 100  # regions of one image in the box head and in the mask head
SETTINGS = {"RetinaNet": retinanet_1x_pvt_setting, "Mask R-CNN": mask_rcnn_1x_pvt_setting}
MEASURED_BACKBONES = ("alt_gvt_small", "twins_svt_small", "pcpvt_small", "twins_pcpvt_small")


def run_detection(args: argparse.Namespace, processes: Processes) -> None:
    """Print the counts of the detectors, or the memory of their backbones in training."""
    if not args.memory:
        print_detector_counts()
        return
    for name in MEASURED_BACKBONES:
        memory = run_in_new_process(measure_backbone_memory, name, processes.device)
        logger.info("%s", f"{name:<22}{memory / 2**20:8.0f} MiB on {processes.device}")


class AllHeads(nn.Module):
    """A detector whose heads see a fixed number of regions, whatever it detects."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> None:
        detector, maps = self.detector, self.detector.backbone(images)
        if hasattr(detector, "head"):
            detector.head(list(maps.values()))
            return
        detector.rpn.head(list(maps.values()))
        heads, channels = detector.roi_heads, detector.backbone.out_channels
        boxes = images.new_empty(BOX_REGIONS, channels, *heads.box_roi_pool.output_size)
        heads.box_predictor(heads.box_head(boxes))
        masks = images.new_empty(MASK_REGIONS, channels, *heads.mask_roi_pool.output_size)
        heads.mask_predictor(heads.mask_head(masks))


def count_detector(kind: str, name: str) -> tuple[int, Macs]:
    """Return the parameters and the multiply-accumulates of a detector at 800x1280.

    Args:
        kind: A key of `SETTINGS`.
        name: Name of the backbone.
    """
    with torch.device("meta"):
        detector = build_detector(SETTINGS[kind](name), COCO_CLASSES, pretrained=False)
        macs = count_module_macs(AllHeads(detector), torch.empty(1, 3, 800, 1280))
    return count_module_parameters(detector), macs


def print_detector_counts() -> None:
    """Print a line for each detector."""
    logger.info("%s", f"{'':<12}{'backbone':<16}{'parameters':>12}{'G, layers':>12}{'with attention':>16}")
    for kind in SETTINGS:
        for name in PUBLISHED:
            parameters, macs = count_detector(kind, name)
            layers, total = macs.layers / 1e9, macs.total / 1e9
            logger.info("%s", f"{kind:<12}{name:<16}{parameters:>12,}{layers:>12.1f}{total:>16.1f}")


def measure_backbone_memory(name: str, device: torch.device, accelerated: bool = True) -> int:
    """Return the bytes that a forward and a backward pass add to the peak memory: 800x1333, batch 1, fp32.

    Args:
        name: Name of a model of ours or, with attention by matrix products as in the original, of timm.
        device: Device of the model.
        accelerated: True to switch the fast CPU layers of our models on.
    """
    if name.startswith("twins_"):
        set_fused_attn(False)
        backbone = timm.create_model(name).to(device).train()
    else:
        backbone = build_backbone(name, "", window_padding="zero").to(device).train()
        accelerate(backbone, accelerated)
    image = torch.randn(1, 3, 800, 1333, device=device)
    before = peak_memory(device)
    maps = backbone.forward_intermediates(image, intermediates_only=True)
    sum(feature_map.square().mean() for feature_map in maps).backward()
    return peak_memory(device) - before


# ------------------------------------------------------------------------------------------------------ command line


def get_parser() -> ArgumentParser:
    """Return the parser, which has one of its own for each task."""
    parser = build_parser("dense", __doc__, "{segmentation,detection} [options]")
    tasks = parser.add_subparsers(title="tasks", metavar="{segmentation,detection}", required=True)
    purpose = "Count the parameters and operations of the UPerNets, or measure one network."
    segmentation = _add_task(tasks, "segmentation", purpose, run_segmentation)
    segmentation.add_argument(
        "--time", metavar="CONFIG", help="measure the time and memory of the network of this experiment"
    )
    add_script_options(segmentation, cpu_only=False)
    purpose = "Count the parameters and operations of the detectors, or measure the memory of backbones in training."
    detection = _add_task(tasks, "detection", purpose, run_detection)
    detection.add_argument(
        "--memory", action="store_true", help="measure the memory of backbones, and of timm's with plain attention"
    )
    add_script_options(detection, cpu_only=False)
    return parser


def _add_task(tasks, name: str, purpose: str, run: Callable[[argparse.Namespace, Processes], None]) -> ArgumentParser:
    usage = f"python -m benchmarks.dense {name} [options]"
    parser = tasks.add_parser(name, prog="dense.py", usage=usage, help=purpose, description=purpose)
    parser.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; `core.launch.run_script` says how it ends."""
    parser = get_parser()
    args = parser.parse_args(argv)
    run_script(parser.prog, args.run, args)


if __name__ == "__main__":
    main()
