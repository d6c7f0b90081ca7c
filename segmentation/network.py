"""Segmentation networks of a backbone, an optional neck and heads: their losses and inference."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense.networks import build_backbone
from segmentation.configs.recipes import Experiment
from segmentation.data import IGNORED_LABEL
from segmentation.heads import FPN, FCNHead, FPNHead, UPerHead, resize
from segmentation.metrics import PredictImage

AUXILIARY_WEIGHT = 0.4  # of the auxiliary head's loss


class Segmentor(nn.Module):
    """A backbone of `models/`, a neck, a decode head and, for a second loss in training, an auxiliary head.

    The neck stands between the backbone and the decode head; the auxiliary head takes the backbone's maps.
    """

    # The layers that `models.load_state_dict` skips in fine-tuning if the classes differ.
    pretrained_cfg = {"classifier": ("decode_head.conv_seg", "auxiliary_head.conv_seg")}  # noqa: RUF012

    def __init__(self, backbone: nn.Module, neck: nn.Module, decode_head: nn.Module, auxiliary_head: nn.Module | None):
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Return the logits of images, or the losses if labels are given: DistributedDataParallel needs `forward`.

        Logits are `(B, classes, H, W)` for normalised images `(B, 3, H, W)`. Losses are `decode` and, with an auxiliary
        head, the weighted `aux`, for labels `(B, H, W)`.
        """
        maps = self.backbone.forward_intermediates(images, intermediates_only=True)
        logits = self.decode_head(self.neck(maps))
        if labels is None:
            return resize(logits, images)
        losses = {"decode": pixel_cross_entropy(logits, labels)}
        if self.auxiliary_head is not None:
            losses["aux"] = AUXILIARY_WEIGHT * pixel_cross_entropy(self.auxiliary_head(maps), labels)
        return losses


def build_segmentor(experiment: Experiment, num_classes: int, pretrained: bool) -> Segmentor:
    """Build the network of an experiment, with ImageNet weights if `pretrained`; raises as `build_backbone` does."""
    weights = experiment.pretrained if pretrained else ""
    options = {"drop_path_rate": experiment.drop_path, "window_padding": experiment.window_padding}
    backbone = build_backbone(experiment.backbone, weights, **options)
    dims, channels = backbone.embed_dims, experiment.channels
    if experiment.head == "fpn":
        neck = FPN(dims, experiment.neck_channels)
        return Segmentor(backbone, neck, FPNHead(experiment.neck_channels, num_classes, channels), None)
    auxiliary_head = FCNHead(dims[2], num_classes, channels // 2)
    return Segmentor(backbone, nn.Identity(), UPerHead(dims, num_classes, channels), auxiliary_head)


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits `(B, classes, h, w)`, resized to the labels `(B, H, W)`.

    The sum over the labelled pixels is divided by the number of all pixels, ignored ones included, as in the training
    of the published models. The pixels are flattened: the loss of a map has no deterministic form on a GPU.
    """
    logits = F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)
    pixels, labels = logits.movedim(1, -1).flatten(0, 2), labels.long().flatten()
    losses = F.cross_entropy(pixels, labels, ignore_index=IGNORED_LABEL, reduction="none")
    return losses.sum() / len(labels)  # a GPU computes `reduction="sum"` in a single block


def build_predictor(
    model: Segmentor, experiment: Experiment, amp_dtype: torch.dtype | None, flip: bool = False
) -> PredictImage:
    """Return a function for `segmentation.metrics.evaluate` that predicts the classes of an image with a network.

    The network is set to evaluation mode. Windows slide as the experiment says; `predict` describes `flip`.
    """
    model.eval()
    device = next(model.parameters()).device
    sliding = {"window": experiment.window, "stride": experiment.stride} if experiment.window else {}

    def predict_image(index: int, images: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        images = [image[None].to(device, non_blocking=True) for image in images]
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            return predict(model, images, size, flip=flip, **sliding)

    return predict_image


@torch.inference_mode()
def predict(
    model: Segmentor,
    images: Sequence[Tensor],
    size: tuple[int, int],
    *,
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """Return the class indices `(H, W)` of the pixels of an image, given in one or more sizes.

    Args:
        model: Network in evaluation mode.
        images: The normalised image in each size, `(1, 3, h_i, w_i)`; the probabilities are averaged.
        size: Height and width of the result, which are those of the original image.
        flip: True to average over each size and its mirror image.
        window: Side length of a square sliding window in pixels; None for the whole image at once.
        stride: Pixels from one window to the next; `window` by default.
    """
    probabilities = 0.0
    for image in images:
        for is_flipped in (False, True) if flip else (False,):
            view = image.flip(3) if is_flipped else image
            logits = model(view) if window is None else slide(model, view, window, stride or window)
            logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
            shares = logits.softmax(dim=1)
            probabilities = probabilities + (shares.flip(3) if is_flipped else shares)
    return probabilities.argmax(dim=1)[0]


def slide(model: Segmentor, image: Tensor, window: int, stride: int) -> Tensor:
    """Return the logits `(B, classes, H, W)` of an image `(B, 3, H, W)`, averaged over overlapping windows.

    The last window of a row or column is shifted back into the image; windows are cut to a smaller image.
    """
    height, width = image.shape[2:]
    sums, counts = 0.0, image.new_zeros(1, 1, height, width)
    for top in _window_starts(height, window, stride):
        for left in _window_starts(width, window, stride):
            bottom, right = min(top + window, height), min(left + window, width)
            logits = model(image[:, :, top:bottom, left:right]).float()
            sums = sums + F.pad(logits, (left, width - right, top, height - bottom))
            counts[:, :, top:bottom, left:right] += 1
    return sums / counts


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return the starts of the windows that cover a side of the image."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]
