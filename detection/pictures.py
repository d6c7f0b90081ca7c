"""Pictures of detections: masks, boxes, class names and scores over the image."""

import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from core.images import enlarge, load_font, make_colours, plain_text

OPACITY = 0.5  # of masks


def keep_above(found: dict[str, Tensor], min_score: float) -> dict[str, Tensor]:
    """Return the objects with a score of at least `min_score`, in the form of `draw_detections`."""
    return {name: value[found["scores"] >= min_score] for name, value in found.items()}


def describe_none(min_score: float) -> str:
    """Return the description of a prediction without objects."""
    return f"no objects with a score of at least {min_score}"


def draw_detections(image: Tensor, found: dict[str, Tensor], classes: Sequence[str]) -> Image.Image:
    """Draw the masks, boxes, class names and scores of the objects in an RGB image, uint8 `(3, H, W)`.

    `found` has `boxes` `(n, 4)`, `labels` `(n,)` and, if there are any, `scores` `(n,)` and `masks` `(n, H, W)`. The
    highest score is on top.
    """
    order = found["scores"].argsort() if "scores" in found else torch.arange(len(found["labels"]))
    labels = found["labels"][order].tolist()
    texts = [plain_text(classes[label]) for label in labels]
    if "scores" in found:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, found["scores"][order].tolist(), strict=True)]
    class_colours = make_colours(len(classes))
    colours = [class_colours[label] for label in labels]
    if "masks" in found:
        for mask, colour in zip(found["masks"][order].bool(), colours, strict=True):
            # One call per mask: in one call for all, torchvision blackens the pixels where masks overlap.
            image = draw_segmentation_masks(image, mask, alpha=OPACITY, colors=colour)
    picture = enlarge(to_pil_image(image))
    if not labels:
        return picture  # torchvision warns where there is nothing to draw
    font, _ = load_font(picture.size)
    boxes = found["boxes"][order] * (picture.width / image.shape[2])
    drawn = draw_bounding_boxes(
        pil_to_tensor(picture),
        boxes,
        labels=_drop_hidden(texts, boxes, font),
        colors=colours,
        width=font.size // 4,
        font=io.BytesIO(font.font_bytes),  # Pillow's own; torchvision's default is tiny
        font_size=font.size,
        label_colors="white",
        label_background_colors="black",
        fill_labels=True,
    )
    return to_pil_image(drawn)


def _drop_hidden(texts: Sequence[str], boxes: Tensor, font: ImageFont.FreeTypeFont) -> list[str | None]:
    """Return the labels of boxes, from the lowest score to the highest, with None where one of a higher score lies."""
    shown, taken = [], []
    for text, (x, y) in zip(reversed(texts), reversed(boxes[:, :2].tolist()), strict=True):
        right, bottom = x + font.getlength(text), y + font.size
        hidden = any(x < r and left < right and y < b and top < bottom for left, top, r, b in taken)
        shown.append(None if hidden else text)
        if not hidden:
            taken.append((x, y, right, bottom))
    return shown[::-1]
