"""Loading the weights of detectors: our own, and those in the format of the original's library."""

import re
from functools import partial

import torch
from torch import Tensor

from dense.networks import load_network

# Names in the released files -> ours, which are torchvision's.
RENAMED = {
    r"backbone\.": "backbone.body.",
    r"neck\.lateral_convs\.(\d)\.conv\.": r"backbone.fpn.inner_blocks.\1.0.",
    r"neck\.fpn_convs\.(\d)\.conv\.": r"backbone.fpn.layer_blocks.\1.0.",
    r"bbox_head\.cls_convs\.(\d)\.conv\.": r"head.classification_head.conv.\1.0.",
    r"bbox_head\.reg_convs\.(\d)\.conv\.": r"head.regression_head.conv.\1.0.",
    r"bbox_head\.retina_cls\.": "head.classification_head.cls_logits.",
    r"bbox_head\.retina_reg\.": "head.regression_head.bbox_reg.",
    r"rpn_head\.rpn_conv\.": "rpn.head.conv.0.0.",
    r"rpn_head\.rpn_cls\.": "rpn.head.cls_logits.",
    r"rpn_head\.rpn_reg\.": "rpn.head.bbox_pred.",
    r"roi_head\.bbox_head\.shared_fcs\.0\.": "roi_heads.box_head.fc6.",
    r"roi_head\.bbox_head\.shared_fcs\.1\.": "roi_heads.box_head.fc7.",
    r"roi_head\.bbox_head\.fc_cls\.": "roi_heads.box_predictor.cls_score.",
    r"roi_head\.bbox_head\.fc_reg\.": "roi_heads.box_predictor.bbox_pred.",
    r"roi_head\.mask_head\.convs\.(\d)\.conv\.": r"roi_heads.mask_head.\1.0.",
    r"roi_head\.mask_head\.upsample\.": "roi_heads.mask_predictor.conv5_mask.",
    r"roi_head\.mask_head\.conv_logits\.": "roi_heads.mask_predictor.mask_fcn_logits.",
}
# The original numbers the extra levels of RetinaNet's pyramid like its other levels.
RETINANET_RENAMED = {
    r"neck\.fpn_convs\.3\.conv\.": "backbone.fpn.extra_blocks.p6.",
    r"neck\.fpn_convs\.4\.conv\.": "backbone.fpn.extra_blocks.p7.",
    **RENAMED,
}


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return released weights in full precision, with our names and the background as the first class; ours as is."""
    if not any(name.startswith("neck.") for name in weights):
        return weights
    table = RETINANET_RENAMED if "bbox_head.retina_cls.weight" in weights else RENAMED
    converted = {}
    for name, tensor in weights.items():
        ours = next((re.sub(old, new, name) for old, new in table.items() if re.match(old, name)), name)
        converted[ours] = _background_first(ours, tensor.float() if tensor.is_floating_point() else tensor)
    return converted


def _background_first(name: str, tensor: Tensor) -> Tensor:
    """Move the background to the front of the classes, or add it where the original has none."""
    if ".cls_score." in name:
        return torch.cat([tensor[-1:], tensor[:-1]])
    rows = {".bbox_pred.": 4, ".mask_fcn_logits.": 1}
    added = next((count for part, count in rows.items() if part in name and name.startswith("roi_heads.")), 0)
    return torch.cat([tensor.new_zeros(added, *tensor.shape[1:]), tensor]) if added else tensor


load_detector = partial(load_network, kind="detector", convert=convert)
