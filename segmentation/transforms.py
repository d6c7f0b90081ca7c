"""Transforms of segmentation: the published augmentation, and the inputs of an evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from core.images import fitted_size, resize_image
from models.twins import MIN_INPUT_SIZE
from segmentation.data import IGNORED_LABEL, Sample
from transforms import normalise
from utils import UserError

MAX_CLASS_SHARE = 0.75  # of the labelled pixels of a training crop
CROP_TRIES = 10
CACHED_ROWS = 64  # of an image, whose colours are changed at a time; all at once would take three times as long


def augment(
    image: Tensor, labels: Tensor, scale: tuple[int, int], scale_range: tuple[float, float], crop_size: int
) -> Sample:
    """Return a normalised image `(3, crop, crop)` and its labels after the published augmentation.

    The image is uint8 `(3, H, W)`, its labels `(H, W)`. `scale` limits its longer and shorter side in pixels,
    multiplied by a random factor in `scale_range`.
    """
    size = fitted_size(labels.shape, scale, np.random.uniform(*scale_range))
    image, labels = resize_image(image, size), resize_labels(labels, size)
    image, labels = random_crop(image, labels, crop_size)
    if np.random.rand() < 0.5:
        image, labels = image.flip(2), labels.flip(1)
    image = normalise(distort_colours(image))
    bottom, right = (crop_size - side for side in labels.shape)
    padding = (0, right, 0, bottom)
    return F.pad(image, padding), F.pad(labels, padding, value=IGNORED_LABEL)


@dataclass
class EvalViews(Dataset):
    """A data set for evaluation; returns `(index, images, labels)`.

    The images are the normalised image `(3, h, w)` at each ratio; the labels keep the size of the original image.
    """

    dataset: Dataset  # of segmentation/data.py
    scale: tuple[int, int]  # limits of an image's longer and shorter side in pixels
    ratios: Sequence[float] = (1.0,)  # factors on scale

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, list[Tensor], Tensor]:
        image, labels = self.dataset[index]
        try:
            return index, evaluation_inputs(image, self.scale, self.ratios), labels
        except UserError as error:
            raise UserError(f"image {self.dataset.name(index)}: {error}") from error


def evaluation_inputs(image: Tensor, scale: tuple[int, int], ratios: Sequence[float] = (1.0,)) -> list[Tensor]:
    """Return a uint8 image `(3, H, W)` normalised and resized to a scale, at each ratio `(3, h, w)`.

    Raises a UserError if a side becomes smaller than a network takes.
    """
    sizes = [fitted_size(image.shape[1:], scale, ratio) for ratio in ratios]
    smallest = min(sizes, key=min)
    if min(smallest) < MIN_INPUT_SIZE:
        raise UserError(
            f"has {smallest[1]}x{smallest[0]} pixels when resized to scale={scale} at the smallest ratio, but each "
            f"side needs at least {MIN_INPUT_SIZE}; crop the image, raise scale, or remove small test_ratios"
        )
    return [normalise(resize_image(image, size)) for size in sizes]


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize labels `(H, W)` to a height and width by nearest-neighbour interpolation."""
    return F.interpolate(labels[None, None], size=size, mode="nearest")[0, 0]


def random_crop(image: Tensor, labels: Tensor, size: int) -> Sample:
    """Crop a random square; try up to ten more times for one where no class has 75 % of the pixels or more."""
    for _ in range(CROP_TRIES + 1):
        top, left = (np.random.randint(0, max(side - size, 0) + 1) for side in labels.shape)
        part = labels[top : top + size, left : left + size]
        counts = torch.bincount(part.flatten())[:IGNORED_LABEL]
        if counts.count_nonzero() > 1 and counts.max() < MAX_CLASS_SHARE * counts.sum():
            break
    return image[:, top : top + size, left : left + size], part


def distort_colours(image: Tensor) -> Tensor:
    """Return a uint8 image `(3, H, W)` with the random changes of `draw_distortion`."""
    steps = draw_distortion()
    pixels = image.numpy().copy()
    for top in range(0, pixels.shape[1], CACHED_ROWS):
        part = pixels[:, top : top + CACHED_ROWS]
        for step in steps:
            part[:] = step(part)
    return torch.from_numpy(pixels)


def draw_distortion() -> list[Callable[[np.ndarray], np.ndarray]]:
    """Draw changes of brightness, contrast, saturation and hue, each with probability 0.5, in the order of their use.

    Brightness changes by up to 32 levels, contrast and saturation by factors of 0.5 to 1.5, and hue by -36 to 34
    degrees. Contrast is changed second or last. Each change returns an RGB image, uint8 `(3, H, W)`.
    """
    brightness = [partial(scale_levels, shift=np.random.uniform(-32, 32))] if _coin() else []
    contrast_first = _coin()
    contrast = [partial(scale_levels, factor=np.random.uniform(0.5, 1.5))] if _coin() else []
    saturation = [partial(change_hsv, factor=np.random.uniform(0.5, 1.5))] if _coin() else []
    hue = [partial(change_hsv, shift=np.random.randint(-18, 18))] if _coin() else []
    if contrast_first:
        return brightness + contrast + saturation + hue
    return brightness + saturation + hue + contrast


def scale_levels(image: np.ndarray, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Multiply levels by a factor and add a shift, then clip and truncate them."""
    return (image.astype(np.float32) * factor + shift).clip(0, 255).astype(np.uint8)


def change_hsv(image: np.ndarray, factor: float = 1.0, shift: int = 0) -> np.ndarray:
    """Multiply the saturation of an RGB image, uint8 `(3, H, W)`, by a factor, and shift its hue modulo 180.

    The levels are those of OpenCV's conversions of 8-bit images, where hues have units of 2 degrees.
    """
    hue, saturation, value = _to_hsv(image.astype(np.float32))
    saturation = np.floor((saturation * factor).clip(max=255))
    return _to_rgb((hue.astype(np.int16) + shift) % 180, saturation, value).astype(np.uint8)


def _to_hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hue (modulo 180), saturation and value (0 to 255) of an RGB image, as whole numbers in float32."""
    red, green, blue = image
    value = image.max(0)
    chroma = value - image.min(0)
    hue = np.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    hue = np.where(value == red, green - blue, hue) * _quotient(30, chroma)
    return np.floor(hue + 0.5), np.floor(chroma * _quotient(255, value) + 0.5), value


def _quotient(dividend: int, divisor: np.ndarray) -> np.ndarray:
    """Return quotients rounded to 12 binary places, as in OpenCV's tables."""
    return np.rint(dividend * 4096 / divisor.clip(1)) / 4096


def _to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the RGB image, float32 `(3, H, W)` before truncation, of hue (0 to 179), saturation and value."""
    sixth = hue * np.float32(1 / 30)  # 0 red, 2 green, 4 blue
    absence = np.stack([2 - abs(sixth - 3), abs(sixth - 2) - 1, abs(sixth - 4) - 1]).clip(0, 1)
    return value / 255 * (1 - saturation / 255 * absence) * 255


def _coin() -> bool:
    return np.random.rand() < 0.5
