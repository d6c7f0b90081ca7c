"""Count the parameters and operations of the dense networks, and measure their time and memory.

    python -m benchmarks.dense segmentation                 # counts of the published UPerNets
    python -m benchmarks.dense segmentation --time \\
        segmentation/configs/upernet_alt_gvt_s_512x512_160k_ade20k_swin_setting.py
    python -m benchmarks.dense detection                    # counts of the detectors at 800x1280
    python -m benchmarks.dense detection --memory           # memory of backbones in training at 800x1333
    python -m benchmarks.dense detection --time detection/configs/retinanet_alt_gvt_s_fpn_1x_coco_pvt_setting.py
"""

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import Row
from core.distributed import Processes, choose_kernels
from core.launch import run_script
from core.meters import peak_memory
from core.options import ArgumentParser, add_process_options, add_tf32_option
from core.recipes import PUBLISHED
from dense.experiments import load_experiment
from dense.networks import build_backbone
from detection.configs.recipes import Experiment as DetectionExperiment
from detection.configs.recipes import mask_rcnn_1x_pvt_setting, retinanet_1x_pvt_setting
from detection.network import build_detector
from engine import to_device
from models.complexity import count_module_macs, count_module_parameters
from models.cpu import accelerate
from segmentation.configs.recipes import Experiment as SegmentationExperiment
from segmentation.network import build_segmentor
from utils import UserError

ADE20K_CLASSES, COCO_CLASSES = 150, 80
UPERNETS = str(Path(__file__).parents[1] / "segmentation/configs/upernet_{}_512x512_160k_ade20k_swin_setting.py")
# Multiply-accumulates in the original's README, in G.
PUBLISHED_G = {"pcpvt_s": 234, "pcpvt_b": 250, "pcpvt_l": 269, "alt_gvt_s": 228, "alt_gvt_b": 261, "alt_gvt_l": 297}
BOX_REGIONS, MASK_REGIONS = 1000, 100  # regions of one image in the box head and in the mask head
SETTINGS = {"RetinaNet": retinanet_1x_pvt_setting, "Mask R-CNN": mask_rcnn_1x_pvt_setting}
MEASURED_BACKBONES = ("alt_gvt_small", "twins_svt_small", "pcpvt_small", "twins_pcpvt_small")


def count_segmentors() -> Iterator[Row]:
    """Yield a row for each published UPerNet."""
    for name, published in PUBLISHED_G.items():
        with torch.device("meta"):
            model = build_segmentor(load_experiment(UPERNETS.format(name)), ADE20K_CLASSES, pretrained=False)
            counts = [count_module_macs(model, torch.empty(1, 3, 512, width)).total / 1e9 for width in (512, 2048)]
        row = {"UPerNet with": name, "parameters": count_module_parameters(model), "G at 512x512": counts[0]}
        yield row | {"published": published, "G at 512x2048": counts[1]}


