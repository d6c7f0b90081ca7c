"""Entry points for torch.hub: the classifiers by their names, and the predictor of predict.py.

    model = torch.hub.load("path/to/this/repository", "alt_gvt_small", source="local", pretrained=True)
    predictor = torch.hub.load("owner/repository", "predictor", "checkpoint_best.pth")

The arguments of a classifier are those of timm's `create_model`.
"""

from models.twins import (  # noqa: F401  torch.hub finds them here
    alt_gvt_base,
    alt_gvt_large,
    alt_gvt_small,
    alt_gvt_tiny,
    pcpvt_base,
    pcpvt_large,
    pcpvt_small,
    pcpvt_tiny,
)
from predict import load_predictor as predictor  # noqa: F401

dependencies = ["torch", "torchvision", "timm"]  # for a message of torch.hub that names a missing one
