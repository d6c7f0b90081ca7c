"""Experiment files: a Python file whose `config` is a frozen dataclass with all that a published result depends on.

The fields of an experiment declare their types and limits, as in `channels: Positive[int] = 512`; its `__post_init__`
calls `check_fields`.
"""

import ast
import dataclasses
import os
import re
import runpy
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from core.launch import one_line
from core.options import nearest
from models.twins import MIN_INPUT_SIZE
from utils import UserError

E = TypeVar("E")
N = TypeVar("N", int, float)


class Limit(NamedTuple):
    """A limit of a number, in the type of a field."""

    wanted: str  # the limit in words, as in "epochs=0 is not above 0"
    holds: Callable[[float], bool]  # True for a number within the limit


Positive = Annotated[N, Limit("above 0", lambda value: value > 0)]
NonNegative = Annotated[N, Limit("at least 0", lambda value: value >= 0)]
Rate = Annotated[float, Limit("at least 0 and below 1", lambda value: 0 <= value < 1)]
Side = Annotated[int, Limit(f"at least {MIN_INPUT_SIZE} pixels", lambda value: value >= MIN_INPUT_SIZE)]


def load_experiment(path: str | Path, changes: Sequence[str] = (), kind: type | None = None) -> Any:
    """Load the experiment of a Python file that defines `config`, which is executed, and change some of its fields.

    Changes are texts `key=value`, with the value as in Python; the quotes around a string may be omitted. `kind` is the
    class that the experiment must have; None for any.

    Raises:
        UserError: If the file holds no experiment, or a change names an unknown field or an invalid value.
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
            raise UserError(f"{path}: there is no such key: {unknown[1]}; configs/recipes.py lists them") from error
        if isinstance(error, SyntaxError) or traceback.extract_tb(error.__traceback__)[-1].filename == str(path):
            raise UserError(f"{path}: {type(error).__name__}: {one_line(error)}") from error
        raise  # not in the file itself: an internal error
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UserError(f"{path}: defines no experiment; its last line should set config by one of the recipes")
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
            raise UserError(f"--cfg-options {change!r} is not of the form key=value")
        if key not in hints:
            raise UserError(
                f"--cfg-options {key}: there is no such key; configs/recipes.py lists them{nearest(key, hints)}"
            )
        values[key] = _parse(text, hints[key])
    return dataclasses.replace(config, **values)


def check_fields(experiment: Any) -> None:
    """Raise a UserError if a field of a dataclass has a value of another type than declared or outside its limit.

    Ints in float fields become floats, and lists in tuple fields become tuples.
    """
    limited_hints = typing.get_type_hints(type(experiment), include_extras=True)
    for name, hint in typing.get_type_hints(type(experiment)).items():
        given = getattr(experiment, name)
        value = _as_type(given, hint)
        if value is NotImplemented:
            raise UserError(f"{name}={given!r} is {_describe_mismatch(name, given, hint)}")
        object.__setattr__(experiment, name, value)  # the dataclass is frozen
        for number, limit in _limits(value, limited_hints[name]):
            if not limit.holds(number):
                subject = f"{name}={value}" if number == value else f"{name}={value}: {number}"
                raise UserError(f"{subject} is not {limit.wanted}")


def _parse(text: str, hint: Any) -> Any:
    """Return the value of a text, as Python reads it, or the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return text if hint is str and not isinstance(value, str) else value  # a name may read like a number


def _as_type(value: Any, hint: Any) -> Any:
    """Return a value as a declared type, or `NotImplemented` if it is of another type."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return value if value in arguments else NotImplemented
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            return NotImplemented
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        items = [_as_type(item, kind) for item, kind in zip(value, kinds, strict=False)]
        return NotImplemented if len(value) != len(kinds) or NotImplemented in items else tuple(items)
    if hint is float and type(value) in (int, float):
        return float(value) if abs(value) <= sys.float_info.max else NotImplemented
    return value if type(value) is hint else NotImplemented


def _describe_mismatch(name: str, value: Any, hint: Any) -> str:
    """Return the second half of the message for a value of another type: what is wanted."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        own_data = next((kind for kind in ("folder", "coco") if name == "dataset" and kind in arguments), "")
        hint_to_own = f"; for your own data, choose {own_data}" if own_data else ""
        return f"unknown; choose {' or '.join(arguments)}{hint_to_own}"
    if not arguments:
        is_number = hint is float and type(value) in (int, float)
        return "not a finite number" if is_number else f"not of type {hint.__name__}"
    item = _parse(value, arguments[0]) if isinstance(value, str) else value
    if type(item) is int and typing.get_args(arguments[0]):  # for several tuples of numbers
        item = (item,) * len(typing.get_args(arguments[0]))
    if _as_type(item, arguments[0]) is NotImplemented:
        return f"not of type {hint}"
    if arguments[-1] is Ellipsis:
        return f"not of type {hint}; write one value as {name}={item},"
    return f"not of type {hint}; write it as {name}={','.join([str(item)] * len(arguments))}"


def _limits(value: Any, hint: Any) -> Iterator[tuple[float, Limit]]:
    """Iterate over the numbers of a field that have a limit, each with its limit."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        for limit in arguments[1:]:
            yield value, limit
    elif typing.get_origin(hint) is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        for item, kind in zip(value, kinds, strict=True):
            yield from _limits(item, kind)
