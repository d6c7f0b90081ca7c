"""What the predictors and the results of the three tasks share; predict.py loads them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from core.description import Description
from core.images import decode_image, to_rgb
from utils import UserError

Source = str | Path | Image.Image | np.ndarray


def open_image(source: Source, upright: bool) -> Image.Image:
    """Return a path, PIL image or uint8 array as an image in RGB, turned by its EXIF orientation if `upright`.

    An array is `(H, W, 3)` in RGB or `(H, W)` in grey.

    Raises:
        BadImageError: If a file is missing or cannot be decoded.
        UserError: If an array is of another type or shape.
    """
    if isinstance(source, (str, Path)):
        return decode_image(str(source), "RGB", upright)
    if isinstance(source, Image.Image):
        return to_rgb(ImageOps.exif_transpose(source) if upright else source)
    array = np.asarray(source)
    is_image = array.ndim in (2, 3) and array.shape[2:] in ((), (3,), (4,)) and array.size > 0
    if array.dtype != np.uint8 or not is_image:
        raise UserError(
            f"an array of {array.dtype} and shape {array.shape} is not an image; pass uint8 of shape (height, width, 3)"
        )
    return Image.fromarray(array).convert("RGB")


def prepare_image(source: Source, to_input: Callable[[Image.Image], Any], upright: bool) -> Any:
    """Return the input of a network for an image; the arguments and errors are those of `open_image`."""
    return to_input(open_image(source, upright))


@dataclass(frozen=True)
class Result(ABC):
    """The prediction of an image."""

    source: Source  # the image as it was passed to the predictor; `draw` opens a path again
    classes: Sequence[str]  # names of all classes

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as values that JSON can hold."""

    @abstractmethod
    def draw(self) -> Image.Image:
        """Return a picture of the image and its prediction."""


class Predictor(ABC):
    """A network in evaluation mode, with the preprocessing of its task's evaluation.

    A subclass has the two static methods `build(description)`, which returns the network, and `load(network, weights)`,
    which loads a file of weights and returns a report.

    Args:
        model: The network.
        description: Its task, its classes and the options of its training.
        to_input: Function that returns the input of the network for an RGB image.
        amp_dtype: Data type of autocast; None to disable mixed precision.
    """

    upright = True  # images are turned by their EXIF orientation, as in the data sets of the dense tasks

    def __init__(
        self,
        model: nn.Module,
        description: Description,
        to_input: Callable[[Image.Image], Any],
        amp_dtype: torch.dtype | None = None,
    ):
        self.model = model.eval()
        self.description = description
        self.classes = list(description.classes)
        # From an image to the input, without the network, so that data-loading processes can have it.
        self.prepare = partial(prepare_image, to_input=to_input, upright=self.upright)
        self.device = next(model.parameters()).device
        self.autocast = partial(torch.autocast, self.device.type, amp_dtype, enabled=amp_dtype is not None)

    def __call__(self, images: Source | Sequence[Source], batch_size: int = 8) -> Any:
        """Return the result of an image (path, PIL image or uint8 array `(H, W, 3)`), or those of a list of images.

        A classifier sees `batch_size` images at once; dense networks see one.

        Raises:
            UserError: If an image cannot be read.
        """
        if not isinstance(images, (list, tuple)):
            return self([images])[0]
        results = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            results += self.predict(batch, [self.prepare(source) for source in batch])
        return results

    @abstractmethod
    def predict(self, sources: Sequence[Source], inputs: Sequence[Any]) -> list[Result]:
        """Return the results of images and their inputs."""
