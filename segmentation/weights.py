"""Weights of segmentation networks: ours, and the released ones."""

from pathlib import Path

from models import LoadReport, load_state_dict, read_weights
from segmentation.network import Segmentor
from utils import UserError

UNUSED_WEIGHTS = ("backbone.norm.", "backbone.head.")  # the classifier that the released files still carry


def load_segmentor(model: Segmentor, path: str | Path, finetune: bool = False) -> LoadReport:
    """Load the weights of a whole network, of ours or as released, strictly.

    With `finetune` heads for other classes stay as they were initialised.

    Raises:
        UserError: If the file cannot be read or does not fit the network, which is then unchanged.
    """
    weights = read_weights(path)
    if not any(name.startswith("backbone.") for name in weights):
        raise UserError(f"{path}: holds no segmentation network; weights of a backbone alone are for --pretrained")
    state = {name: tensor for name, tensor in weights.items() if not name.startswith(UNUSED_WEIGHTS)}
    report = load_state_dict(model, state, source=str(path), finetune=finetune)
    report.skipped += [name for name in weights if name not in state]
    return report
