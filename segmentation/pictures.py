"""Pictures of a segmentation: the image, the image under the colours of its classes, and a legend."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 320  # pixels; smaller images are enlarged, so that the legend has room beside them
OPACITY = 0.6
LINE = 18  # pixels a line of text
GAP = 8  # pixels between panels


def draw_overlay(
    image: Image.Image,
    maps: Mapping[str, np.ndarray],
    classes: Sequence[str],
    colours: Sequence[tuple[int, ...]],
    ignored: int,
) -> Image.Image:
    """Draw an image and, beside it, each of its label maps in colours over it, with a legend of the classes in them.

    Args:
        image: RGB.
        maps: Titles to class indices `(H, W)`.
        classes: Names of the classes.
        colours: Of the classes, RGB.
        ignored: Label of pixels that stay as they are.
    """
    panels = {"image": image} | {title: _paint(image, labels, colours, ignored) for title, labels in maps.items()}
    factor = -(-MIN_SIDE // max(image.size))
    width, height = image.width * factor, image.height * factor
    present = np.unique(np.concatenate([labels.ravel() for labels in maps.values()]))
    legend = [label for label in present if label != ignored]
    font = ImageFont.load_default(13)
    column = max((int(font.getlength(classes[label])) for label in legend), default=0) + LINE + 2 * GAP
    rows = max(1, height // LINE)
    columns = -(-len(legend) // rows)
    size = (len(panels) * (width + GAP) + columns * column, height + LINE + GAP)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for i, (title, panel) in enumerate(panels.items()):
        draw.text((i * (width + GAP), 1), title, fill="black", font=font)
        picture.paste(panel.resize((width, height), Image.Resampling.NEAREST), (i * (width + GAP), LINE))
    for i, label in enumerate(legend):
        x, y = len(panels) * (width + GAP) + i // rows * column, LINE + i % rows * LINE
        draw.rectangle((x, y, x + LINE - 5, y + LINE - 5), fill=tuple(colours[label]), outline="black")
        draw.text((x + LINE, y - 1), classes[label], fill="black", font=font)
    return picture


def _paint(image: Image.Image, labels: np.ndarray, colours: Sequence[tuple[int, ...]], ignored: int) -> Image.Image:
    """Lay the colours of the classes over an image."""
    palette = np.zeros((256, 3), np.float32)
    palette[: len(colours)] = colours
    pixels = np.asarray(image, np.float32)
    mixed = OPACITY * palette[labels] + (1 - OPACITY) * pixels
    return Image.fromarray(np.where((labels == ignored)[..., None], pixels, mixed).astype(np.uint8))
