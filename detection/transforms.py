"""Transforms of detection: the published augmentations of images, boxes and masks."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from core.images import fitted_size, resize_image
from detection.data import Sample, Target


def one_scale(image: Tensor, target: Target, scale: tuple[int, int]) -> Sample:
    """Resize to a scale and flip horizontally with probability 0.5, as the 1x settings do."""
    return random_flip(*resize(image, target, fitted_size(image.shape[1:], scale)))


def many_scales(image: Tensor, target: Target) -> Sample:
    """Flip, crop with probability 0.5, and resize to one of many scales, as the 3x settings do."""
    image, target = random_flip(image, target)
    if np.random.rand() < 0.5:
        shorter = int(np.random.choice((400, 500, 600)))
        image, target = resize(image, target, fitted_size(image.shape[1:], (1333, shorter)))
        image, target = random_crop(image, target, 384, 600)
    shorter = int(np.random.choice(range(480, 801, 32)))
    return resize(image, target, fitted_size(image.shape[1:], (1333, shorter)))


def resize(image: Tensor, target: Target, size: tuple[int, int]) -> Sample:
    """Resize an image and its target to a height and width in pixels, and clip the boxes to the image."""
    (height, width), (h, w) = size, image.shape[1:]
    boxes = clip_boxes_to_image(target["boxes"] * target["boxes"].new_tensor([width / w, height / h] * 2), size)
    masks = F.interpolate(target["masks"][:, None], size=size, mode="nearest")[:, 0]  # there may be none
    return resize_image(image, size), {**target, "boxes": boxes, "masks": masks}


def random_flip(image: Tensor, target: Target) -> Sample:
    """Flip an image and its target horizontally with probability 0.5."""
    if np.random.rand() < 0.5:
        return image, target
    boxes = flip_boxes(target["boxes"], image.shape[2])
    return image.flip(2), {**target, "boxes": boxes, "masks": target["masks"].flip(2)}


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Flip boxes `(..., 4)` horizontally within an image of a width in pixels."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def random_crop(image: Tensor, target: Target, smallest: int, largest: int) -> Sample:
    """Crop a random part, with sides of `smallest` to `largest` pixels or the image's; drop objects outside it."""
    limits = [(min(side, smallest), min(side, largest)) for side in image.shape[1:]]
    height, width = (np.random.randint(low, high + 1) for low, high in limits)
    top, left = (
        np.random.randint(0, side - part + 1) for side, part in zip(image.shape[1:], (height, width), strict=True)
    )
    boxes = clip_boxes_to_image(target["boxes"] - target["boxes"].new_tensor([left, top] * 2), (height, width))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    masks = target["masks"][kept, top : top + height, left : left + width]
    target = {**target, "boxes": boxes[kept], "labels": target["labels"][kept], "masks": masks}
    return image[:, top : top + height, left : left + width], target
