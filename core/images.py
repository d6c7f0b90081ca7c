"""Image files, sizes and colours, for all three tasks."""

import colorsys
import errno
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from utils import UserError, make_folder, write_atomically

FONT_SIZE, LINE, GAP = 14, 19, 8  # pixels
MIN_SIDE = 320  # pixels; smaller images are enlarged


class BadImageError(UserError):
    """Error for an image file that cannot be decoded."""


def load_image(path: str) -> Image.Image:
    """Decode an image file to RGB and turn it by its EXIF orientation; raises the errors of `decode_image`."""
    return decode_image(path, "RGB", upright=True)


def decode_image(path: str, mode: str | None = None, upright: bool = False) -> Image.Image:
    """Decode an image file.

    Args:
        path: The file.
        mode: Mode of Pillow to convert the image to; None for that of the file.
        upright: True to turn the image by its EXIF orientation, False for the pixels as they are stored.

    Raises:
        BadImageError: If the file is missing or cannot be decoded.
        UserError: If the disk or the permissions prevent reading.
    """
    try:
        with Image.open(io.BytesIO(Path(path).read_bytes())) as image:  # faster than many small reads
            image.load()
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            return image.convert(mode) if mode not in (None, image.mode) else image
    except Exception as error:  # decoders raise many types of errors for damaged files
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the disk and the permissions") from error
        reason = "its format is unknown" if isinstance(error, Image.UnidentifiedImageError) else error
        raise BadImageError(f"{path}: cannot be read as an image ({reason})") from error


def fitted_size(size: Sequence[int], scale: tuple[int, int], ratio: float = 1.0) -> tuple[int, int]:
    """Return the height and width of an image after resizing it to fit into a scale, with its aspect ratio kept.

    Args:
        size: Height and width of the image.
        scale: Maximum length of the longer and the shorter side in pixels, in either order.
        ratio: Factor by which the scale is multiplied.
    """
    longer, shorter = (int(side * ratio) for side in sorted(scale, reverse=True))
    if torch.jit.is_tracing():  # sides are tensors
        sides = torch.stack([torch.as_tensor(side) for side in size])
        factor = torch.minimum(longer / sides.max(), shorter / sides.min())
        height, width = (sides * factor + 0.5).long().clamp(min=1).unbind()
        return height, width
    # Functions that take the symbolic sizes of an export, too.
    factor = torch.sym_min(longer / torch.sym_max(*size), shorter / torch.sym_min(*size))
    height, width = (torch.sym_max(1, torch.sym_int(side * factor + 0.5)) for side in size)
    return height, width


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image `(3, H, W)`, uint8 or float, bilinearly and without antialiasing, as in the original."""
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image to `path` with `.png` appended, atomically."""
    make_folder(path.parent)
    write_atomically(path.with_name(f"{path.name}.png"), lambda file: image.save(file, format="PNG"))


def make_colours(count: int) -> list[tuple[int, ...]]:
    """Return distinct RGB colours, with hues spaced by the golden ratio and three shades."""
    shades = ((0.85, 0.95), (0.55, 0.8), (1.0, 0.6))  # saturation, value
    hsv = [(i * 0.618034 % 1, *shades[i % 3]) for i in range(count)]
    return [tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(*colour)) for colour in hsv]


def draw_captions(images: Mapping[str, Image.Image]) -> Image.Image:
    """Return a picture of RGB images side by side, with their captions of one or more lines below."""
    font = ImageFont.load_default(FONT_SIZE)
    panels = {}
    for caption, image in images.items():
        factor = -(-MIN_SIDE // max(image.size))  # a whole number
        panels[caption] = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    text_height = LINE * max(len(caption.splitlines()) for caption in panels) + GAP
    widths = []
    for caption, panel in panels.items():
        widths.append(max([panel.width, *(int(font.getlength(line)) for line in caption.splitlines())]) + GAP)
    height = max(panel.height for panel in panels.values())
    picture = Image.new("RGB", (sum(widths), height + text_height), "white")
    draw = ImageDraw.Draw(picture)
    left = 0
    for (caption, panel), width in zip(panels.items(), widths, strict=True):
        picture.paste(panel, (left, 0))
        for row, line in enumerate(caption.splitlines()):
            draw.text((left + 2, height + row * LINE + 2), line, fill="black", font=font)
        left += width
    return picture


def draw_heat(image: Image.Image, heat: Tensor) -> Image.Image:
    """Draw a map `(h, w)` of any range over a grey copy of an image, from blue (lowest) to yellow (highest)."""
    spread = (heat.max() - heat.min()).clamp(min=1e-12)
    grey = to_pil_image((heat - heat.min()) / spread).resize(image.size, Image.Resampling.BICUBIC)
    colours = ImageOps.colorize(grey.convert("L"), black="navy", mid="crimson", white="yellow")
    return Image.blend(ImageOps.grayscale(image).convert("RGB"), colours, alpha=0.5)
