"""Loading the weights of segmentation networks: our own, and the released ones."""

from pathlib import Path

from models import LoadReport, load_state_dict, read_weights
from segmentation.network import Segmentor
from utils import UserError

UNUSED_WEIGHTS = ("backbone.norm.", "backbone.head.")  # the classifier, which the released files still hold


def load_segmentor(model: Segmentor, path: str | Path, finetune: bool = False) -> LoadReport:
    """Load the weights of a whole network, our own or released ones, strictly.

    Args:
        model: The network.
        path: File of the weights.
        finetune: True to keep the initial weights of heads for other classes.

    Raises:
        TwinsError: If the file cannot be read or does not fit the network, which is then unchanged.
        UserError: If the file does not hold a segmentation network.
    """
    weights = read_weights(path)
    if not any(name.startswith("backbone.") for name in weights):
        raise UserError(f"{path}: does not hold a segmentation network; pass weights of a backbone with --pretrained")
    state = {name: tensor for name, tensor in weights.items() if not name.startswith(UNUSED_WEIGHTS)}
    report = load_state_dict(model, state, source=str(path), finetune=finetune)
    report.skipped += [name for name in weights if name not in state]
    return report
