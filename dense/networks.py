"""Twins backbones of the dense networks, with their ImageNet weights, and the weights of whole networks."""

import logging
from collections.abc import Callable
from pathlib import Path

import timm
from torch import Tensor, nn

import models
from core.launch import one_line
from core.options import nearest
from utils import UserError

logger = logging.getLogger("twins")

HUB = "hub"  # instead of a file: the published ImageNet weights on timm's hub
UNUSED = ("backbone.norm.", "backbone.head.")  # the classifier, which the released files still hold


def build_backbone(name: str, pretrained: str, **kwargs) -> nn.Module:
    """Build a Twins model without its classifier; `kwargs` are arguments of the model.

    Twins-SVT models get norms between their stages, as in the original's dense networks. `pretrained` is a file of
    ImageNet weights, `"hub"` for the published ones, or `""` for random weights.

    Raises:
        UserError: If there is no such model, or the published weights cannot be loaded.
        TwinsError: If the file cannot be read or does not fit the model.
    """
    known = models.list_models()
    if name not in known:
        raise UserError(f"backbone {name!r} is unknown{nearest(name, known) or '; choose one of ' + ', '.join(known)}")
    backbone = timm.create_model(name, stage_norm=name.startswith("alt_gvt"), **kwargs)
    backbone.prune_intermediate_layers(len(backbone.blocks), prune_norm=True)
    if pretrained:
        state = _fetch_weights(name) if pretrained == HUB else models.read_weights(pretrained)
        logger.info("backbone from %s", models.load_backbone(backbone, state, source=pretrained))
    return backbone


def _fetch_weights(name: str) -> dict[str, Tensor]:
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # timm and the hub raise many kinds of errors
        raise UserError(
            f"the published ImageNet weights of {name} cannot be loaded ({type(error).__name__}: {one_line(error)}); "
            "without a network, download the file elsewhere and pass --pretrained FILE, or start from random weights "
            'with --pretrained ""'
        ) from error


def load_network(
    model: nn.Module,
    path: str | Path,
    *,
    kind: str,
    finetune: bool = False,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> models.LoadReport:
    """Load the weights of a whole network of some `kind`, our own or released ones, strictly.

    With `finetune`, heads for other classes keep their initial weights. `convert` is a function that returns the
    weights of a file with our names.

    Raises:
        TwinsError: If the file cannot be read or does not fit the network, which is then unchanged.
        UserError: If the file does not hold a whole network.
    """
    weights = models.read_weights(path)
    if not any(name.startswith("backbone.") for name in weights):
        raise UserError(f"{path}: does not hold a {kind}; pass weights of a backbone with --pretrained")
    used = {name: tensor for name, tensor in weights.items() if not name.startswith(UNUSED)}
    report = models.load_state_dict(model, convert(used), source=str(path), finetune=finetune)
    report.skipped += [name for name in weights if name not in used]
    return report
