"""Files of predictions: a list in JSON, or a table of comma-separated values."""

import csv
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Columns of the table, by task; the third is the figure of an entry of a prediction.
COLUMNS = {
    "classification": ("name", "index", "probability"),
    "segmentation": ("name", "index", "share"),
    "detection": ("name", "index", "score", "x1", "y1", "x2", "y2"),
}


def build_reports(task: str, json_path: str | None, table_path: str | None) -> list["Report"]:
    """Return the files to write, by the paths that are given; they are opened as context managers."""
    reports = [JsonReport(Path(json_path))] if json_path else []
    return reports + ([TableReport(Path(table_path), COLUMNS[task])] if table_path else [])


class Report(ABC):
    """A file of predictions, which are added one by one.

    At the end of the block, also after an error or a signal, the file takes the place of an older one.
    """

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> "Report":
        self.file = open(self.temporary, "w", newline="")
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        os.replace(self.temporary, self.path)

    @abstractmethod
    def add(self, entry: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        """Add the prediction of an image: all of it, and its classes, areas or objects."""


class JsonReport(Report):
    """A list with an object per image."""

    def __enter__(self) -> Report:
        self.separator = "["
        return super().__enter__()

    def add(self, entry: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        self.file.write(f"{self.separator}{json.dumps(entry)}")
        self.separator = ",\n"

    def __exit__(self, *error) -> None:
        self.file.write("[]\n" if self.separator == "[" else "]\n")
        super().__exit__(*error)


class TableReport(Report):
    """A line for each class, area or object, as comma-separated values."""

    def __init__(self, path: Path, columns: Sequence[str]):
        super().__init__(path)
        self.columns = columns

    def __enter__(self) -> Report:
        super().__enter__()
        self.writer = csv.DictWriter(self.file, ("path", *self.columns), extrasaction="ignore", lineterminator="\n")
        self.writer.writeheader()
        return self

    def add(self, entry: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            corners = dict(zip(("x1", "y1", "x2", "y2"), row.get("box", ()), strict=False))
            self.writer.writerow({"path": entry["path"]} | row | corners)
