"""Experiment files: a Python file whose `config` is a frozen dataclass with all that a published result depends on."""

import ast
import dataclasses
import math
import os
import re
import runpy
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from core.launch import one_line
from core.options import nearest
from models.twins import MIN_INPUT_SIZE
from utils import UserError

E = TypeVar("E")


def load_experiment(path: str | Path, changes: Sequence[str] = (), kind: type | None = None) -> Any:
    """Load the experiment of a file and change single fields of it.

    Args:
        path: A Python file that defines `config`; it is executed.
        changes: `key=value` each, with the value as in Python; quotes around text may be left out.
        kind: Class that the experiment must have; None for any.

    Raises:
        UserError: If there is no experiment in the file, or no such field, or a value is of another type.
    """
    if not os.path.isfile(path):
        folder = Path(path).parent
        others = sorted(file.name for file in folder.glob("*_*.py")) if os.path.isdir(folder) else []
        raise UserError(f"{path}: there is no such config{nearest(Path(path).name, others)}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # the file may do anything
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown:
            raise UserError(f"{path}: there is no such key: {unknown[1]}") from error
        if isinstance(error, SyntaxError) or traceback.extract_tb(error.__traceback__)[-1].filename == str(path):
            raise UserError(f"{path}: {type(error).__name__}: {one_line(error)}") from error
        raise  # not in the file itself: an internal error
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UserError(f"{path}: defines no experiment; it should end with config = one of the recipes")
    if kind is not None and not isinstance(config, kind):
        raise UserError(
            f"{path}: is an experiment of another task; choose one of {kind.__module__.split('.')[0]}/configs"
        )
    return change_fields(config, changes)


def change_fields(config: E, changes: Sequence[str]) -> E:
    """Return a dataclass with fields changed by texts `key=value`; see `load_experiment`."""
    hints = typing.get_type_hints(type(config))
    values = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"--cfg-options {change!r} is no key=value")
        if key not in hints:
            raise UserError(f"--cfg-options {key}: there is no such key{nearest(key, hints)}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if hints[key] is str and not isinstance(value, str):
            value = text  # a name that reads like a number
        values[key] = _as_type(value, hints[key])
        if values[key] is NotImplemented:
            raise UserError(f"--cfg-options {key}: {text!r} is not of type {_type_name(hints[key])}")
    return dataclasses.replace(config, **values)


def check_types(experiment: Any) -> None:
    """Check that each field of a dataclass has a value of its declared type; ints pass as floats, lists as tuples.

    Raises:
        UserError: If one has not; its name, value and type are given.
    """
    for name, hint in typing.get_type_hints(type(experiment)).items():
        value = getattr(experiment, name)
        if _as_type(value, hint) is NotImplemented:
            raise UserError(f"{name}={value!r} is not of type {_type_name(hint)}")


def check_fields(
    experiment: Any, choices: dict[str, Sequence[str]], above_zero: Sequence[str], not_below_zero: Sequence[str]
):
    """Check the types of the fields of an experiment, and the values that both tasks' experiments limit.

    Args:
        experiment: A dataclass.
        choices: Fields to the values that they may have.
        above_zero: Fields that must be greater than 0.
        not_below_zero: Fields that must be at least 0.

    Raises:
        UserError: If a field has another value; its name and value are given.
    """
    check_types(experiment)
    for name, known in choices.items():
        if getattr(experiment, name) not in known:
            raise UserError(f"{name}={getattr(experiment, name)!r} is unknown; it is {', '.join(known)}")
    for name in above_zero:
        if getattr(experiment, name) <= 0:
            raise UserError(f"{name}={getattr(experiment, name)} is not above 0")
    for name in not_below_zero:
        if getattr(experiment, name) < 0:
            raise UserError(f"{name}={getattr(experiment, name)} is below 0")
    if not 0 <= experiment.drop_path < 1:
        raise UserError(f"drop_path={experiment.drop_path} is not between 0 and 1")
    if min(experiment.scale) < MIN_INPUT_SIZE:
        raise UserError(f"scale={experiment.scale}: sides of {MIN_INPUT_SIZE} pixels are the least")


def _as_type(value: Any, hint: Any) -> Any:
    """Return a value as the type that a field has, `NotImplemented` where it is of another."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            return NotImplemented
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        items = [_as_type(item, kind) for item, kind in zip(value, kinds, strict=False)]
        return NotImplemented if len(value) != len(kinds) or NotImplemented in items else tuple(items)
    if hint is float and type(value) in (int, float):
        return float(value) if abs(value) < math.inf else NotImplemented
    return value if type(value) is hint else NotImplemented


def _type_name(hint: Any) -> str:
    return str(hint) if typing.get_args(hint) else hint.__name__