def build_segmentation(experiment: SegmentationExperiment, mode: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network, images and labels: two crops in training, one image in inference."""
    shape = (2, 512, 512) if mode == "training" else (1, 512, 2048)  # one crop is too few for BatchNorm
    labels = torch.randint(ADE20K_CLASSES, shape)
    return build_segmentor(experiment, ADE20K_CLASSES, pretrained=False), torch.randn(shape[0], 3, *shape[1:]), labels


def build_detection(experiment: DetectionExperiment, mode: str) -> tuple[nn.Module, list[Tensor], list[dict]]:
    """Return a detector, images of 800x1333, two in training and one in inference, and seven objects in each."""
    images = [torch.rand(3, 800, 1333) for _ in range(2 if mode == "training" else 1)]
    corners = torch.rand(7, 2) * torch.tensor([1000.0, 500.0])
    masks = torch.zeros(7, 800, 1333, dtype=torch.uint8)
    for mask, (x, y) in zip(masks, corners.int().tolist(), strict=True):
        mask[y : y + 200, x : x + 300] = 1
    boxes = torch.cat([corners, corners + torch.tensor([300.0, 200.0])], dim=1)
    target = {"boxes": boxes, "labels": torch.arange(7), "masks": masks}
    return build_detector(experiment, COCO_CLASSES, pretrained=False), images, [target] * len(images)


def measure_network(mode: str, experiment: Any, device: torch.device, tf32: bool) -> Row:
    """Return the median time of a step of `"training"` or `"inference"` in fp32, and the peak memory."""
    choose_kernels(tf32, one_size=False)  # this is a process of its own
    build = build_segmentation if isinstance(experiment, SegmentationExperiment) else build_detection
    model, images, targets = build(experiment, mode)
    model = accelerate(model).to(device, memory_format=torch.channels_last)
    images, targets = to_device((images, targets), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5, fused=device.type == "cuda")

    def train() -> None:
        sum(model.train()(images, targets).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def infer() -> None:
        model.eval()(images)

    (times,) = common.time_in_turns([train if mode == "training" else infer], 4, device, mode)
    step = f"{mode}, {len(images)} x {'x'.join(map(str, images[0].shape[1:]))}"
    return {"step": step, "seconds": statistics.median(times), "peak MiB": peak_memory(device) / 2**20}


class AllHeads(nn.Module):
    """A detector whose heads see a fixed number of regions, whatever it detects."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> None:
        detector, maps = self.detector, list(self.detector.backbone(images).values())
        if hasattr(detector, "head"):
            detector.head(maps)
            return
        detector.rpn.head(maps)
        heads, channels = detector.roi_heads, detector.backbone.out_channels
        boxes = images.new_empty(BOX_REGIONS, channels, *heads.box_roi_pool.output_size)
        heads.box_predictor(heads.box_head(boxes))
        masks = images.new_empty(MASK_REGIONS, channels, *heads.mask_roi_pool.output_size)
        heads.mask_predictor(heads.mask_head(masks))


def count_detectors() -> Iterator[Row]:
    """Yield a row for each detector with each published backbone, at 800x1280."""
    for (kind, setting), name in itertools.product(SETTINGS.items(), PUBLISHED):
        with torch.device("meta"):
            detector = build_detector(setting(name), COCO_CLASSES, pretrained=False)
            macs = count_module_macs(AllHeads(detector), torch.empty(1, 3, 800, 1280))
        row = {"detector": f"{kind}, {name}", "parameters": count_module_parameters(detector)}
        yield row | {"G layers": macs.layers / 1e9, "G total": macs.total / 1e9}


def measure_backbone_memory(name: str, device: torch.device, accelerated: bool = True) -> int:
    """Return the bytes that a forward and a backward pass add to the peak memory: 800x1333, batch 1, fp32.

    Models of timm get attention by matrix products as in the original; ours get fast CPU layers if `accelerated`.
    """
    if name.startswith("twins_"):
        set_fused_attn(False)
        backbone = timm.create_model(name)
    else:
        backbone = accelerate(build_backbone(name, "", window_padding="zero"), accelerated)
    backbone = backbone.to(device).train()
    image = torch.randn(1, 3, 800, 1333, device=device)
    before = peak_memory(device)
    maps = backbone.forward_intermediates(image, intermediates_only=True)
    sum(feature_map.square().mean() for feature_map in maps).backward()
    return peak_memory(device) - before


def get_parser() -> ArgumentParser:
    """Return the parser."""
    usage = "python -m benchmarks.dense {segmentation | detection} [--time CONFIG | --memory] [options]"
    parser = ArgumentParser(prog="dense.py", usage=usage, description=__doc__)
    parser.add_argument("task", choices=("segmentation", "detection"), help="networks to count or to measure")
    parser.add_argument("--time", metavar="CONFIG", help="time and memory of a step of this experiment's network")
    parser.add_argument("--memory", action="store_true", help="detection: memory of backbones, and of timm's")
    add_tf32_option(parser, default=True)
    add_process_options(parser)
    parser.set_defaults(loader_timeout=0)  # for `run_script`
    return parser


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Print the counts, or what is measured."""
    measure = common.run_in_new_process
    if args.memory and (args.task == "segmentation" or args.time):
        raise UserError("--memory: measures backbones of detection, and nothing else; leave it or the others out")
    if args.time:
        kind = SegmentationExperiment if args.task == "segmentation" else DetectionExperiment
        experiment = load_experiment(args.time, kind=kind)
        modes = ("training", "inference")
        common.print_table(measure(measure_network, mode, experiment, processes.device, args.tf32) for mode in modes)
    elif args.memory:
        memory = {name: measure(measure_backbone_memory, name, processes.device) for name in MEASURED_BACKBONES}
        common.print_table({"backbone": name, "MiB": used / 2**20} for name, used in memory.items())
    else:
        common.print_table(count_segmentors() if args.task == "segmentation" else count_detectors())


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; `core.launch.run_script` says how it ends."""
    run_script("dense.py", run, get_parser().parse_args(argv))


if __name__ == "__main__":
    main()
