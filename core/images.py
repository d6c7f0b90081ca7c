"""Image files, sizes and colours, as all three tasks have them."""

import colorsys
import errno
import io
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils import UserError, make_folder, write_atomically


class BadImageError(UserError):
    """An image file that cannot be decoded."""


def load_image(path: str) -> Image.Image:
    """Decode an image file to RGB; see `decode_image` for what is raised."""
    return decode_image(path, "RGB")


def decode_image(path: str, mode: str | None = None) -> Image.Image:
    """Decode an image file, to a mode of Pillow or as it is stored.

    Raises:
        BadImageError: If the file is missing or cannot be decoded.
        UserError: If the disk or the permissions are at fault.
    """
    try:
        with Image.open(io.BytesIO(Path(path).read_bytes())) as image:  # quicker than many small reads
            image.load()
            return image.convert(mode) if mode not in (None, image.mode) else image
    except Exception as error:  # decoders raise many kinds of errors on damaged files
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the disk and the permissions") from error
        reason = "it is not in a known format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise BadImageError(f"{path}: cannot be read as an image ({reason})") from error


def fitted_size(size: Sequence[int], scale: tuple[int, int], ratio: float = 1.0) -> tuple[int, int]:
    """Return the height and width of an image that is made to fit into a scale, keeping its proportions.

    Args:
        size: Its height and width.
        scale: Pixels of the longer and the shorter side, in either order.
        ratio: Factor on the scale.
    """
    longer, shorter = (int(side * ratio) for side in sorted(scale, reverse=True))
    factor = min(longer / max(size), shorter / min(size))
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image `(3, H, W)`, uint8 or float, bilinearly; as in the original, nothing is smoothed."""
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image as `path` with `.png` behind it, whole or not at all."""
    make_folder(path.parent)
    write_atomically(path.with_name(f"{path.name}.png"), lambda file: image.save(file, format="PNG"))


def make_colours(count: int) -> list[tuple[int, ...]]:
    """Return distinct RGB colours: hues a golden section of the circle apart, in three shades."""
    shades = ((0.85, 0.95), (0.55, 0.8), (1.0, 0.6))  # saturation, value
    hsv = [(i * 0.618034 % 1, *shades[i % 3]) for i in range(count)]
    return [tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(*colour)) for colour in hsv]
