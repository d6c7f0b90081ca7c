"""RetinaNet and Mask R-CNN of torchvision with Twins backbones, made to behave exactly as the published ones.

The networks are torchvision's, with its names of parameters. Each small subclass here closes one difference to the
library that the published models were trained with. Labels are 0 to classes - 1 in both networks; images are uint8 or
0 to 1, `(3, H, W)`, of any sizes.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import (
    FeaturePyramidNetwork,
    batched_nms,
    box_iou,
    clip_boxes_to_image,
    roi_align,
    sigmoid_focal_loss,
)
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from core.images import fitted_size, resize_image
from dense.networks import build_backbone
from detection.configs.recipes import Experiment
from transforms import STATISTICS, normalise

RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors
PADDING = 32  # images are padded to multiples of this
MASK_THRESHOLD = 0.5

Target = dict[str, Tensor]


def build_detector(experiment: Experiment, num_classes: int, pretrained: bool) -> nn.Module:
    """Build the detector of an experiment; its backbone with ImageNet weights if `pretrained`.

    Raises:
        UserError: If there is no such backbone, or its weights cannot be had or do not fit.
    """
    weights = experiment.pretrained if pretrained else ""
    # Zeros around the map take part in the attention of windows, as they did when the published models were trained.
    body = build_backbone(experiment.backbone, weights, drop_path_rate=experiment.drop_path, window_padding="zero")
    if experiment.detector == "retinanet":
        return TwinsRetinaNet(body, num_classes, experiment.scale, experiment.channels, experiment.head_std)
    sizes = experiment.channels, experiment.proposals, experiment.roi_samples
    return TwinsMaskRCNN(body, num_classes, experiment.scale, *sizes)


# -------------------------------------------------------------------------------------------- backbone and pyramid


class TwinsFPN(nn.Module):
    """A Twins backbone and a feature pyramid: images `(B, 3, H, W)` -> maps `(B, channels, H / s, W / s)`.

    Args:
        body: From `dense.build_backbone`.
        first: The finest stage that the pyramid sees, from 0.
        extra: Adds coarser levels.
        channels: Of the maps.
    """

    def __init__(self, body: nn.Module, first: int, extra: ExtraFPNBlock, channels: int):
        super().__init__()
        self.body = body
        self.first = first
        self.fpn = FeaturePyramidNetwork(list(body.embed_dims[first:]), channels, extra)
        self.out_channels = channels
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):  # Differs from torchvision: Xavier, as the published models
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body.forward_intermediates(images, intermediates_only=True)[self.first :]
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.body.set_grad_checkpointing(enable)


class LevelsP6P7(ExtraFPNBlock):
    """Differs from torchvision: P6 always comes from C5, and there is no ReLU before P7."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


# --------------------------------------------------------------------------------------------------- shared parts


