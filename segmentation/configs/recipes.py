"""The published settings of semantic segmentation, each a function, and what an experiment is made of.

A file of this folder is one experiment: `config = upernet_swin_setting(backbone="pcpvt_large")`.
"""

from dataclasses import dataclass

from dense.experiments import check_fields
from utils import UserError


@dataclass(frozen=True)
class Experiment:
    """All that a result depends on; each field can be changed by `--cfg-options field=value`."""

    # The network.
    backbone: str  # of models/twins.py
    head: str = "upernet"  # or fpn
    channels: int = 512  # width of the decode head; an auxiliary head has half of it
    neck_channels: int = 256  # width of the feature pyramid of fpn
    drop_path: float = 0.2  # stochastic depth of the backbone's last block
    pretrained: str = "hub"  # ImageNet weights: a file, hub for the published ones on timm's hub, or nothing

    # The data, and how they are augmented.
    dataset: str = "ade20k"  # or folder, shapes
    data_root: str = "data/ade/ADEChallengeData2016"
    scale: tuple[int, int] = (2048, 512)  # pixels that the longer and the shorter side of an image fit into
    scale_range: tuple[float, float] = (0.5, 2.0)  # of the random factor on it
    crop_size: int = 512  # pixels a side
    batch_size: int = 2  # images of one process and batch, at most
    global_batch: int = 16  # images of one step, of all processes and accumulated batches

    # AdamW and its schedule: linear warm-up, then a power of the share of iterations that is left.
    lr: float = 6e-5
    weight_decay: float = 0.01
    not_decayed: tuple[str, ...] = ("norm", "pos_block")  # parts of the names of parameters without decay
    iterations: int = 160_000
    warmup_iterations: int = 1500
    warmup_ratio: float = 1e-6
    power: float = 1.0
    min_lr: float = 0.0

    # The evaluation.
    eval_interval: int = 16_000  # iterations; a checkpoint is written then, too
    test_ratios: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of scale, with --aug-test
    window: int = 0  # pixels a side of a sliding window; 0: the whole image at once
    stride: int = 0  # pixels between windows

    def __post_init__(self):
        check_fields(
            self,
            choices={"head": ("upernet", "fpn"), "dataset": ("ade20k", "folder", "shapes")},
            above_zero=("channels", "neck_channels", "batch_size", "global_batch", "iterations", "eval_interval", "lr"),
            not_below_zero=("weight_decay", "warmup_iterations", "power", "min_lr"),
        )
        if self.crop_size < 32:
            raise UserError(f"crop_size={self.crop_size}: sides of 32 pixels are the least")
        if not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise UserError(f"scale_range={self.scale_range}: the lower factor comes first, and both are above 0")
        if not self.test_ratios or min(self.test_ratios) <= 0:
            raise UserError(f"test_ratios={self.test_ratios}: one factor above 0 or more are needed")
        if 0 < self.window < 32:
            raise UserError(f"window={self.window}: sides of 32 pixels are the least")
        if self.iterations % self.eval_interval:
            raise UserError(
                f"iterations={self.iterations} is no multiple of eval_interval={self.eval_interval}; change either"
            )
        if self.window and not 0 < self.stride <= self.window:
            raise UserError(f"stride={self.stride} is not between 1 and window={self.window}")


def upernet_swin_setting(backbone: str, **changes) -> Experiment:
    """UPerNet on ADE20K: 160,000 iterations of 16 images on 8 GPUs."""
    return Experiment(backbone=backbone, **changes)


def fpn_pvt_setting(backbone: str, **changes) -> Experiment:
    """Semantic FPN on ADE20K: 80,000 iterations of 32 images on 8 GPUs, no warm-up, decay of all parameters."""
    setting = {
        **{"head": "fpn", "channels": 128, "batch_size": 4, "global_batch": 32},
        **{"lr": 1e-4, "weight_decay": 1e-4, "not_decayed": (), "iterations": 80_000, "eval_interval": 8000},
        **{"warmup_iterations": 0, "power": 0.9, "min_lr": 1e-6},
    }
    return Experiment(backbone=backbone, **(setting | changes))


def shapes_setting(backbone: str, **changes) -> Experiment:
    """A small network on the embedded shapes, in minutes on two CPU cores: 1300 iterations of 16 images."""
    setting = {
        **{"channels": 128, "drop_path": 0.0, "pretrained": "", "dataset": "shapes", "data_root": ""},
        **{"scale": (64, 64), "scale_range": (1.0, 1.0), "crop_size": 64, "batch_size": 16, "global_batch": 16},
        **{"lr": 1e-3, "iterations": 1300, "warmup_iterations": 50, "eval_interval": 650},
    }
    return Experiment(backbone=backbone, **(setting | changes))
