"""The published settings of detection as functions, and the fields of an experiment.

Each other file of this folder is one experiment: `config = mask_rcnn_1x_pvt_setting(backbone="alt_gvt_small")`.
"""

from dataclasses import dataclass, replace
from typing import Literal

from dense.experiments import NonNegative, Positive, Rate, Side, check_fields

SCHEDULES = {"1x": (12, (8, 11)), "2x": (24, (16, 22)), "3x": (36, (27, 33))}  # epochs, milestones


@dataclass(frozen=True)
class Experiment:
    """Everything that a result depends on; `--cfg-options field=value` changes a field."""

    # The network.
    backbone: str  # a model of models/twins.py
    detector: Literal["retinanet", "mask_rcnn"]
    channels: Positive[int] = 256  # width of the feature pyramid and the heads
    head_std: Positive[float] = 0.01  # standard deviation of the initial weights of RetinaNet's towers
    proposals: Positive[int] = 1000  # regions per image that the heads of Mask R-CNN see
    roi_samples: Positive[int] = 512  # regions per image that the box head is trained on
    drop_path: Rate = 0.2  # stochastic depth rate of the backbone's last block
    pretrained: str = "hub"  # ImageNet weights: a file, "hub" for the published ones on timm's hub, or ""

    # The data, and their augmentation.
    dataset: Literal["coco", "shapes"] = "coco"
    data_root: str = "data/coco"
    train_annotations: str = "annotations/instances_train2017.json"  # in data_root, as the following
    train_images: str = "train2017"
    val_annotations: str = "annotations/instances_val2017.json"
    val_images: str = "val2017"
    test_annotations: str = "annotations/image_info_test-dev2017.json"  # for --format-only
    test_images: str = "test2017"
    scale: tuple[Side, Side] = (1333, 800)  # limits of an image's longer and shorter side in pixels
    many_scales: bool = False  # train with random scales and crops instead of that scale
    batch_size: Positive[int] = 2  # images per process per batch, at most
    global_batch: Positive[int] = 16  # images per step, over all processes and accumulated batches

    # AdamW and its schedule: linear warm-up, and decay to a tenth at each milestone.
    lr: Positive[float] = 1e-4
    weight_decay: NonNegative[float] = 1e-4
    not_decayed: tuple[str, ...] = ()  # parts of the names of parameters without weight decay
    epochs: Positive[int] = 12
    milestones: tuple[Positive[int], ...] = (8, 11)  # epochs
    schedule: Literal["custom", "1x", "2x", "3x"] = "custom"  # any but custom sets epochs and milestones
    warmup_iterations: NonNegative[int] = 500
    warmup_ratio: float = 0.001  # factor of the learning rate at iteration 0
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"  # of training and testing on a GPU
    loss_scale: NonNegative[float] = 0.0  # of fp16 in training; 0: adapted

    # The evaluation.
    score_threshold: Rate = 0.05  # minimum score of an object
    nms_threshold: Positive[float] = 0.5  # IoU above which the lower of two scores of a class is dropped
    detections: Positive[int] = 100  # objects per image, at most
    test_scales: tuple[tuple[Side, Side], ...] = ()  # scales of --aug-test; (): scale alone

    def __post_init__(self):
        check_fields(self)

    def resolve(self) -> "Experiment":
        """Return the experiment with the epochs and milestones of its schedule."""
        if self.schedule == "custom":
            return self
        epochs, milestones = SCHEDULES[self.schedule]
        return replace(self, epochs=epochs, milestones=milestones)


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
    """Mask R-CNN, 36 epochs at many scales, in fp16."""
    # Differs from the original: under PyTorch's autocast the weights, the norms and the sums of residual connections
    # stay in fp32; the original converted the whole network, its norms included, to half precision. Autocast rounds
    # less, and fp32 weights serve every precision.
    half = {"precision": "fp16", "loss_scale": 512.0}
    return Experiment(backbone, "mask_rcnn", **(_MANY_SCALES_3X | half | changes))


def shapes_setting(backbone: str, detector: str, **changes) -> Experiment:
    """A small network on the embedded shapes, in minutes on two CPU cores.

    RetinaNet's towers of four layers need larger initial weights here. With 0.01, which suits 256 channels and long
    training, the network learns the boxes but hardly the classes. 0.06 is sqrt(2 / inputs of a layer), which keeps the
    variance of the activations.
    """
    setting = {
        "channels": 64,
        "head_std": 0.06,
        "proposals": 100,
        "roi_samples": 32,
        "drop_path": 0.0,
        "pretrained": "",
        "dataset": "shapes",
        "data_root": "",
        "scale": (96, 96),
        "batch_size": 8,
        "global_batch": 8,
        "lr": 1e-3,
        "weight_decay": 0.01,
        "epochs": 3,
        "milestones": (2,),
        "warmup_iterations": 100,
    }
    return Experiment(backbone, detector, **(setting | changes))


_MANY_SCALES_3X = {
    "many_scales": True,
    "weight_decay": 0.05,
    "not_decayed": ("norm", "pos_block"),
    "epochs": 36,
    "milestones": (27, 33),
}