class Transform(GeneralizedRCNNTransform):
    """Normalisation, padding, and in evaluation the resizing of images and what is found in them.

    Differs from torchvision: training images come in their size from the data set; sides are rounded to the nearest
    pixel, not down; bytes are taken, too; masks are pasted by interpolation between the centres of pixels.
    """

    def __init__(self, scale: tuple[int, int]):
        longer, shorter = max(scale), min(scale)
        super().__init__(shorter, longer, *STATISTICS, PADDING)

    def normalize(self, image: Tensor) -> Tensor:
        return normalise(image)

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        if self.training:
            return image, target
        size = fitted_size(image.shape[1:], (self.max_size, self.min_size[0]))
        return resize_image(image, size), target

    def postprocess(self, result: list[Target], image_shapes: list, original_image_sizes: list) -> list[Target]:
        if not self.training:
            for found, (h, w), (height, width) in zip(result, image_shapes, original_image_sizes, strict=True):
                found["boxes"] = found["boxes"] * found["boxes"].new_tensor([width / w, height / h] * 2)
                if "masks" in found:
                    found["masks"] = paste_masks(found["masks"][:, 0], found["boxes"], height, width)
        return result


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Return masks `(N, m, m)`, probabilities within boxes `(N, 4)`, as bool masks `(N, height, width)`."""
    pasted = masks.new_zeros((len(masks), height, width), dtype=torch.bool)
    for mask, box, whole in zip(masks, boxes, pasted, strict=True):
        left, top = (max(0, int(side) - 1) for side in box[:2].floor().tolist())
        right, bottom = (
            min(int(side) + 1, end) for side, end in zip(box[2:].ceil().tolist(), (width, height), strict=True)
        )
        if right <= left or bottom <= top:
            continue
        x = (torch.arange(left, right, device=box.device) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (torch.arange(top, bottom, device=box.device) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)  # (h, w, 2)
        part = F.grid_sample(mask[None, None].float(), grid[None], align_corners=False)[0, 0]
        whole[top:bottom, left:right] = part >= MASK_THRESHOLD
    return pasted


class Anchors(AnchorGenerator):
    """Differs from torchvision: sizes are not rounded, strides are fixed, and anchors are float32 whatever the maps.

    Args:
        strides: Of the levels, in pixels.
        scales: Sides of the square anchors over the stride.

    Attributes:
        inside: Of the last batch, for each image which anchors belong to it and not to the padding of the batch.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float]):
        self.strides = strides
        super().__init__([[stride * scale for scale in scales] for stride in strides], [RATIOS] * len(strides))

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu") -> Tensor:
        heights = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        sizes = torch.tensor(scales, dtype=dtype, device=device)[None]
        widths, heights = (sizes / heights).flatten(), (sizes * heights).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [x.shape[-2:] for x in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [[stride, stride] for stride in self.strides]))
        self.inside = [self._inside(size, grids) for size in image_list.image_sizes]
        return [anchors] * len(image_list.image_sizes)

    def _inside(self, image_size: tuple[int, int], grids: list[torch.Size]) -> Tensor:
        """Tell which anchors belong to an image, bool `(anchors,)`; the others lie on the padding of the batch."""
        height, width = (math.ceil(side / PADDING) * PADDING for side in image_size)
        inside = []
        for (rows, columns), stride, each in zip(grids, self.strides, self.num_anchors_per_location(), strict=True):
            places = torch.zeros(rows, columns, dtype=torch.bool, device=self.cell_anchors[0].device)
            places[: math.ceil(height / stride), : math.ceil(width / stride)] = True
            inside.append(places.flatten().repeat_interleave(each))
        return torch.cat(inside)


