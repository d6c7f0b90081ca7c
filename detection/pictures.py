"""Pictures of detections: masks, boxes, class names and scores over the image."""

import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from core.images import make_colours

MIN_SIDE = 480  # pixels; smaller images are enlarged, so that the text is legible
OPACITY = 0.5  # of masks
FONT_SIZE = 14  # pixels


def keep_above(found: dict[str, Tensor], min_score: float) -> dict[str, Tensor]:
    """Return the objects with a score of at least `min_score`, in the form of `draw_detections`."""
    return {name: value[found["scores"] >= min_score] for name, value in found.items()}


def describe_none(min_score: float) -> str:
    """Return the caption of a picture without objects."""
    return f"nothing found with a score of at least {min_score}"


def draw_detections(image: Tensor, found: dict[str, Tensor], classes: Sequence[str]) -> Image.Image:
    """Draw the masks, boxes, class names and scores of the objects in an image, the highest score on top.

    Args:
        image: RGB image, uint8 `(3, H, W)`.
        found: `boxes` `(n, 4)` and `labels` `(n,)`; for scores `scores` `(n,)`, for masks `masks` `(n, H, W)`.
        classes: Names of the classes.
    """
    order = found["scores"].argsort() if "scores" in found else torch.arange(len(found["labels"]))
    labels = found["labels"][order].tolist()
    texts = [classes[label] for label in labels]
    if "scores" in found:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, found["scores"][order].tolist(), strict=True)]
    class_colours = make_colours(len(classes))
    colours = [class_colours[label] for label in labels]
    if "masks" in found:
        for mask, colour in zip(found["masks"][order].bool(), colours, strict=True):
            # One call per mask: in one call for all, torchvision blackens the pixels where masks overlap.
            image = draw_segmentation_masks(image, mask, alpha=OPACITY, colors=colour)
    factor = -(-MIN_SIDE // max(image.shape[1:]))
    picture = F.interpolate(image[None], scale_factor=factor)[0]  # by nearest pixels
    if not labels:
        return to_pil_image(picture)  # torchvision warns where there is nothing to draw
    picture = draw_bounding_boxes(
        picture,
        found["boxes"][order] * factor,
        labels=texts,
        colors=colours,
        width=3,
        font=io.BytesIO(ImageFont.load_default(FONT_SIZE).font_bytes),  # Pillow's own; torchvision's default is tiny
        font_size=FONT_SIZE,
        label_colors="white",
        label_background_colors="black",
        fill_labels=True,
    )
    return to_pil_image(picture)
