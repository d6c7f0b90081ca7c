"""Image files, sizes and colours, for all three tasks."""

import colorsys
import errno
import io
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from utils import UserError, make_folder, write_atomically

logger = logging.getLogger("twins")

MIN_SIDE = 480  # pixels; smaller images are enlarged, so that the text is legible
GAP = 8  # pixels between panels


class BadImageError(UserError):
    """Error for an image file that cannot be decoded."""


def load_image(path: str) -> Image.Image:
    """Decode an image file to RGB and turn it by its EXIF orientation; raises the errors of `decode_image`."""
    return decode_image(path, "RGB", upright=True)


def decode_image(path: str, mode: str | None = None, upright: bool = False) -> Image.Image:
    """Decode an image file; convert it to a mode of Pillow, and turn it by its EXIF orientation if asked.

    Raises:
        BadImageError: If the file is missing or cannot be decoded.
        UserError: If the disk or the permissions prevent reading.
    """
    try:
        with Image.open(io.BytesIO(Path(path).read_bytes())) as image:  # faster than many small reads
            image.load()
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            if mode == "RGB":
                return to_rgb(image)
            return image.convert(mode) if mode not in (None, image.mode) else image
    except Exception as error:  # decoders raise many types of errors for damaged files
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the disk and the permissions") from error
        if isinstance(error, FileNotFoundError):
            reason = "there is no such file"
        else:
            reason = "its format is unknown" if isinstance(error, Image.UnidentifiedImageError) else error
        raise BadImageError(f"{path}: cannot be read as an image ({reason})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB; 16 bits per pixel become 8, which Pillow would clip."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def log_unused(folder: str | Path, files: Iterable[Path], remedy: str = "") -> None:
    """Log how many files of a folder are not used because of their suffixes, if any; hidden files are not counted."""
    counts = Counter(file.suffix or file.name for file in files if not file.name.startswith("."))
    if counts:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items())[:10])
        logger.info("note: %s: files not used: %s%s", folder, listed, remedy)


def fitted_size(size: Sequence[int], scale: tuple[int, int], ratio: float = 1.0) -> tuple[int, int]:
    """Return the height and width of an image of a height and width after resizing, with its aspect ratio kept.

    It fits into `ratio` times the scale: the maximum lengths of its sides in pixels, in either order.
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


def load_font(size: tuple[int, int]) -> tuple[ImageFont.FreeTypeFont, int]:
    """Return the font for a picture of a width and height, and the height of a line in pixels."""
    font = ImageFont.load_default(max(14, max(size) // 45))
    return font, round(1.35 * font.size)


def plain_text(text: str) -> str:
    """Return a text in ASCII, because Pillow's font has no other letters: ü becomes u, and those of Chinese `?`."""
    letters = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return letters.encode("ascii", "replace").decode()


def enlarge(image: Image.Image) -> Image.Image:
    """Enlarge an image by a whole factor, so that its longer side has at least `MIN_SIDE` pixels."""
    factor = -(-MIN_SIDE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def draw_captions(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Return a picture of RGB images side by side, with their captions of one or more lines below."""
    captions = [plain_text(caption).splitlines() for caption, _ in panels]
    images = [image for _, image in panels]
    font, line = load_font(max((image.size for image in images), key=max))
    widths = []
    for image, texts in zip(images, captions, strict=True):
        widths.append(max([image.width, *(int(font.getlength(text)) for text in texts)]) + GAP)
    height = max(image.height for image in images)
    picture = Image.new("RGB", (sum(widths), height + line * max(map(len, captions)) + GAP), "white")
    draw = ImageDraw.Draw(picture)
    left = 0
    for image, texts, width in zip(images, captions, widths, strict=True):
        picture.paste(image, (left, 0))
        for row, text in enumerate(texts):
            draw.text((left + 2, height + row * line + 2), text, fill="black", font=font)
        left += width
    return picture


def draw_heat(image: Image.Image, heat: Tensor) -> Image.Image:
    """Draw a map `(h, w)` of any range over a grey copy of an image, from blue (lowest) to yellow (highest)."""
    spread = (heat.max() - heat.min()).clamp(min=1e-12)
    grey = to_pil_image((heat - heat.min()) / spread).resize(image.size, Image.Resampling.BICUBIC)
    colours = ImageOps.colorize(grey.convert("L"), black="navy", mid="crimson", white="yellow")
    return Image.blend(ImageOps.grayscale(image).convert("RGB"), colours, alpha=0.5)