class SymmetricBoxCoder(BoxCoder):
    """Differs from torchvision: logarithms of sides are limited on both sides."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        codes = rel_codes.float().unflatten(1, (-1, 4))
        lowest = codes.new_tensor([-math.inf, -math.inf, *(-self.bbox_xform_clip * w for w in self.weights[2:])])
        return super().decode_single(codes.maximum(lowest).flatten(1), boxes)


class MaxIoUMatcher(Matcher):
    """Differs from torchvision: low-quality matches need a least IoU and go to the very box whose best they are.

    Args:
        high, low: IoU from which an anchor is positive, and below which it is negative.
        least: IoU from which the best anchors of a box are positive.
    """

    def __init__(self, high: float, low: float, least: float):
        super().__init__(high, low, allow_low_quality_matches=True)
        self.least = least

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        of_box = (match_quality_matrix == best) & (best >= self.least)  # (boxes, anchors)
        numbers = torch.arange(1, len(best) + 1, device=best.device)[:, None]
        last = (of_box * numbers).max(dim=0).values - 1  # of several boxes the last one
        matches[last >= 0] = last[last >= 0]


def match_anchors(matcher: Matcher, boxes: Tensor, anchors: Tensor, inside: Tensor) -> Tensor:
    """Return for each anchor the index of its box, -1 for none, -2 where it does not count."""
    matches = torch.full((len(anchors),), Matcher.BETWEEN_THRESHOLDS, device=anchors.device)
    if len(boxes):
        matches[inside] = matcher(box_iou(boxes, anchors[inside]))
    else:
        matches[inside] = Matcher.BELOW_LOW_THRESHOLD
    return matches


# ------------------------------------------------------------------------------------------------------ RetinaNet


class CompiledBackbone:
    """A detector of which `compile` compiles the backbone alone: the rest works on lists of any lengths and sizes."""

    def compile(self, *args, **kwargs) -> None:
        self.backbone.compile(*args, **kwargs)


class TwinsRetinaNet(CompiledBackbone, RetinaNet):
    """RetinaNet (https://arxiv.org/abs/1708.02002) on the levels P3 to P7."""

    pretrained_cfg = {"classifier": "head.classification_head.cls_logits"}  # noqa: RUF012  see models.load_state_dict

    def __init__(
        self,
        body: nn.Module,
        num_classes: int,
        scale: tuple[int, int],
        channels: int = 256,
        head_std: float = 0.01,
    ):
        levels = LevelsP6P7(body.embed_dims[-1], channels)
        super().__init__(
            TwinsFPN(body, first=1, extra=levels, channels=channels),
            num_classes,
            anchor_generator=Anchors((8, 16, 32, 64, 128), [4 * 2 ** (i / 3) for i in range(3)]),
            proposal_matcher=MaxIoUMatcher(0.5, 0.4, least=0.0),
            detections_per_img=100,
        )
        self.transform = Transform(scale)
        self.box_coder = SymmetricBoxCoder((1.0, 1.0, 1.0, 1.0))
        for head in (self.head.classification_head, self.head.regression_head):
            for layer in head.conv.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=head_std)

    def compute_loss(self, targets: list[Target], head_outputs: dict[str, Tensor], anchors: list[Tensor]) -> dict:
        """Differs from torchvision: sums over the batch over all its positives; padding counts for nothing."""
        logits, codes = head_outputs["cls_logits"].float(), head_outputs["bbox_regression"].float()
        matches = [
            match_anchors(self.proposal_matcher, target["boxes"], each, inside)
            for target, each, inside in zip(targets, anchors, self.anchor_generator.inside, strict=True)
        ]
        positives = sum((match >= 0).sum().clamp(min=1) for match in matches)
        classification = box_regression = 0.0
        for target, match, each, logit, code in zip(targets, matches, anchors, logits, codes, strict=True):
            positive, counted = match >= 0, match != Matcher.BETWEEN_THRESHOLDS
            truth = torch.zeros_like(logit)
            truth[positive, target["labels"][match[positive]]] = 1
            classification += sigmoid_focal_loss(logit[counted], truth[counted], reduction="sum")
            wanted = self.box_coder.encode_single(target["boxes"][match[positive]], each[positive])
            box_regression += F.l1_loss(code[positive], wanted, reduction="sum")
        return {"classification": classification / positives, "bbox_regression": box_regression / positives}

    def postprocess_detections(self, head_outputs, anchors, image_shapes) -> list[Target]:
        """Differs from torchvision: of each level the 1000 anchors whose best class scores highest."""
        detections = []
        for index, size in enumerate(image_shapes):
            boxes, scores = [], []
            levels = zip(head_outputs["cls_logits"], head_outputs["bbox_regression"], anchors[index], strict=True)
            for logits, codes, level_anchors in levels:
                probabilities = logits[index].float().sigmoid()  # (anchors, classes)
                count = min(self.topk_candidates, len(probabilities))
                best = probabilities.max(dim=1).values.topk(count).indices
                boxes.append(self.box_coder.decode_single(codes[index][best], level_anchors[best]))
                scores.append(probabilities[best])
            boxes, scores = clip_boxes_to_image(torch.cat(boxes), size), torch.cat(scores)
            candidates, labels = torch.where(scores > self.score_thresh)
            boxes, scores = boxes[candidates], scores[candidates, labels]
            keep = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            detections.append({"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]})
        return detections


# ----------------------------------------------------------------------------------------------------- Mask R-CNN


class ProposalHead(RPNHead):
    """Gives float32 in mixed precision, too, where scores would tie and boxes be coarse."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return tuple([each.float() for each in maps] for maps in super().forward(x))


class BoxPredictor(FastRCNNPredictor):
    """Gives float32 in mixed precision, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(each.float() for each in super().forward(x))


class ProposalNetwork(RegionProposalNetwork):
    """Differs from torchvision: padding counts for nothing, L1 loss, and each image counts for a positive at least."""

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: list[Target]):
        labels, matched_boxes = [], []
        for each, target, inside in zip(anchors, targets, self.anchor_generator.inside, strict=True):
            matches = match_anchors(self.proposal_matcher, target["boxes"], each, inside)
            label = (matches >= 0).float()
            label[matches == Matcher.BETWEEN_THRESHOLDS] = -1  # does not count
            labels.append(label)
            boxes = target["boxes"] if len(target["boxes"]) else each.new_zeros(1, 4)
            matched_boxes.append(boxes[matches.clamp(min=0)])
        return labels, matched_boxes

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets) -> tuple[Tensor, Tensor]:
        positive, negative = self.fg_bg_sampler(labels)
        divisor = sum(chosen.sum().clamp(min=1) for chosen in (*positive, *negative))
        positive, negative = (torch.cat(chosen).bool() for chosen in (positive, negative))
        chosen = positive | negative
        wanted = torch.cat(regression_targets)[positive]
        box_loss = F.l1_loss(pred_bbox_deltas[positive], wanted, reduction="sum") / divisor
        logits, truth = objectness.flatten()[chosen], torch.cat(labels)[chosen]
        return F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / divisor, box_loss


