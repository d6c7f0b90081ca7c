"""Count the parameters and operations of the detectors, and measure the memory of their backbones.

python measure.py               # counts, at 800x1280
python measure.py --memory      # peak memory of a backbone in training, at 800x1333
"""

import argparse
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose file names might shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn

from benchmarks.models import PUBLISHED
from core.meters import peak_memory
from dense.networks import build_backbone
from detection.configs.recipes import mask_rcnn_1x_pvt_setting, retinanet_1x_pvt_setting
from detection.network import build_detector
from models.complexity import Macs, count_module_macs

CLASSES, BOXES, MASKS = 80, 1000, 100  # of COCO; regions of one image that the heads see
SETTINGS = {"RetinaNet": retinanet_1x_pvt_setting, "Mask R-CNN": mask_rcnn_1x_pvt_setting}


class AllHeads(nn.Module):
    """A detector without what depends on its findings: a given number of regions goes through the heads."""

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
        heads.box_predictor(heads.box_head(images.new_empty(BOXES, channels, *heads.box_roi_pool.output_size)))
        regions = images.new_empty(MASKS, channels, *heads.mask_roi_pool.output_size)
        heads.mask_predictor(heads.mask_head(regions))


def count(kind: str, name: str) -> tuple[int, Macs]:
    """Return the parameters and the multiply-accumulates of a detector at 800x1280."""
    with torch.device("meta"):
        detector = build_detector(SETTINGS[kind](name), CLASSES, pretrained=False)
        parameters = sum(parameter.numel() for parameter in detector.parameters())
        return parameters, count_module_macs(AllHeads(detector), torch.empty(1, 3, 800, 1280))


def print_counts() -> None:
    """Print a line for each detector."""
    print(f"{'':<12}{'backbone':<16}{'parameters':>12}{'G, layers':>12}{'with attention':>16}")
    for kind in SETTINGS:
        for name in PUBLISHED:
            parameters, macs = count(kind, name)
            print(f"{kind:<12}{name:<16}{parameters:>12,}{macs.layers / 1e9:>12.1f}{macs.total / 1e9:>16.1f}")


def measure_memory(name: str, device: torch.device) -> None:
    """Print what a training step adds to the peak memory: 800x1333, batch 1, fp32."""
    if name.startswith("twins_"):
        set_fused_attn(False)  # attention by matrix products, as in the original
        backbone = timm.create_model(name).to(device).train()
    else:
        backbone = build_backbone(name, "", window_padding="zero").to(device).train()
    image = torch.randn(1, 3, 800, 1333, device=device)
    before = peak_memory(device)
    maps = backbone.forward_intermediates(image, intermediates_only=True)
    sum(x.square().mean() for x in maps).backward()
    print(f"{name:<22}{(peak_memory(device) - before) / 2**20:8.0f} MiB on {device}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="measure peak memory, beside timm's with plain attention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--backbone", help=argparse.SUPPRESS)  # of a process of its own
    args = parser.parse_args()
    if args.backbone:
        measure_memory(args.backbone, torch.device(args.device))
    elif args.memory:  # a process each: the peak memory of a process never falls
        for name in ("alt_gvt_small", "twins_svt_small", "pcpvt_small", "twins_pcpvt_small"):
            command = [sys.executable, __file__, "--backbone", name, "--device", args.device]
            subprocess.run(command, check=True)
    else:
        print_counts()


if __name__ == "__main__":
    main()
