"""The published settings of semantic segmentation as functions, and the fields of an experiment.

Each other file of this folder is one experiment: `config = upernet_swin_setting(backbone="pcpvt_large")`.
"""

from dataclasses import dataclass, replace
from typing import Literal

from dense.experiments import NonNegative, Positive, Rate, Side, check_fields
from models.twins import MIN_INPUT_SIZE
from utils import UserError


@dataclass(frozen=True)
class Experiment:
    """Everything that a result depends on; `--cfg-options field=value` changes a field."""

    # The network.
    backbone: str  # a model of models/twins.py
    head: Literal["upernet", "fpn"] = "upernet"
    channels: Positive[int] = 512  # width of the decode head; an auxiliary head has half of it
    neck_channels: Positive[int] = 256  # width of the feature pyramid of fpn
    window_padding: Literal["released", "mask", "zero"] = "released"  # of Twins-SVT, as in models/layers.py
    drop_path: Rate = 0.2  # stochastic depth rate of the backbone's last block
    pretrained: str = "hub"  # ImageNet weights: a file, "hub" for the published ones on timm's hub, or ""

    # The data, and their augmentation.
    dataset: Literal["ade20k", "folder", "shapes"] = "ade20k"
    data_root: str = "data/ade/ADEChallengeData2016"
    train_images: str = "images/training"  # folder in data_root, as the following
    train_labels: str = "annotations/training"
    val_images: str = "images/validation"
    val_labels: str = "annotations/validation"
    test_images: str = "images/testing"  # without labels, for --format-only
    train_split: str = ""  # file in data_root with the names of the images to use, one per line; "" for all
    val_split: str = ""
    test_split: str = ""
    image_suffix: str = ""  # what follows the name in an image's file name; "" for .jpg, .jpeg or .png
    label_suffix: str = ".png"
    ignored_label: NonNegative[int] = 255  # of pixels to ignore, as 255 is
    scale: tuple[Side, Side] = (2048, 512)  # limits of an image's longer and shorter side in pixels
    scale_range: tuple[Positive[float], Positive[float]] = (0.5, 2.0)  # range of the random factor on scale
    crop_size: Side = 512  # side length in pixels
    batch_size: Positive[int] = 2  # images per process per batch, at most
    global_batch: Positive[int] = 16  # images per step, over all processes and accumulated batches

    # AdamW and its schedule: linear warm-up and poly decay.
    lr: Positive[float] = 6e-5
    weight_decay: NonNegative[float] = 0.01
    not_decayed: tuple[str, ...] = ("norm", "pos_block")  # parts of the names of parameters without weight decay
    iterations: Positive[int] = 160_000
    warmup_iterations: NonNegative[int] = 1500
    warmup_ratio: float = 1e-6  # factor of the learning rate at iteration 0
    power: NonNegative[float] = 1.0
    min_lr: NonNegative[float] = 0.0
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"  # of training and testing on a GPU
    loss_scale: NonNegative[float] = 0.0  # of fp16 in training; 0: adapted

    # The evaluation.
    eval_interval: NonNegative[int] = 0  # iterations between evaluations and checkpoints; 0: set by `evaluations`
    evaluations: Positive[int] = 10  # evaluations of a run; fewer, if iterations cannot be divided into so many parts
    test_ratios: tuple[Positive[float], ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # factors on scale with --aug-test
    window: NonNegative[int] = 0  # side length of a sliding window in pixels; 0: the whole image at once
    stride: NonNegative[int] = 0  # pixels from one window to the next

    def __post_init__(self):
        check_fields(self)
        if not self.label_suffix:
            raise UserError("label_suffix='' is empty; set the end of the names of the label files, such as .png")
        if self.scale_range[0] > self.scale_range[1]:
            raise UserError(f"scale_range={self.scale_range}: the lower factor must come first")
        if not self.test_ratios:
            raise UserError("test_ratios=(): at least one factor is needed")
        if self.iterations % self.interval:
            raise UserError(
                f"iterations={self.iterations} is not a multiple of eval_interval={self.interval}; change one, or set "
                "eval_interval=0 for a suitable one"
            )
        if 0 < self.window < MIN_INPUT_SIZE:
            raise UserError(f"window={self.window} is neither 0 nor at least {MIN_INPUT_SIZE} pixels")
        if self.window and not 0 < self.stride <= self.window:
            raise UserError(f"stride={self.stride} is not between 1 and window={self.window}")

    @property
    def interval(self) -> int:
        """Iterations between evaluations."""
        if self.eval_interval:
            return self.eval_interval
        shortest = -(-self.iterations // self.evaluations)  # rounded up
        return next(length for length in range(shortest, self.iterations + 1) if self.iterations % length == 0)

    def resolve(self) -> "Experiment":
        """Return the experiment with a fixed `eval_interval`, which a resumed run compares."""
        return replace(self, eval_interval=self.interval)


def upernet_swin_setting(backbone: str, **changes) -> Experiment:
    """UPerNet on ADE20K: 160,000 iterations of 16 images on 8 GPUs."""
    return Experiment(backbone=backbone, **changes)


def fpn_pvt_setting(backbone: str, **changes) -> Experiment:
    """Semantic FPN on ADE20K: 80,000 iterations of 32 images on 8 GPUs, no warm-up, decay of all parameters."""
    setting = {
        "head": "fpn",
        "channels": 128,
        "batch_size": 4,
        "global_batch": 32,
        "lr": 1e-4,
        "weight_decay": 1e-4,
        "not_decayed": (),
        "iterations": 80_000,
        "warmup_iterations": 0,
        "power": 0.9,
        "min_lr": 1e-6,
    }
    return Experiment(backbone=backbone, **(setting | changes))


def shapes_setting(backbone: str, **changes) -> Experiment:
    """A small network on the embedded shapes, in minutes on two CPU cores: 1300 iterations of 16 images."""
    setting = {
        "channels": 128,
        "drop_path": 0.0,
        "pretrained": "",
        "dataset": "shapes",
        "data_root": "",
        "scale": (64, 64),
        "scale_range": (1.0, 1.0),
        "crop_size": 64,
        "batch_size": 16,
        "global_batch": 16,
        "lr": 1e-3,
        "iterations": 1300,
        "warmup_iterations": 50,
        "evaluations": 2,
    }
    return Experiment(backbone=backbone, **(setting | changes))
