"""Pictures of what a detector found: boxes, masks, names and scores over the image."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from core.images import make_colours

MIN_SIDE = 400  # pixels; smaller images are enlarged, so that text can be read
OPACITY = 0.45  # of masks


def draw_detections(image: Image.Image, found: dict[str, Tensor], classes: Sequence[str]) -> Image.Image:
    """Draw the boxes, masks, names and scores of the objects in an image.

    Args:
        image: RGB.
        found: `boxes` `(n, 4)`, `labels`, `scores` and, with a mask each, `masks` `(n, H, W)`.
        classes: Names of the classes.
    """
    colours = make_colours(len(classes))
    labels = found["labels"].tolist()
    pixels = np.array(image, np.float32)
    for mask, label in zip(found.get("masks", ()), labels, strict=False):
        inside = mask.numpy().astype(bool)
        pixels[inside] = (1 - OPACITY) * pixels[inside] + OPACITY * np.array(colours[label], np.float32)
    factor = -(-MIN_SIDE // max(image.size))
    size = (image.width * factor, image.height * factor)
    picture = Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for box, label, score in zip(found["boxes"].tolist(), labels, found["scores"].tolist(), strict=True):
        box = [side * factor for side in box]
        draw.rectangle(box, outline=colours[label], width=2)
        text = f"{classes[label]} {score:.2f}"
        place = (box[0], max(0, box[1] - 16))
        draw.rectangle(draw.textbbox(place, text, font), fill="black")
        draw.text(place, text, fill="white", font=font)
    return picture
