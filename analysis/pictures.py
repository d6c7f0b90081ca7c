"""Pictures of an analysis: contact sheets by Pillow, and matrices, bars and lines by matplotlib, which is optional."""

import csv
import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from core.images import draw_captions, save_png
from utils import UserError, make_folder, write_text

logger = logging.getLogger("twins")

MAX_NAMES = 40  # classes of a matrix whose names are written
MAX_NUMBERS = 20  # classes of a matrix whose values are written


def save_sheet(panels: Sequence[tuple[str, Image.Image]], tile: tuple[int, int], columns: int, path: Path) -> None:
    """Write images with their captions, so many per row, to a PNG file, and log it.

    `tile` is the width and height to which each image is fitted, in pixels.
    """
    rows = []
    for start in range(0, len(panels), columns):
        row = panels[start : start + columns]
        rows.append(draw_captions([(title, ImageOps.pad(image, tile, color="white")) for title, image in row]))
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    save_png(sheet, path.with_suffix(""))
    logger.info("wrote %s: %d images", path, len(panels))


def draw_matrix(counts: Tensor, classes: Sequence[str]) -> Any:
    """Return a figure of a confusion matrix `(true, predicted)`, as shares of the true class in percent."""
    from matplotlib.figure import Figure  # an optional package

    shares = (100 * counts.double() / counts.sum(dim=1, keepdim=True)).nan_to_num().numpy()
    side = min(16, max(5, 0.4 * len(classes)))
    figure = Figure(figsize=(side + 2, side), layout="constrained")
    axis = figure.subplots()
    colours = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(colours, label="% of the true class")
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    if len(classes) <= MAX_NAMES:
        axis.set_xticks(range(len(classes)), classes, rotation=90)
        axis.set_yticks(range(len(classes)), classes)
    if len(classes) <= MAX_NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:
                colour = "white" if share > 60 else "black"
                axis.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour)
    return figure


def draw_bars(names: Sequence[str], values: Sequence[float], title: str) -> Any:
    """Return a figure with a bar for each class, the highest value on top; undefined values (NaN) are left out."""
    from matplotlib.figure import Figure  # an optional package

    defined = sorted((value, name) for name, value in zip(names, values, strict=True) if value == value)
    figure = Figure(figsize=(8, max(3, 0.22 * len(defined) + 1)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(range(len(defined)), [value for value, _ in defined], tick_label=[name for _, name in defined])
    axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.set_xlim(0, 108)
    axis.set_xlabel(title)
    axis.margins(y=0.01)
    return figure


def save_figure(figure: Any, *paths: Path, dpi: int = 110) -> None:
    """Write a figure to files of one folder, in the formats of their suffixes, and log it; a UserError if it fails."""
    make_folder(paths[0].parent)
    for path in paths:
        try:
            figure.savefig(path, dpi=dpi)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
    logger.info("wrote %s", " and ".join(map(str, paths)))


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as comma-separated values, floats with 6 significant digits, and log it."""
    make_folder(path.parent)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    write_text(path, text.getvalue())
    logger.info("wrote %s", path)


def write_confusion(counts: Tensor, classes: Sequence[str], folder: Path) -> None:
    """Write a confusion matrix as confusion.csv, a row for each true class, and as confusion.png."""
    rows = ((name, *row) for name, row in zip(classes, counts.tolist(), strict=True))
    write_table(folder / "confusion.csv", ("true class", *classes), rows)
    save_figure(draw_matrix(counts, classes), folder / "confusion.png")