class RoIPool(nn.Module):
    """Differs from torchvision: aligned to the centres of pixels, all pixels of a bin count, and strides are fixed.

    Args:
        size: Bins a side.
    """

    strides = (4, 8, 16, 32)

    def __init__(self, size: int):
        super().__init__()
        self.output_size = (size, size)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list) -> Tensor:
        """Return the features of boxes `(N, channels, size, size)`, each from the level that fits its area."""
        together = torch.cat(boxes)
        images = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
        rois = torch.cat([images, together], dim=1)
        sides = ((together[:, 2] - together[:, 0]) * (together[:, 3] - together[:, 1])).sqrt()
        levels = torch.floor(torch.log2(sides / 56 + 1e-6)).clamp(0, len(self.strides) - 1)
        pooled = rois.new_zeros(len(rois), features["0"].shape[1], *self.output_size)
        for level, stride in enumerate(self.strides):
            of_level = torch.where(levels == level)[0]
            x = features[str(level)].float()  # and the boxes, which half precision would move by pixels
            part = roi_align(x, rois[of_level], self.output_size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled = pooled.index_put((of_level,), part)
        return pooled.to(features["0"].dtype)


class TwinsRoIHeads(RoIHeads):
    """Differs from torchvision: matches and losses as in the original, and masks that are binary targets."""

    def select_training_samples(self, proposals: list[Tensor], targets: list[Target]):
        """Match the proposals, add the true boxes and draw samples of both."""
        matches, labels, boxes = [], [], []
        for proposal, target in zip(proposals, targets, strict=True):
            truth = target["boxes"]
            everything = torch.ones(len(proposal), dtype=torch.bool, device=proposal.device)
            match = match_anchors(self.proposal_matcher, truth, proposal, everything)
            match = torch.cat([match, torch.arange(len(truth), device=match.device)])
            label = torch.zeros_like(match)
            label[match >= 0] = target["labels"][match[match >= 0]]
            matches.append(match.clamp(min=0))
            labels.append(label)
            boxes.append(torch.cat([proposal, truth]))
        chosen = self.subsample(labels)
        boxes, matches, labels = (
            [each[i] for each, i in zip(values, chosen, strict=True)] for values in (boxes, matches, labels)
        )
        truths = [
            target["boxes"] if len(target["boxes"]) else box.new_zeros(1, 4)
            for target, box in zip(targets, boxes, strict=True)
        ]
        wanted = self.box_coder.encode([truth[match] for truth, match in zip(truths, matches, strict=True)], boxes)
        return boxes, matches, labels, wanted

    def forward(self, features, proposals, image_shapes, targets=None) -> tuple[list[Target], dict[str, Tensor]]:
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        boxes, matches, labels, wanted = self.select_training_samples(proposals, targets)
        logits, codes = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))
        losses = box_losses(logits, codes, torch.cat(labels), torch.cat(wanted))
        positive = [label > 0 for label in labels]
        boxes, matches, labels = (
            [each[i] for each, i in zip(values, positive, strict=True)] for values in (boxes, matches, labels)
        )
        masks = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        truths = [
            crop_masks(target["masks"], box, match, masks.shape[-1])
            for target, box, match in zip(targets, boxes, matches, strict=True)
        ]
        return [], losses | {"loss_mask": mask_loss(masks.float(), torch.cat(labels), torch.cat(truths))}


