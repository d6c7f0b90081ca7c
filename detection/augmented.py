"""Flip and multi-scale testing of detectors (`--aug-test`), merged as the original's library does."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, nms

from detection.heads import ProposalNetwork, Target, TwinsRoIHeads
from detection.network import Transform, TwinsMaskRCNN, TwinsRetinaNet, paste_masks
from detection.transforms import flip_boxes


@dataclass(frozen=True)
class View:
    """An image at one scale, flipped or not, as the network sees it."""

    images: ImageList  # the view, normalised and padded, as the only image of a batch
    features: dict[str, Tensor]  # maps of its pyramid by level
    image_size: tuple[int, int]  # height and width of the original image
    flipped: bool  # horizontally

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the view without its padding."""
        return self.images.image_sizes[0]

    def from_image(self, boxes: Tensor) -> Tensor:
        """Return boxes `(..., 4)` of the original image in pixels of the view."""
        boxes = boxes * self._factors(boxes)
        return flip_boxes(boxes, self.size[1]) if self.flipped else boxes

    def to_image(self, boxes: Tensor) -> Tensor:
        """Return boxes `(..., 4)` of the view in pixels of the original image."""
        boxes = flip_boxes(boxes, self.size[1]) if self.flipped else boxes
        return boxes / self._factors(boxes)

    def _factors(self, boxes: Tensor) -> Tensor:
        (h, w), (height, width) = self.size, self.image_size
        return boxes.new_tensor([w / width, h / height] * 2)


class AugmentedDetector(nn.Module):
    """A detector in evaluation that merges what it finds at several `Transform` scales, each as it is and flipped."""

    def __init__(self, detector: nn.Module, scales: Sequence[tuple[int, int]]):
        super().__init__()
        self.detector = detector
        self.transforms = [Transform(scale).eval() for scale in scales]

    def forward(self, images: list[Tensor]) -> list[Target]:
        """Return the objects in images `(3, H, W)`."""
        merge = merge_mask_rcnn if isinstance(self.detector, TwinsMaskRCNN) else merge_retinanet
        return [merge(self.detector, self._views(image)) for image in images]

    def _views(self, image: Tensor) -> list[View]:
        views = []
        for transform in self.transforms:
            for flipped in (False, True):
                images, _ = transform([image.flip(2) if flipped else image])
                views.append(View(images, self.detector.backbone(images.tensors), image.shape[1:], flipped))
        return views


def merge_retinanet(detector: TwinsRetinaNet, views: list[View]) -> Target:
    """Return the objects that remain of the candidates of all views."""
    boxes, scores = [], []
    for view in views:
        maps = list(view.features.values())
        outputs = [detector.head([x]) for x in maps]
        levels = {name: [output[name][0] for output in outputs] for name in ("cls_logits", "bbox_regression")}
        anchors = detector.anchor_generator(view.images, maps)[0].split([len(x) for x in levels["cls_logits"]])
        candidates, probabilities = detector.find_candidates(**levels, anchors=anchors, size=view.size)
        boxes.append(view.to_image(candidates))
        scores.append(probabilities)
    return detector.select(torch.cat(boxes), torch.cat(scores))


def merge_mask_rcnn(detector: TwinsMaskRCNN, views: list[View]) -> Target:
    """Return the objects that remain of the proposals of all views, with boxes, scores and masks averaged over them."""
    rpn, heads = detector.rpn, detector.roi_heads
    proposals, scores = map(torch.cat, zip(*(_propose(rpn, view) for view in views), strict=True))
    proposals = proposals[nms(proposals, scores, rpn.nms_thresh)[: rpn.post_nms_top_n()]]
    boxes, scores = map(torch.stack, zip(*(_refine(heads, view, proposals) for view in views), strict=True))
    boxes, scores, labels = heads.select(boxes.mean(0), scores.mean(0))
    masks = torch.stack([_find_masks(heads, view, boxes, labels) for view in views]).mean(0)
    masks = paste_masks(masks, boxes, *views[0].image_size)
    return {"boxes": boxes, "scores": scores, "labels": labels - 1, "masks": masks}


def _propose(rpn: ProposalNetwork, view: View) -> tuple[Tensor, Tensor]:
    """Return the proposals of a view in pixels of the image, and their scores."""
    maps = list(view.features.values())
    logits, codes = rpn.head(maps)
    counts = [x[0].numel() for x in logits]
    logits, codes = concat_box_prediction_layers(logits, codes)
    boxes = rpn.box_coder.decode(codes, rpn.anchor_generator(view.images, maps)).view(1, -1, 4)
    (boxes,), (scores,) = rpn.filter_proposals(boxes, logits, [view.size], counts)
    return view.to_image(boxes), scores


def _refine(heads: TwinsRoIHeads, view: View, proposals: Tensor) -> tuple[Tensor, Tensor]:
    """Return each proposal's box of each class, `(n, classes, 4)` in pixels of the image, and the scores."""
    rois = view.from_image(proposals)
    logits, codes = heads.box_predictor(heads.box_head(heads.box_roi_pool(view.features, [rois], [view.size])))
    boxes = heads.box_coder.decode_single(codes, rois).unflatten(1, (-1, 4))
    return view.to_image(clip_boxes_to_image(boxes, view.size)), logits.softmax(dim=1)


def _find_masks(heads: TwinsRoIHeads, view: View, boxes: Tensor, labels: Tensor) -> Tensor:
    """Return the probabilities of the masks within boxes, `(n, m, m)`, not flipped."""
    rois = view.from_image(boxes)
    logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(view.features, [rois], [view.size])))
    masks = logits.float().sigmoid()[torch.arange(len(labels), device=labels.device), labels]
    return masks.flip(2) if view.flipped else masks
