"""A segmentation network - backbone, optional neck, heads - its losses and its ways of inference."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense.networks import build_backbone
from segmentation.configs.recipes import Experiment
from segmentation.heads import FPN, FCNHead, FPNHead, UPerHead, resize

IGNORED_LABEL = 255  # of pixels that count neither in the loss nor in the evaluation


class Segmentor(nn.Module):
    """A backbone of `models/`, a decode head and, in training, an auxiliary head.

    Args:
        backbone: From `dense.build_backbone`; its maps of strides 4, 8, 16 and 32 go to the neck or the heads.
        decode_head: Gives the logits.
        neck: Maps the backbone's maps to those of the decode head; the auxiliary head sees the backbone's own.
        auxiliary_head: A second head, for a second loss.
        auxiliary_weight: Weight of that loss.
    """

    # What depends on the classes, for `models.load_state_dict` to leave as it is where they are others.
    pretrained_cfg = {"classifier": ("decode_head.conv_seg", "auxiliary_head.conv_seg")}  # noqa: RUF012

    def __init__(
        self,
        backbone: nn.Module,
        decode_head: nn.Module,
        neck: nn.Module | None = None,
        auxiliary_head: nn.Module | None = None,
        auxiliary_weight: float = 0.4,
    ):
        super().__init__()
        self.backbone = backbone
        self.neck = neck or nn.Identity()
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.auxiliary_weight = auxiliary_weight

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Return logits of the images, or the losses where labels are given.

        Args:
            images: `(B, 3, H, W)`, normalised.
            labels: Class of each pixel, `(B, H, W)`; `IGNORED_LABEL` where it does not count. With them the
                losses go through DistributedDataParallel, which knows `forward` alone.

        Returns:
            Logits `(B, classes, H, W)`, or what `losses` returns.
        """
        if labels is not None:
            return self.losses(images, labels)
        maps = self.backbone.forward_intermediates(images, intermediates_only=True)
        return resize(self.decode_head(self.neck(maps)), images)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted losses of the heads: `decode` and, with an auxiliary head, `aux`."""
        maps = self.backbone.forward_intermediates(images, intermediates_only=True)
        losses = {"decode": pixel_cross_entropy(self.decode_head(self.neck(maps)), labels)}
        if self.auxiliary_head is not None:
            losses["aux"] = self.auxiliary_weight * pixel_cross_entropy(self.auxiliary_head(maps), labels)
        return losses


def build_segmentor(experiment: Experiment, num_classes: int, pretrained: bool) -> Segmentor:
    """Build the network of an experiment; its backbone with ImageNet weights if `pretrained`.

    Raises:
        UserError: If there is no such backbone, or its weights cannot be had or do not fit.
    """
    weights = experiment.pretrained if pretrained else ""
    backbone = build_backbone(experiment.backbone, weights, drop_path_rate=experiment.drop_path)
    dims, channels = backbone.embed_dims, experiment.channels
    if experiment.head == "fpn":
        neck = FPN(dims, experiment.neck_channels)
        return Segmentor(backbone, FPNHead(experiment.neck_channels, num_classes, channels), neck)
    auxiliary_head = FCNHead(dims[2], num_classes, channels // 2)
    return Segmentor(backbone, UPerHead(dims, num_classes, channels), auxiliary_head=auxiliary_head)


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits `(B, classes, h, w)`, enlarged to the labels `(B, H, W)`.

    It is summed over the pixels that count and divided by all of them, those ignored included: so the published
    models were trained.
    """
    logits = F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORED_LABEL, reduction="sum") / labels.numel()


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
    """Return the class of each pixel, from one image in one or more sizes.

    Args:
        model: In evaluation mode.
        images: The image, normalised, in each size, `(1, 3, h_i, w_i)`; the probabilities are averaged.
        size: Height and width of the result, those of the original image.
        flip: See each size mirrored, too.
        window: Side of the square windows that the image is seen through; None for the whole image at once.
        stride: Pixels between windows; their side by default.

    Returns:
        Class indices `(H, W)`.
    """
    probabilities = 0.0
    for image in images:
        for mirrored in (False, True) if flip else (False,):
            seen = image.flip(3) if mirrored else image
            logits = model(seen) if window is None else slide(model, seen, window, stride or window)
            logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
            shares = logits.softmax(dim=1)
            probabilities = probabilities + (shares.flip(3) if mirrored else shares)
    return probabilities.argmax(dim=1)[0]


def slide(model: Segmentor, image: Tensor, window: int, stride: int) -> Tensor:
    """Return logits `(B, classes, H, W)` of an image `(B, 3, H, W)`, averaged over overlapping windows.

    The last window of a row or column is moved back into the image; an image smaller than the window is one.
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
    """Return where windows start that cover a side of the image."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]
