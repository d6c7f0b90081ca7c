"""Pictures of a segmentation: the image, label maps in colours over the image, and a legend of the classes."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_segmentation_masks

MIN_SIDE = 320  # pixels; smaller images are enlarged, so that there is room for the legend
OPACITY = 0.5  # of the colours
LINE = 18  # pixels per line of text
GAP = 8  # pixels between panels
FONT_SIZE = 13  # pixels


def draw_overlay(
    image: Tensor,
    maps: Mapping[str, Tensor],
    classes: Sequence[str],
    colours: Sequence[tuple[int, ...]],
    ignored: int,
) -> Image.Image:
    """Draw an image, beside it the image under each label map, and a legend of the classes in the maps.

    Args:
        image: RGB image, uint8 `(3, H, W)`.
        maps: Titles and label maps, integers `(H, W)`.
        classes: Names of the classes.
        colours: RGB colours of the classes.
        ignored: Label of pixels that stay as they are.
    """
    present = torch.cat([labels.unique().long() for labels in maps.values()]).unique().tolist()
    legend = [label for label in present if label != ignored]
    panels = {"image": image} | {title: _paint(image, labels, legend, colours) for title, labels in maps.items()}
    factor = -(-MIN_SIDE // max(image.shape[1:]))
    height, width = (side * factor for side in image.shape[1:])
    legend_left = len(panels) * (width + GAP)
    font = ImageFont.load_default(FONT_SIZE)
    column = max((int(font.getlength(classes[label])) for label in legend), default=0) + LINE + 2 * GAP
    rows = max(1, height // LINE)
    columns = -(-len(legend) // rows)
    picture = Image.new("RGB", (legend_left + columns * column, height + LINE + GAP), "white")
    draw = ImageDraw.Draw(picture)
    for i, (title, panel) in enumerate(panels.items()):
        left = i * (width + GAP)
        draw.text((left, 1), title, fill="black", font=font)
        enlarged = F.interpolate(panel[None], scale_factor=factor)[0]  # by nearest pixels
        picture.paste(to_pil_image(enlarged), (left, LINE))
    for i, label in enumerate(legend):
        x, y = legend_left + i // rows * column, LINE + i % rows * LINE
        draw.rectangle((x, y, x + LINE - 5, y + LINE - 5), fill=tuple(colours[label]), outline="black")
        draw.text((x + LINE, y - 1), classes[label], fill="black", font=font)
    return picture


def _paint(image: Tensor, labels: Tensor, drawn: Sequence[int], colours: Sequence[tuple[int, ...]]) -> Tensor:
    """Draw the colours of the labels `drawn` over an image."""
    if not drawn:
        return image  # torchvision warns where there is nothing to draw
    masks = labels == torch.tensor(drawn)[:, None, None]
    return draw_segmentation_masks(image, masks, alpha=OPACITY, colors=[tuple(colours[label]) for label in drawn])
