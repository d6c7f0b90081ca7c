"""Anchors, matching, heads and losses of the detectors: torchvision's, made to behave as the original's.

The published models were trained with another library. Each subclass here closes one difference between torchvision
and that library; "Differs from torchvision" describes it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, nms, remove_small_boxes, roi_align

RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors
PADDING = 32  # images are padded to multiples of this
MASK_THRESHOLD = 0.5
SHIFTED_VALUES = 100_000  # torchvision's limit of the coordinates of boxes that are shifted by class
BACKGROUND, IGNORED = -1, -2  # of anchors, in place of the index of a box

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
            x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2).unbind(1)  # multiples of a stride, but for rounding
            sizes = [[math.ceil(side / PADDING) * PADDING for side in size] for size in image_list.image_sizes]
            self.inside = [(x < width - 1) & (y < height - 1) for height, width in sizes]
        return [anchors] * len(image_list.image_sizes)


class SymmetricBoxCoder(BoxCoder):
    """Differs from torchvision: the log-ratios of box sides have a lower limit, too; x and y have the same weight."""

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        true_centres, true_sides = _centres_and_sides(reference_boxes)
        centres, sides = _centres_and_sides(proposals)
        shifts = self.weights[0] * (true_centres - centres) / sides
        return torch.cat([shifts, self.weights[2] * torch.log(true_sides / sides)], dim=1)

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        centres, sides = _centres_and_sides(boxes.float()[:, None])
        shifts, ratios = rel_codes.float().unflatten(1, (-1, 4)).split(2, dim=2)
        centres = shifts / self.weights[0] * sides + centres
        limit = self.bbox_xform_clip
        halves = (ratios / self.weights[2]).clamp(-limit, limit).exp() * sides * 0.5
        return torch.cat([centres - halves, centres + halves], dim=2).flatten(1)


def _centres_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centres and the sides of boxes `(..., 4)`, both `(..., 2)`."""
    first, last = boxes.split(2, dim=-1)
    sides = last - first
    return first + 0.5 * sides, sides


class MaxIoUMatcher:
    """Differs from torchvision: low-quality matches need a minimum IoU, and match the box that they are best for.

    An anchor is positive from an IoU of `high` on, or of `least` as the best of a box, and negative below `low`.
    """

    def __init__(self, high: float, low: float, least: float):
        self.high, self.low, self.least = high, low, least

    def __call__(self, boxes: Tensor, anchors: Tensor, inside: Tensor | None = None) -> Tensor:
        """Return the index of each anchor's box, `(anchors,)`: BACKGROUND or, if it is not `inside`, too, IGNORED."""
        if inside is not None:
            matches = self(boxes, anchors * inside[:, None])  # an empty anchor overlaps no box
            return torch.where(inside, matches, IGNORED)
        if not len(boxes):
            return torch.full((len(anchors),), BACKGROUND, device=anchors.device)
        overlaps = box_iou(boxes, anchors)
        best = overlaps.amax(dim=1, keepdim=True)
        best.masked_fill_(best < self.least, math.inf)  # which no anchor has
        ranks = torch.arange(2.0, 2.0 + len(boxes), device=boxes.device)[:, None]  # above any IoU: the last box wins
        highest, matches = torch.where(overlaps == best, ranks, overlaps).max(dim=0)
        return matches.masked_fill_(highest < self.high, IGNORED).masked_fill_(highest < self.low, BACKGROUND)


def of_boxes(values: Tensor, matches: Tensor) -> Tensor:
    """Return the values `(boxes, ...)` of matched boxes, `(n, ...)`; zeros if there are no boxes."""
    return values[matches.clamp(min=0)] if len(values) else values.new_zeros(len(matches), *values.shape[1:])


