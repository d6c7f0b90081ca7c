"""Anchors, matching, heads and losses of the detectors: torchvision's, made to behave as the original's.

The published models were trained with another library. Each subclass here closes one difference between torchvision
and that library; "Differs from torchvision" describes it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, nms, remove_small_boxes, roi_align

RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors
PADDING = 32  # images are padded to multiples of this
MASK_THRESHOLD = 0.5

Target = dict[str, Tensor]


class Anchors(AnchorGenerator):
    """Differs from torchvision: sizes are not rounded, strides are fixed, and anchors are float32 whatever the maps.

    The strides of the levels are in pixels; the scales are ratios of a square anchor's side to the stride.
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
        if self.training:  # bool `(anchors,)` for each image: False for anchors on its padding
            self.inside = [self._inside(size, grids) for size in image_list.image_sizes]
        return [anchors] * len(image_list.image_sizes)

    def _inside(self, image_size: tuple[int, int], grids: list[torch.Size]) -> Tensor:
        """Return the anchors that belong to an image, bool `(anchors,)`; the others lie on the padding of the batch."""
        height, width = (math.ceil(side / PADDING) * PADDING for side in image_size)
        inside = []
        for (rows, columns), stride, count in zip(grids, self.strides, self.num_anchors_per_location(), strict=True):
            locations = torch.zeros(rows, columns, dtype=torch.bool, device=self.cell_anchors[0].device)
            locations[: math.ceil(height / stride), : math.ceil(width / stride)] = True
            inside.append(locations.flatten().repeat_interleave(count))
        return torch.cat(inside)


class SymmetricBoxCoder(BoxCoder):
    """Differs from torchvision: the log-ratios of box sides have a lower limit, too."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        codes = rel_codes.float().unflatten(1, (-1, 4))
        lowest = codes.new_tensor([-math.inf, -math.inf, *(-self.bbox_xform_clip * w for w in self.weights[2:])])
        return super().decode_single(codes.maximum(lowest).flatten(1), boxes)


class MaxIoUMatcher(Matcher):
    """Differs from torchvision: low-quality matches need a minimum IoU, and match the box that they are best for.

    An anchor is positive from an IoU of `high` on, or of `least` as the best of a box, and negative below `low`.
    """

    def __init__(self, high: float, low: float, least: float):
        super().__init__(high, low, allow_low_quality_matches=True)
        self.least = least

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        of_box = (match_quality_matrix == best) & (best >= self.least)  # (boxes, anchors)
        numbers = torch.arange(1, len(best) + 1, device=best.device)[:, None]
        last = (of_box * numbers).max(dim=0).values - 1  # the last of several boxes
        matches[last >= 0] = last[last >= 0]


def match_anchors(matcher: Matcher, boxes: Tensor, anchors: Tensor, inside: Tensor) -> Tensor:
    """Return the index of each anchor's box, `(anchors,)`: -1 for the background, -2 for an anchor that is ignored."""
    matches = torch.full((len(anchors),), Matcher.BETWEEN_THRESHOLDS, device=anchors.device)
    if len(boxes):
        matches[inside] = matcher(box_iou(boxes, anchors[inside]))
    else:
        matches[inside] = Matcher.BELOW_LOW_THRESHOLD
    return matches


def _boxes_of(target: Target, matches: Tensor) -> Tensor:
    """Return the matched boxes of a target; zeros if it has none."""
    boxes = target["boxes"]
    return boxes[matches] if len(boxes) else boxes.new_zeros(len(matches), 4)


def smaller(a: int, b: int) -> int:
    """Return the smaller of two integers, which may be symbolic in an export or a tensor in a trace."""
    if torch.jit.is_tracing():
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    return torch.sym_min(a, b)


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression within classes: return the indices of the boxes to keep, by descending scores.

    In an export, the boxes are shifted by class and suppressed together, because torchvision's choice between two
    methods by the number of boxes cannot be exported.
    """
    if not torch.compiler.is_exporting():
        return batched_nms(boxes, scores, classes, threshold)
    side = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1  # the zero is for images without boxes
    return nms(boxes + (classes * side)[:, None], scores, threshold)


class ProposalHead(RPNHead):
    """Returns float32 in mixed precision, too: in half precision, scores would tie and boxes would be coarse."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, codes = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in codes]


