"""Twins backbones of dense networks, with their ImageNet weights."""

import logging

import timm
import torch
from torch import nn

import models
from core.launch import one_line
from core.options import nearest
from utils import UserError

logger = logging.getLogger("twins")


HUB = "hub"  # in place of a file of ImageNet weights: the published ones on timm's hub


def build_backbone(name: str, pretrained: str, **kwargs) -> nn.Module:
    """Build a Twins model without its classifier, with ImageNet weights.

    Args:
        name: Of a model of `models/twins.py`. Those of Twins-SVT get the norms between stages that the original's
            dense networks have.
        pretrained: A file of weights, `"hub"` for the published ones, or nothing to start from random ones.
        **kwargs: Passed on to the model.

    Raises:
        UserError: If there is no such model, or the weights cannot be had or do not fit.
    """
    ours = models.list_models()
    if name not in ours:
        raise UserError(f"backbone {name!r} is unknown{nearest(name, ours) or '; known are ' + ', '.join(ours)}")
    backbone = timm.create_model(name, stage_norm=name.startswith("alt_gvt"), **kwargs)
    backbone.prune_intermediate_layers(len(backbone.blocks), prune_norm=True)
    if pretrained:
        state = _fetch_weights(name) if pretrained == HUB else models.read_weights(pretrained)
        logger.info("backbone from %s", models.load_backbone(backbone, state, source=pretrained))
    return backbone


def _fetch_weights(name: str) -> dict[str, torch.Tensor]:
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # timm and the hub raise many kinds of errors
        raise UserError(
            f"the published ImageNet weights of {name} cannot be loaded ({type(error).__name__}: {one_line(error)}); "
            "without a network, download the file elsewhere and pass --pretrained FILE, or start from random weights "
            'with --pretrained ""'
        ) from error