class Sampler(BalancedPositiveNegativeSampler):
    """Draws the same samples as torchvision, but returns their indices, and waits for the device once per batch."""

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the indices of the positives and of the negatives drawn from each image, in the concatenated labels.

        Labels `(n_i,)` are above 0 for positives, 0 for negatives, and below 0 for what is not drawn.
        """
        sizes, labels = [len(label) for label in labels], torch.cat(labels)
        masks = labels > 0, labels == 0
        counts = torch.stack([part.sum() for mask in masks for part in mask.split(sizes)]).view(2, -1).tolist()
        positive, negative = (
            torch.nonzero_static(mask, size=sum(count))[:, 0].split(count)
            for mask, count in zip(masks, counts, strict=True)
        )
        drawn = [], []
        for positive_index, negative_index in zip(positive, negative, strict=True):
            drawn[0].append(_draw(positive_index, int(self.batch_size_per_image * self.positive_fraction)))
            drawn[1].append(_draw(negative_index, self.batch_size_per_image - len(drawn[0][-1])))
        return drawn


def _draw(values: Tensor, count: int) -> Tensor:
    """Return at most `count` of the values in random order."""
    return values[torch.randperm(len(values), device=values.device)[:count]]


def smaller(a: int, b: int) -> int:
    """Return the smaller of two integers, which may be symbolic in an export or a tensor in a trace."""
    if torch.jit.is_tracing():
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    return torch.sym_min(a, b)


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression within classes: return the indices of the boxes to keep, by descending scores.

    In an export, the boxes are shifted by class and suppressed together, because torchvision's choice between two
    methods by the number of boxes cannot be exported. On a GPU, its form of this method, for up to `SHIFTED_VALUES`,
    copies a constant from the host, which waits for it.
    """
    if not (torch.compiler.is_exporting() or (boxes.is_cuda and boxes.numel() <= SHIFTED_VALUES)):
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
            matches = self.proposal_matcher(target["boxes"], image_anchors, inside)
            labels.append((matches + 1).clamp(max=1).float())  # -1 for ignored anchors
            matched_boxes.append(of_boxes(target["boxes"], matches))
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
        divisor = sum(max(1, len(chosen)) for chosen in (*positive, *negative))
        positive, negative = torch.cat(positive), torch.cat(negative)
        chosen = torch.cat([positive, negative])
        wanted = torch.cat(regression_targets)[positive]
        box_loss = F.l1_loss(pred_bbox_deltas[positive], wanted, reduction="sum") / divisor
        logits, truth = objectness.flatten()[chosen], torch.cat(labels)[chosen]
        return F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / divisor, box_loss