class BoxPredictor(FastRCNNPredictor):
    """Returns float32 in mixed precision, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, codes = super().forward(x)
        return logits.float(), codes.float()


class ProposalNetwork(RegionProposalNetwork):
    """Differs from torchvision: anchors on the padding are ignored, and the box loss is L1.

    The losses are divided by the number of samples, at least one positive and one negative per image.
    """

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: list[Target]):
        labels, matched_boxes = [], []
        for image_anchors, target, inside in zip(anchors, targets, self.anchor_generator.inside, strict=True):
            matches = match_anchors(self.proposal_matcher, target["boxes"], image_anchors, inside)
            label = (matches >= 0).float()
            label[matches == Matcher.BETWEEN_THRESHOLDS] = -1  # ignored
            labels.append(label)
            matched_boxes.append(_boxes_of(target, matches.clamp(min=0)))
        return labels, matched_boxes

    def filter_proposals(self, proposals, objectness, image_shapes, num_anchors_per_level):
        """Return the boxes and scores of each image after non-maximum suppression of the best anchors of each level.

        Differs from torchvision: boxes of any size and score are kept; `min_size` and `score_thresh` are not used.
        """
        boxes = proposals.split(num_anchors_per_level, dim=1)
        logits = objectness.detach().reshape(proposals.shape[0], -1).split(num_anchors_per_level, dim=1)
        best = [x.topk(smaller(self.pre_nms_top_n(), x.shape[1]), dim=1).indices for x in logits]
        levels = torch.cat([torch.full_like(index[0], level) for level, index in enumerate(best)])
        final_boxes, final_scores = [], []
        for image, size in enumerate(image_shapes):
            candidates = torch.cat([x[image, index[image]] for x, index in zip(boxes, best, strict=True)])
            candidates = clip_boxes_to_image(candidates, size)
            scores = torch.cat([x[image, index[image]] for x, index in zip(logits, best, strict=True)]).sigmoid()
            keep = suppress(candidates, scores, levels, self.nms_thresh)[: self.post_nms_top_n()]
            final_boxes.append(candidates[keep])
            final_scores.append(scores[keep])
        return final_boxes, final_scores

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
    """Differs from torchvision: boxes are aligned to pixel centres, sampling adapts to the box, strides are fixed."""

    strides = (4, 8, 16, 32)

    def __init__(self, size: int):
        super().__init__()
        self.output_size = (size, size)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list) -> Tensor:
        """Return the features of the boxes, `(N, channels, size, size)`, each from the level that fits its area."""
        all_boxes = torch.cat(boxes)
        images = torch.cat([torch.full_like(box[:, :1], i) for i, box in enumerate(boxes)])
        rois = torch.cat([images, all_boxes], dim=1)
        sides = ((all_boxes[:, 2] - all_boxes[:, 0]) * (all_boxes[:, 3] - all_boxes[:, 1])).sqrt()
        levels = torch.floor(torch.log2(sides / 56 + 1e-6)).clamp(0, len(self.strides) - 1)
        pooled = rois.new_zeros(rois.shape[0], features["0"].shape[1], *self.output_size)
        for level, stride in enumerate(self.strides):
            of_level = torch.where(levels == level)[0]
            x = features[str(level)].float()  # half precision would shift the boxes by pixels
            part = roi_align(x, rois[of_level], self.output_size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled = pooled.index_put((of_level,), part)
        return pooled.to(features["0"].dtype)


class TwinsRoIHeads(RoIHeads):
    """Differs from torchvision: matches and losses are the original's, and mask targets are binary."""

    def select_training_samples(self, proposals: list[Tensor], targets: list[Target]):
        """Match the proposals, add the true boxes to them, and draw samples."""
        matches, labels, boxes = [], [], []
        for proposal, target in zip(proposals, targets, strict=True):
            truth = target["boxes"]
            inside = torch.ones(len(proposal), dtype=torch.bool, device=proposal.device)
            match = match_anchors(self.proposal_matcher, truth, proposal, inside)
            match = torch.cat([match, torch.arange(len(truth), device=match.device)])
            label = torch.zeros_like(match)
            label[match >= 0] = target["labels"][match[match >= 0]]
            matches.append(match.clamp(min=0))
            labels.append(label)
            boxes.append(torch.cat([proposal, truth]))
        chosen = self.subsample(labels)
        boxes, matches, labels = (_select(values, chosen) for values in (boxes, matches, labels))
        matched = [_boxes_of(target, match) for target, match in zip(targets, matches, strict=True)]
        return boxes, matches, labels, self.box_coder.encode(matched, boxes)

    def postprocess_detections(self, class_logits, box_regression, proposals, image_shapes):
        """Return the boxes, scores and labels of each image."""
        numbers = [proposal.shape[0] for proposal in proposals]  # len() would be a constant in an export
        all_boxes = self.box_coder.decode_single(box_regression, torch.cat(proposals)).unflatten(1, (-1, 4))
        all_scores = class_logits.softmax(dim=1)
        found = []
        for boxes, scores, size in zip(all_boxes.split(numbers), all_scores.split(numbers), image_shapes, strict=True):
            found.append(self.select(clip_boxes_to_image(boxes, size), scores))
        return tuple(zip(*found, strict=True))

    def select(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the boxes, scores and labels that remain by the thresholds and non-maximum suppression.

        Each proposal has a box of each class, `(n, classes, 4)`, and scores `(n, classes)`; class 0 is the background.
        """
        candidates, labels = torch.where(scores[:, 1:] > self.score_thresh)
        boxes, scores, labels = boxes[candidates, labels + 1], scores[candidates, labels + 1], labels + 1
        wide = remove_small_boxes(boxes, min_size=1e-2)
        boxes, scores, labels = boxes[wide], scores[wide], labels[wide]
        keep = suppress(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        return boxes[keep], scores[keep], labels[keep]

    def forward(self, features, proposals, image_shapes, targets=None) -> tuple[list[Target], dict[str, Tensor]]:
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        boxes, matches, labels, wanted = self.select_training_samples(proposals, targets)
        logits, codes = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))
        losses = box_losses(logits, codes, torch.cat(labels), torch.cat(wanted))
        positive = [label > 0 for label in labels]
        boxes, matches, labels = (_select(values, positive) for values in (boxes, matches, labels))
        masks = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        truths = [
            crop_masks(target["masks"], box, match, masks.shape[-1])
            for target, box, match in zip(targets, boxes, matches, strict=True)
        ]
        return [], losses | {"loss_mask": mask_loss(masks.float(), torch.cat(labels), torch.cat(truths))}


def _select(values: list[Tensor], chosen: list[Tensor]) -> list[Tensor]:
    """Return the chosen samples of each image."""
    return [value[index] for value, index in zip(values, chosen, strict=True)]


def box_losses(logits: Tensor, codes: Tensor, labels: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Return the losses of the box head: cross-entropy of all samples, and L1 of those with a label above 0."""
    positive = torch.where(labels > 0)[0]
    found = codes.unflatten(1, (-1, 4))[positive, labels[positive]]
    return {
        "loss_classifier": F.cross_entropy(logits, labels),
        "loss_box_reg": F.l1_loss(found, wanted[positive], reduction="sum") / len(labels),
    }


def crop_masks(masks: Tensor, boxes: Tensor, matches: Tensor, size: int) -> Tensor:
    """Return each box's part of its matched mask `(n, H, W)`, resized and binary: `(boxes, size, size)`."""
    height, width = masks.shape[1:]
    masks = F.pad(masks, (0, -width % PADDING, 0, -height % PADDING))  # as the images are
    rois = torch.cat([matches[:, None].to(boxes), boxes], dim=1)
    parts = roi_align(masks[:, None].to(boxes), rois, (size, size), 1.0, sampling_ratio=0, aligned=True)
    return (parts[:, 0] >= MASK_THRESHOLD).to(boxes)


def mask_loss(logits: Tensor, labels: Tensor, truths: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of the masks of the true classes; 0 without objects."""
    if not len(labels):
        return logits.sum() * 0
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(labels), device=labels.device), labels], truths)
