"""Transforms of segmentation: the published augmentation, and the inputs of an evaluation."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from core.images import fitted_size, resize_image
from models.twins import MIN_INPUT_SIZE
from segmentation.data import IGNORED_LABEL, Sample
from transforms import normalise
from utils import UserError

MAX_CLASS_SHARE = 0.75  # of the labelled pixels of a training crop
CROP_TRIES = 10


class TrainViews(Dataset):
    """A data set with the published augmentation; returns a normalised image `(3, crop, crop)` and its labels.

    Args:
        dataset: Data set of `segmentation/data.py`.
        scale: Limits of an image's longer and shorter side in pixels.
        scale_range: Range of the random factor on `scale`.
        crop_size: Side length of the crops in pixels.
    """

    def __init__(self, dataset: Dataset, scale: tuple[int, int], scale_range: tuple[float, float], crop_size: int):
        self.dataset = dataset
        self.scale = scale
        self.scale_range = scale_range
        self.crop_size = crop_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        image, labels = self.dataset[index]
        size = fitted_size(labels.shape, self.scale, np.random.uniform(*self.scale_range))
        image, labels = resize_image(image, size), resize_labels(labels, size)
        image, labels = random_crop(image, labels, self.crop_size)
        if np.random.rand() < 0.5:
            image, labels = image.flip(2), labels.flip(1)
        image = normalise(distort_colours(image))
        bottom, right = (self.crop_size - side for side in labels.shape)
        padding = (0, right, 0, bottom)
        return F.pad(image, padding), F.pad(labels, padding, value=IGNORED_LABEL)


class EvalViews(Dataset):
    """A data set for evaluation; returns `(index, images, labels)`.

    The images are the normalised image `(3, h, w)` at each ratio; the labels keep the size of the original image.

    Args:
        dataset: Data set of `segmentation/data.py`.
        scale: Limits of an image's longer and shorter side in pixels.
        ratios: Factors on `scale`.
    """

    def __init__(self, dataset: Dataset, scale: tuple[int, int], ratios: Sequence[float] = (1.0,)):
        self.dataset = dataset
        self.scale = scale
        self.ratios = ratios

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, list[Tensor], Tensor]:
        image, labels = self.dataset[index]
        sizes = [fitted_size(labels.shape, self.scale, ratio) for ratio in self.ratios]
        smallest = min(sizes, key=min)
        if min(smallest) < MIN_INPUT_SIZE:
            raise UserError(
                f"image {self.dataset.name(index)}: has {smallest[1]}x{smallest[0]} pixels when resized to scale="
                f"{self.scale} at the smallest ratio, but each side needs at least {MIN_INPUT_SIZE}; raise scale, or "
                "remove small test_ratios"
            )
        return index, [normalise(resize_image(image, size)) for size in sizes], labels


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
    """Change brightness, contrast, saturation and hue of a uint8 image `(3, H, W)`, each with probability 0.5.

    Brightness changes by up to 32 levels, contrast and saturation by factors of 0.5 to 1.5, and hue by up to 36
    degrees. Contrast is changed second or last.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    levels = np.arange(256)
    if _coin():
        picture = _map_levels(picture, levels + np.random.uniform(-32, 32))
    contrast_first = _coin()
    if contrast_first:
        picture = _distort_contrast(picture)
    saturation = np.random.uniform(0.5, 1.5) if _coin() else 1.0
    # Differs from the original: a hue has 256 steps, not 180, because the image library is Pillow.
    shift = round(np.random.randint(-18, 18) * 256 / 180) if _coin() else 0
    if saturation != 1.0 or shift:
        picture = _map_levels(picture.convert("HSV"), (levels + shift) % 256, levels * saturation, levels)
    picture = picture.convert("RGB")
    if not contrast_first:
        picture = _distort_contrast(picture)
    return pil_to_tensor(picture)


def _distort_contrast(picture: Image.Image) -> Image.Image:
    return _map_levels(picture, np.arange(256) * np.random.uniform(0.5, 1.5)) if _coin() else picture


def _map_levels(picture: Image.Image, *levels: np.ndarray) -> Image.Image:
    """Replace the levels of each channel by those of a table: one table for all channels, or one for each."""
    tables = np.clip(np.stack(levels * (3 // len(levels))), 0, 255).astype(np.uint8)
    return picture.point(tables.ravel().tolist())


def _coin() -> bool:
    return np.random.rand() < 0.5
