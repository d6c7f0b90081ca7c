"""Twins models. Importing this package registers them with timm's `create_model`."""

import timm

from .twins import Twins, TwinsError
from .weights import LoadReport, load_backbone, load_state_dict, load_weights, read_file, read_weights

__all__ = [
    "LoadReport",
    "Twins",
    "TwinsError",
    "list_models",
    "load_backbone",
    "load_state_dict",
    "load_weights",
    "read_file",
    "read_weights",
]


def list_models() -> list[str]:
    """Return the names of the models of this package, for timm's `create_model`."""
    return [name for name in timm.list_models(module="twins") if not name.startswith("twins_")]
