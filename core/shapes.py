"""The embedded data set: scenes of simple shapes, drawn on demand and identical on every machine.

There are ten classes of shapes, with random colours, sizes, rotations and positions on random backgrounds. A scene has
one or more objects, with their classes, masks and boxes, so all three tasks can train without files or a network.

    scene = draw_scene(seed=(0, 7), size=64)
    scene.image, scene.labels, scene.masks, scene.boxes
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
Cell = tuple[float, float, float]  # left, top and side of a square part of an image, as shares of the image's side
WHOLE: Cell = (0.0, 0.0, 1.0)

SUPERSAMPLING = 2  # scenes are drawn at this multiple of their size, then averaged
LARGE_RADII: Point = (0.33, 0.45)  # smallest and largest radius in the data sets, as shares of the cell's side
MIN_CONTRAST = 175  # minimum distance between object and background colours in 0-255 RGB; at most 208 is possible


@dataclass(frozen=True)
class Scene:
    """A drawn image and its objects; later objects cover earlier ones."""

    image: Image.Image  # RGB, `size` x `size` pixels
    labels: tuple[int, ...]  # classes of the objects, as indices into `CLASSES`
    masks: np.ndarray  # visible pixels of the objects, bool `(objects, size, size)`

    @property
    def boxes(self) -> np.ndarray:
        """Boxes around the visible pixels, float32 `(objects, 4)`: x1, y1, x2, y2 in pixels."""
        boxes = np.zeros((len(self.labels), 4), np.float32)
        for box, mask in zip(boxes, self.masks, strict=True):
            ys, xs = np.nonzero(mask)
            if len(xs):
                box[:] = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        return boxes


def draw_scene(
    seed: int | Sequence[int], size: int, *, labels: Sequence[int] | None = None, radii: Point = (0.2, 0.42)
) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: One or more non-negative integers; the same seed gives the same scene.
        size: Side length in pixels.
        labels: Classes of the objects, in drawing order; by default one object of a random class.
        radii: Smallest and largest radius of an object, as shares of `size`.
    """
    rng = np.random.default_rng(seed)
    if labels is None:
        labels = [int(rng.integers(len(CLASSES)))]
    return _draw(rng, size, labels, [WHOLE] * len(labels), radii)


def draw_quarters(seed: int | Sequence[int], size: int) -> Scene:
    """Draw the scene of a seed with one to four objects, each in a different quarter of the image."""
    rng = np.random.default_rng(seed)
    cells = [(x, y, 0.5) for x in (0.0, 0.5) for y in (0.0, 0.5)]
    chosen = rng.permutation(len(cells))[: rng.integers(1, len(cells) + 1)]
    labels = rng.integers(len(CLASSES), size=len(chosen)).tolist()
    return _draw(rng, size, labels, [cells[i] for i in chosen], radii=LARGE_RADII)


def _draw(rng: np.random.Generator, size: int, labels: Sequence[int], cells: Sequence[Cell], radii: Point) -> Scene:
    """Draw a scene with one object per cell; `radii` are shares of the cell's side."""
    background = np.clip(rng.uniform(0, 255, 3) + rng.uniform(-50, 50, (2, 3)), 0, 255)
    image = _draw_background(rng, size, background)
    masks = np.zeros((len(labels), size, size), bool)
    for i, (label, cell) in enumerate(zip(labels, cells, strict=True)):
        mask = _draw_object(rng, size, CLASSES[label], cell, radii)
        image.paste(_contrasting_colour(rng, background), mask=mask)
        masks[i] = np.asarray(mask) >= 128
        masks[:i] &= ~masks[i]
    return Scene(image, tuple(labels), masks)


def _draw_background(rng: np.random.Generator, size: int, colours: np.ndarray) -> Image.Image:
    """Draw a linear gradient between two colours in a random direction, with noise and a few lines."""
    angle = rng.uniform(0, 2 * math.pi)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    blend = np.clip(0.5 + ramp[None] * math.cos(angle) + ramp[:, None] * math.sin(angle), 0, 1)[..., None]
    start, end = colours.astype(np.float32)
    pixels = end + (start - end) * blend + rng.integers(-8, 9, (size, size, 3), dtype=np.int8)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(3)):
        ends = [tuple(end) for end in rng.uniform(0, size, (2, 2))]
        draw.line(ends, fill=_colour(rng.uniform(0, 255, 3)), width=max(1, size // 64))
    return image


def _draw_object(rng: np.random.Generator, size: int, name: str, cell: Cell, radii: Point) -> Image.Image:
    """Draw a shape with random position, size and rotation; return its coverage of each pixel, 0-255."""
    left, top, share = cell
    radius = rng.uniform(*radii)
    x, y = rng.uniform(radius, 1 - radius, 2) * share + (left, top)
    radius *= share
    angle = rng.uniform(0, 2 * math.pi)
    side = size * SUPERSAMPLING
    cos, sin = side * radius * math.cos(angle), side * radius * math.sin(angle)
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    for points, fill in zip(OUTLINES[name], (255, 0), strict=False):  # the outline, then the hole if it has one
        draw.polygon([(side * x + u * cos - v * sin, side * y + u * sin + v * cos) for u, v in points], fill=fill)
    return mask.reduce(SUPERSAMPLING)


def _contrasting_colour(rng: np.random.Generator, background: np.ndarray) -> tuple[int, int, int]:
    """Draw a colour at a distance of at least `MIN_CONTRAST` from both background colours."""
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.linalg.norm(background - colour, axis=1).min() >= MIN_CONTRAST:
            return _colour(colour)


def _colour(values: np.ndarray) -> tuple[int, int, int]:
    return tuple(int(value) for value in values)


def _circle(radius: float = 1.0, x: float = 0.0, points: int = 36) -> list[Point]:
    steps = (2 * math.pi * i / points for i in range(points))
    return [(x + radius * math.cos(step), radius * math.sin(step)) for step in steps]


def _star(inner: float = 0.35) -> list[Point]:
    corners = ((1.0 if i % 2 == 0 else inner, math.pi * i / 5) for i in range(10))
    return [(radius * math.cos(step), radius * math.sin(step)) for radius, step in corners]


def _heart(points: int = 36) -> list[Point]:
    steps = [2 * math.pi * i / points for i in range(points)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in steps
    ]


# The outline of each class within the unit circle and, for some classes, the hole.
OUTLINES: dict[str, tuple[list[Point], ...]] = {
    "disc": (_circle(0.9),),
    "ring": (_circle(), _circle(0.6)),
    "triangle": (_circle(points=3),),
    "square": (_circle(points=4),),
    "star": (_star(),),
    "cross": (
        [
            *((-0.22, -0.95), (0.22, -0.95), (0.22, -0.22), (0.95, -0.22), (0.95, 0.22), (0.22, 0.22)),
            *((0.22, 0.95), (-0.22, 0.95), (-0.22, 0.22), (-0.95, 0.22), (-0.95, -0.22), (-0.22, -0.22)),
        ],
    ),
    "crescent": (_circle(), _circle(0.85, x=0.5)),
    "heart": (_heart(),),
    "arrow": ([(-0.95, -0.2), (0.1, -0.2), (0.1, -0.65), (0.95, 0.0), (0.1, 0.65), (0.1, 0.2), (-0.95, 0.2)],),
    "bar": ([(-0.95, -0.22), (0.95, -0.22), (0.95, 0.22), (-0.95, 0.22)],),
}
CLASSES = tuple(OUTLINES)
