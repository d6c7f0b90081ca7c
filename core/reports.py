"""Files of predictions: a list in JSON, or a table of comma-separated values."""

import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from utils import UserError

# By task: the name of the list in a prediction, and the columns of its entries in a table; the third is their figure.
LISTS = {"classification": "classes", "segmentation": "areas", "detection": "objects"}
COLUMNS = {
    "classification": ("name", "index", "probability"),
    "segmentation": ("name", "index", "share"),
    "detection": ("name", "index", "score", "x1", "y1", "x2", "y2"),
}
Report = Callable[[dict[str, Any]], None]  # adds the prediction of an image


@contextmanager
def open_report(path: Path, end: str = "") -> Iterator[TextIO]:
    """Open a file that takes the place of an older one when the block ends, also by an error or a signal."""
    temporary = path.with_name(f".{path.name}.tmp")
    encoding = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # of the names of files
    try:
        file = temporary.open("w", **encoding)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another file") from error
    with file:
        try:
            yield file
        finally:
            file.write(end)
            file.close()
            os.replace(temporary, path)


@contextmanager
def json_report(path: str) -> Iterator[Report]:
    """Open a list with an object per image."""
    with open_report(Path(path), end="]\n") as file:
        file.write("[")

        def add(entry: dict[str, Any]) -> None:
            file.write(json.dumps(entry) if file.tell() == 1 else f",\n{json.dumps(entry)}")

        yield add


@contextmanager
def table_report(path: str, task: str) -> Iterator[Report]:
    """Open a table with a line for each class, area or object."""
    with open_report(Path(path)) as file:
        writer = csv.DictWriter(file, ("path", *COLUMNS[task]), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()

        def add(entry: dict[str, Any]) -> None:
            for row in entry[LISTS[task]]:
                corners = dict(zip(("x1", "y1", "x2", "y2"), row.get("box", ()), strict=False))
                writer.writerow({"path": entry["path"]} | row | corners)

        yield add
