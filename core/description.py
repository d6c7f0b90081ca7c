"""What a checkpoint says about its network besides the weights: task, classes, normalisation and options."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import models
from core.checkpoint import REQUIRED_KEYS, check_format
from utils import UserError

TASKS = {"model": "classification", "head": "segmentation", "detector": "detection"}  # by an option of their runs


@dataclass(frozen=True)
class Description:
    """Description of a trained network."""

    task: str  # "classification", "segmentation" or "detection"; empty if unknown
    classes: Sequence[str] = ()  # names in the order of the outputs; empty in checkpoints of formats 1 and 2
    colours: Sequence[tuple[int, int, int]] = ()  # RGB colours of the classes, 0 to 255; empty for the default ones
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN  # of each channel, from 0 to 1; images are normalised
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    options: dict[str, Any] = field(default_factory=dict)  # of the run: of main.py, or the fields of the experiment

    def to_checkpoint(self) -> dict[str, Any]:
        """Return the entry of a checkpoint, which has the options in another entry."""
        return {name: value for name, value in asdict(self).items() if name != "options"}

    def to_experiment(self, kind: type) -> Any:
        """Return the experiment of the training of a dense network, of the class `kind`."""
        return kind(**{entry.name: self.options[entry.name] for entry in fields(kind) if entry.name in self.options})


def find_task(options: Mapping[str, Any]) -> str:
    """Return the task of a run by its options, or by the fields of its experiment."""
    return next(task for option, task in TASKS.items() if option in options)


def read_description(path: str | Path, task: str | None = None) -> Description:
    """Read the description of a checkpoint of this code for a task, or any. For other weights nothing is known.

    Raises:
        TwinsError: If the file is missing or damaged, or would execute code.
        UserError: If it is a checkpoint of another task or of a newer format.
    """
    content = models.read_file(path)
    if not set(content) >= REQUIRED_KEYS:
        return Description(task="")
    check_format(path, content)
    options = saved_options(content)
    known = find_task(options)
    if task not in (None, known):
        raise UserError(f"{path}: is a checkpoint of {known}, not of {task}; use the scripts of that task")
    return Description(**({"task": known} | content.get("description", {})), options=options)


def saved_options(content: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a checkpoint, with those of segmentation that its format does not hold."""
    options = content["args"]
    return {"window_padding": "mask"} | options if "head" in options else options  # formats 1 and 2 knew no other


def remembered_options(description: Description) -> dict[str, Any]:
    """Return the options of the training of a classifier that shape the network and its input."""
    names = ("model", "input_size", "eval_crop_ratio", "data_set", "inat_category")
    return {name: description.options[name] for name in names if name in description.options}


def check_same_classes(path: str | Path, known: Sequence[str], classes: Sequence[str]) -> None:
    """Raise a UserError if data have other classes than a checkpoint, or another order; unknown ones (empty) pass."""
    if not known or list(known) == list(classes):
        return
    if len(known) != len(classes):
        raise UserError(f"{path}: has {len(known)} classes, but the data have {len(classes)}; fine-tune it first")
    index = next(index for index, names in enumerate(zip(known, classes, strict=True)) if names[0] != names[1])
    order = ", but the same in another order" if sorted(known) == sorted(classes) else ""
    raise UserError(
        f"{path}: its classes are not those of the data{order}: class {index} is {known[index]!r}, and "
        f"{classes[index]!r} in the data; use the data's own weights, or fine-tune it first"
    )