def box_losses(logits: Tensor, codes: Tensor, labels: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Return cross-entropy and L1 over all samples, of which those with a label above 0 have a box."""
    positive = torch.where(labels > 0)[0]
    found = codes.unflatten(1, (-1, 4))[positive, labels[positive]]
    return {
        "loss_classifier": F.cross_entropy(logits, labels),
        "loss_box_reg": F.l1_loss(found, wanted[positive], reduction="sum") / len(labels),
    }


def crop_masks(masks: Tensor, boxes: Tensor, matches: Tensor, size: int) -> Tensor:
    """Return the part of a mask `(n, H, W)` in each box, at `(size, size)` pixels, 0 or 1: `(boxes, size, size)`."""
    height, width = masks.shape[1:]
    masks = F.pad(masks, (0, -width % PADDING, 0, -height % PADDING))  # as the images are
    rois = torch.cat([matches[:, None].to(boxes), boxes], dim=1)
    parts = roi_align(masks[:, None].to(boxes), rois, (size, size), 1.0, sampling_ratio=0, aligned=True)
    return (parts[:, 0] >= MASK_THRESHOLD).to(boxes)


def mask_loss(logits: Tensor, labels: Tensor, truths: Tensor) -> Tensor:
    """Return the mean cross-entropy of the masks of the true classes; 0 where there is no object."""
    if not len(labels):
        return logits.sum() * 0
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(labels), device=labels.device), labels], truths)


class TwinsMaskRCNN(CompiledBackbone, GeneralizedRCNN):
    """Mask R-CNN (https://arxiv.org/abs/1703.06870) on the levels P2 to P6."""

    # What depends on the classes, for `models.load_state_dict` to leave as it is where they are others.
    pretrained_cfg = {  # noqa: RUF012
        "classifier": tuple(
            f"roi_heads.{name}"
            for name in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
        )
    }

    def __init__(
        self,
        body: nn.Module,
        num_classes: int,
        scale: tuple[int, int],
        channels: int = 256,
        proposals: int = 1000,
        roi_samples: int = 512,
    ):
        anchors = Anchors((4, 8, 16, 32, 64), [8])
        rpn = ProposalNetwork(
            anchors,
            ProposalHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * proposals, "testing": proposals},
            post_nms_top_n={"training": proposals, "testing": proposals},
            nms_thresh=0.7,
        )
        rpn.min_size = 0
        rpn.proposal_matcher = MaxIoUMatcher(0.7, 0.3, least=0.3)
        rpn.box_coder = SymmetricBoxCoder((1.0, 1.0, 1.0, 1.0))
        classes = num_classes + 1  # class 0 is the background
        roi_heads = TwinsRoIHeads(
            RoIPool(7),
            TwoMLPHead(channels * 7**2, 1024),
            BoxPredictor(1024, classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=roi_samples,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_roi_pool=RoIPool(14),
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, dilation=1),
            mask_predictor=MaskRCNNPredictor(channels, channels, classes),
        )
        roi_heads.proposal_matcher = MaxIoUMatcher(0.5, 0.5, least=0.5)
        roi_heads.box_coder = SymmetricBoxCoder((10.0, 10.0, 5.0, 5.0))
        backbone = TwinsFPN(body, first=0, extra=LastLevelMaxPool(), channels=channels)
        super().__init__(backbone, rpn, roi_heads, Transform(scale))
        self._initialise()

    def _initialise(self) -> None:
        """Differs from torchvision: the initial weights of the heads are those of the original."""
        head, predictor = self.roi_heads.box_head, self.roi_heads.box_predictor
        for layer in (head.fc6, head.fc7):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(predictor.cls_score.weight, std=0.01)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
        last = self.roi_heads.mask_predictor
        for layer in (
            head.fc6,
            head.fc7,
            predictor.cls_score,
            predictor.bbox_pred,
            last.conv5_mask,
            last.mask_fcn_logits,
        ):
            nn.init.zeros_(layer.bias)

    def forward(self, images: list[Tensor], targets: list[Target] | None = None):
        """Return losses in training, detections in evaluation, both with labels from 0 on."""
        if self.training:
            return super().forward(images, [{**target, "labels": target["labels"] + 1} for target in targets])
        return [{**found, "labels": found["labels"] - 1} for found in super().forward(images)]
