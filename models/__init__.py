"""Twins models: importing this package registers them with timm's `create_model`."""

from models.twins import Twins
from models.weights import LoadReport, load_backbone, load_state_dict, load_weights, read_file, read_weights

__all__ = ["LoadReport", "Twins", "load_backbone", "load_state_dict", "load_weights", "read_file", "read_weights"]