def align(x: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """Return the features of regions `(n, 5)`, `(n, C, size, size)`, as `roi_align` with adaptive sampling does."""
    if torch.are_deterministic_algorithms_enabled() and x.is_cuda:  # for which torchvision needs 100 GB
        return align_by_products(x, rois, size, scale)
    return roi_align(x, rois, (size, size), scale, sampling_ratio=0, aligned=True)


def align_by_products(x: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """Return what `align` does by matrix products, whose gradients are deterministic on a GPU."""
    image, (left, top, right, bottom) = rois[:, 0], (rois[:, 1:] * scale).unbind(1)
    columns, rows = _shares(left, right, size, x.shape[3]), _shares(top, bottom, size, x.shape[2])
    pooled = rois.new_zeros(len(rois), x.shape[1], size, size)
    with torch.autocast(x.device.type, enabled=False):  # half precision would round the weights
        for i, features in enumerate(x.float()):  # (C, H, W)
            of_image = rows * (image == i)[:, None, None]
            pooled = pooled + torch.einsum("npy,cyx,nqx->ncpq", of_image, features, columns)
    return pooled


def _shares(start: Tensor, end: Tensor, size: int, side: int) -> Tensor:
    """Return the weight of each place of a side in each of `size` bins from start to end, `(n, size, side)`."""
    places = torch.arange(side, device=start.device)
    length = ((end - start) / size)[:, None]  # of a bin
    samples = length.ceil()
    total = start.new_zeros(len(start), size, side)
    for sample in range(math.ceil(side / size)):
        steps = torch.arange(size, device=start.device) + (sample + 0.5) / samples.clamp(min=1)
        at = start[:, None] - 0.5 + steps * length  # (n, size)
        used = (sample < samples) & (at >= -1) & (at <= side)
        total += (1 - (at.clamp(0, side - 1)[..., None] - places).abs()).clamp(min=0) * used[..., None]
    return total / samples.clamp(min=1)[..., None]


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
        levels = torch.floor(torch.log2(sides / 56 + 1e-6)).clamp(0, len(self.strides) - 1)[:, None]
        pooled = 0.0
        for level, stride in enumerate(self.strides):
            x = features[str(level)].float()  # half precision would shift the boxes by pixels
            of_level = torch.where(levels == level, rois, 0)  # the features of an empty box are 0
            pooled += align(x, of_level, self.output_size[0], 1 / stride)
        return pooled.to(features["0"].dtype)


class TwinsRoIHeads(RoIHeads):
    """Differs from torchvision: matches and losses are the original's, and mask targets are binary."""

    def select_training_samples(self, proposals: list[Tensor], targets: list[Target]):
        """Match the proposals, add the true boxes to them, and draw samples.

        Returns boxes `(n, 4)`, indices of matched boxes, labels, codes of the matched boxes, and the numbers of
        positive and of negative samples of each image in turn: the order of the samples.
        """
        boxes, matches, labels, matched = [], [], [], []
        for proposal, target in zip(proposals, targets, strict=True):
            truth = target["boxes"]
            match = self.proposal_matcher(truth, proposal)
            match = torch.cat([match, torch.arange(len(truth), device=match.device)])
            boxes.append(torch.cat([proposal, truth]))
            matches.append(match)
            labels.append(torch.where(match < 0, 0, of_boxes(target["labels"], match)))
            matched.append(of_boxes(truth, match))
        positive, negative = self.fg_bg_sampler(labels)
        chosen = [index for indices in zip(positive, negative, strict=True) for index in indices]
        boxes, matches, labels, matched = (
            torch.cat(values)[torch.cat(chosen)] for values in (boxes, matches, labels, matched)
        )
        return boxes, matches, labels, self.box_coder.encode_single(matched, boxes), [len(index) for index in chosen]

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
        boxes, matches, labels, wanted, counts = self.select_training_samples(proposals, targets)
        boxes, matches = boxes.split(counts), matches.split(counts)
        of_images = [torch.cat(pair) for pair in zip(boxes[0::2], boxes[1::2], strict=True)]
        logits, codes = self.box_predictor(self.box_head(self.box_roi_pool(features, of_images, image_shapes)))
        positive = torch.nonzero_static(labels > 0, size=sum(counts[0::2]))[:, 0]
        found = codes.unflatten(1, (-1, 4))[positive, labels[positive]]
        losses = {
            "loss_classifier": F.cross_entropy(logits, labels),
            "loss_box_reg": F.l1_loss(found, wanted[positive], reduction="sum") / len(labels),
        }
        boxes, matches = boxes[0::2], matches[0::2]  # of positive samples
        masks = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        truths = [
            crop_masks(target["masks"], box, match, masks.shape[-1])
            for target, box, match in zip(targets, boxes, matches, strict=True)
        ]
        return [], losses | {"loss_mask": mask_loss(masks.float(), labels[positive], torch.cat(truths))}


def crop_masks(masks: Tensor, boxes: Tensor, matches: Tensor, size: int) -> Tensor:
    """Return each box's part of its matched mask `(n, H, W)`, resized and binary: `(boxes, size, size)`."""
    height, width = masks.shape[1:]
    masks = F.pad(masks, (0, -width % PADDING, 0, -height % PADDING))  # as the images are
    rois = torch.cat([matches[:, None].to(boxes), boxes], dim=1)
    parts = align(masks[:, None].to(boxes), rois, size, 1.0)
    return (parts[:, 0] >= MASK_THRESHOLD).to(boxes)


def mask_loss(logits: Tensor, labels: Tensor, truths: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of the masks of the true classes; 0 without objects."""
    if not len(labels):
        return logits.sum() * 0
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(labels), device=labels.device), labels], truths)
