"""Pictures of a segmentation: the image, label maps in colours over the image, and a legend of the classes."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_segmentation_masks

from core.images import GAP, draw_captions, enlarge, load_font, plain_text
from segmentation.data import IGNORED_LABEL

OPACITY = 0.5  # of the colours


def draw_overlay(
    image: Tensor, maps: Mapping[str, Tensor], classes: Sequence[str], colours: Sequence[tuple[int, ...]]
) -> Image.Image:
    """Draw an RGB image, uint8 `(3, H, W)`, beside it the image under each label map, and a legend of the classes.

    The maps are integers `(H, W)` by their titles. `colours` are the RGB colours of the classes.
    """
    present = torch.cat([labels.unique().long() for labels in maps.values()]).unique().tolist()
    shown = [label for label in present if label != IGNORED_LABEL]
    panels = {"image": image} | {title: _paint(image, labels, shown, colours) for title, labels in maps.items()}
    pictures = [(title, enlarge(to_pil_image(panel))) for title, panel in panels.items()]
    names = [(plain_text(classes[label]), tuple(colours[label])) for label in shown]
    return draw_captions([*pictures, ("", draw_legend(names, pictures[0][1].size))])


def draw_legend(names: Sequence[tuple[str, tuple[int, ...]]], size: tuple[int, int]) -> Image.Image:
    """Draw the names of classes beside their colours, in columns of the height of a picture of a width and height."""
    font, line = load_font(size)
    rows = max(1, size[1] // line)
    column = max((int(font.getlength(name)) for name, _ in names), default=0) + line + 2 * GAP
    picture = Image.new("RGB", (max(1, -(-len(names) // rows) * column), size[1]), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, colour) in enumerate(names):
        x, y = i // rows * column, i % rows * line
        draw.rectangle((x, y, x + font.size, y + font.size), fill=colour, outline="black")
        draw.text((x + line, y - 1), name, fill="black", font=font)
    return picture


def _paint(image: Tensor, labels: Tensor, drawn: Sequence[int], colours: Sequence[tuple[int, ...]]) -> Tensor:
    """Draw the colours of the labels `drawn` over an image."""
    if not drawn:
        return image  # torchvision warns where there is nothing to draw
    masks = labels == torch.tensor(drawn)[:, None, None]
    return draw_segmentation_masks(image, masks, alpha=OPACITY, colors=[tuple(colours[label]) for label in drawn])
