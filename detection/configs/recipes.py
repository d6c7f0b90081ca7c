"""The published settings of detection, each a function, and what an experiment is made of.

A file of this folder is one experiment: `config = mask_rcnn_1x_pvt_setting(backbone="alt_gvt_small")`.
"""

from dataclasses import dataclass

from dense.experiments import check_fields
from utils import UserError


@dataclass(frozen=True)
class Experiment:
    """All that a result depends on; each field can be changed by `--cfg-options field=value`."""

    # The network.
    backbone: str  # of models/twins.py
    detector: str  # retinanet or mask_rcnn
    channels: int = 256  # width of the feature pyramid and the heads
    head_std: float = 0.01  # standard deviation of the initial weights of RetinaNet's towers
    proposals: int = 1000  # regions of an image that the heads of Mask R-CNN see
    roi_samples: int = 512  # of them in training, for the box head
    drop_path: float = 0.2  # stochastic depth of the backbone's last block
    pretrained: str = "hub"  # ImageNet weights: a file, hub for the published ones on timm's hub, or nothing

    # The data, and how they are augmented.
    dataset: str = "coco"  # or shapes
    data_root: str = "data/coco"
    scale: tuple[int, int] = (1333, 800)  # pixels that the longer and the shorter side of an image fit into
    many_scales: bool = False  # random scales and crops in training, instead of that scale
    batch_size: int = 2  # images of one process and batch, at most
    global_batch: int = 16  # images of one step, of all processes and accumulated batches

    # AdamW and its schedule: linear warm-up, then a tenth of the rate after each milestone.
    lr: float = 1e-4
    weight_decay: float = 1e-4
    not_decayed: tuple[str, ...] = ()  # parts of the names of parameters without decay
    epochs: int = 12
    milestones: tuple[int, ...] = (8, 11)  # epochs
    warmup_iterations: int = 500
    warmup_ratio: float = 0.001

    def __post_init__(self):
        check_fields(
            self,
            choices={"detector": ("retinanet", "mask_rcnn"), "dataset": ("coco", "shapes")},
            above_zero=(
                *("channels", "head_std", "proposals", "roi_samples"),
                *("batch_size", "global_batch", "epochs", "lr"),
            ),
            not_below_zero=("weight_decay", "warmup_iterations"),
        )
        if min(self.milestones, default=1) <= 0:
            raise UserError(f"milestones={self.milestones}: epochs above 0 are needed")


def retinanet_1x_pvt_setting(backbone: str, **changes) -> Experiment:
    """RetinaNet, 12 epochs at one scale, decay of all parameters."""
    return Experiment(backbone, "retinanet", **changes)


def mask_rcnn_1x_pvt_setting(backbone: str, **changes) -> Experiment:
    """Mask R-CNN, 12 epochs at one scale, decay of all parameters."""
    return Experiment(backbone, "mask_rcnn", **({"lr": 2e-4} | changes))


def retinanet_3x_ms_setting(backbone: str, **changes) -> Experiment:
    """RetinaNet, 36 epochs at many scales."""
    return Experiment(backbone, "retinanet", **(_MANY_SCALES_3X | changes))


def mask_rcnn_3x_swin_setting(backbone: str, **changes) -> Experiment:
    """Mask R-CNN, 36 epochs at many scales; the published runs used fp16 (--amp fp16).

    Differs from the original: the scale of the loss in fp16 adapts itself, from 65,536; there it was always 512.
    """
    return Experiment(backbone, "mask_rcnn", **(_MANY_SCALES_3X | changes))


def shapes_setting(backbone: str, detector: str, **changes) -> Experiment:
    """A small network on the embedded shapes, in minutes on two CPU cores.

    RetinaNet's towers of four layers need greater initial weights: from 0.01, made for 256 channels and long trainings,
    it learns the boxes but hardly the classes. 0.06 is sqrt(2 / inputs of a layer), which lets the signal through.
    """
    setting = {
        **{"channels": 64, "head_std": 0.06, "proposals": 100, "roi_samples": 32, "drop_path": 0.0, "pretrained": ""},
        **{"dataset": "shapes", "data_root": "", "scale": (96, 96), "batch_size": 8, "global_batch": 8},
        **{"lr": 1e-3, "weight_decay": 0.01, "epochs": 3, "milestones": (2,), "warmup_iterations": 100},
    }
    return Experiment(backbone, detector, **(setting | changes))


_MANY_SCALES_3X = {
    **{"many_scales": True, "weight_decay": 0.05, "not_decayed": ("norm", "pos_block")},
    **{"epochs": 36, "milestones": (27, 33)},
}
