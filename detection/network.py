"""RetinaNet and Mask R-CNN of torchvision with Twins backbones, which behave exactly as the published ones.

The networks are torchvision's, with its parameter names. "Differs from torchvision" describes what a subclass changes
to behave as the original. In both networks labels are 0 to classes - 1, and images are `(3, H, W)`, uint8 or floats
from 0 to 1, of any sizes.
"""

from collections import OrderedDict
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, clip_boxes_to_image, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from core.images import fitted_size, resize_image
from dense.networks import build_backbone
from detection import heads
from detection.configs.recipes import Experiment
from detection.heads import Target
from transforms import STATISTICS, normalise


def build_detector(experiment: Experiment, num_classes: int, pretrained: bool) -> nn.Module:
    """Build the detector of an experiment, with ImageNet weights if `pretrained`; raises as `build_backbone` does."""
    weights = experiment.pretrained if pretrained else ""
    # The published models were trained with zero padding that takes part in the attention of windows.
    body = build_backbone(experiment.backbone, weights, drop_path_rate=experiment.drop_path, window_padding="zero")
    network = TwinsRetinaNet if experiment.detector == "retinanet" else TwinsMaskRCNN
    return network(body, num_classes, experiment)


class TwinsFPN(nn.Module):
    """A Twins backbone and a feature pyramid: images `(B, 3, H, W)` -> maps `(B, channels, H / s, W / s)`.

    `first` is the index of the finest stage that the pyramid uses; the block `extra` adds coarser levels.
    """

    def __init__(self, body: nn.Module, first: int, extra: ExtraFPNBlock, channels: int):
        super().__init__()
        self.body = body
        self.first = first
        self.fpn = FeaturePyramidNetwork(list(body.embed_dims[first:]), channels, extra)
        self.out_channels = channels
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):  # Differs from torchvision: Xavier initialisation
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body.forward_intermediates(images, intermediates_only=True)[self.first :]
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))

    def freeze_stages(self, count: int) -> None:
        self.body.freeze_stages(count)

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


class Transform(GeneralizedRCNNTransform):
    """Normalisation and padding of images, and in evaluation the resizing of images, boxes and masks.

    Differs from torchvision: training images are not resized; sides are rounded to the nearest pixel, not down; uint8
    images are accepted; masks are pasted by interpolation between pixel centres.
    """

    def __init__(self, scale: tuple[int, int]):
        super().__init__(min(scale), max(scale), *STATISTICS, heads.PADDING)

    def normalize(self, image: Tensor) -> Tensor:
        images = normalise(image)
        return images.to(image.dtype) if image.is_floating_point() else images  # half precision stays so

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        if self.training:
            return image, target
        size = fitted_size(image.shape[1:], (self.max_size, self.min_size[0]))
        return resize_image(image, size), target

    def batch_images(self, images: list[Tensor], size_divisible: int = heads.PADDING) -> Tensor:
        """Pad images `(3, H_i, W_i)` with zeros to the same multiples of `size_divisible` and stack them."""
        height, width = (
            pad_side(reduce(torch.sym_max, (image.shape[dim] for image in images)), size_divisible) for dim in (1, 2)
        )
        if len(images) == 1:
            return F.pad(images[0], (0, width - images[0].shape[2], 0, height - images[0].shape[1]))[None]
        batch = images[0].new_zeros(len(images), 3, height, width)
        for x, padded in zip(images, batch, strict=True):
            padded[:, : x.shape[1], : x.shape[2]] = x
        return batch

    def postprocess(self, result: list[Target], image_shapes: list, original_image_sizes: list) -> list[Target]:
        if not self.training:
            for found, (h, w), (height, width) in zip(result, image_shapes, original_image_sizes, strict=True):
                factors = (width / w, height / h) * 2
                sides = found["boxes"].unbind(1)
                found["boxes"] = torch.stack([x * factor for x, factor in zip(sides, factors, strict=True)], dim=1)
                if "masks" in found:
                    found["masks"] = paste_masks(found["masks"][:, 0], found["boxes"], height, width)
        return result


def pad_side(side: int, divisor: int) -> int:
    """Return a side rounded up to a multiple of a divisor.

    In an export the result is a new symbol without a relation to `side`, because expressions of the size of the image
    make the exporter many times slower.
    """
    count = (side + divisor - 1) // divisor  # exporters round the quotient of a negative number up
    if torch.compiler.is_exporting():
        count = torch.scalar_tensor(count, dtype=torch.int64).item()
        torch._check(count >= 1)
    return count * divisor


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Paste probabilities `(N, m, m)` within boxes `(N, 4)` into images; return bool masks `(N, height, width)`."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return paste_masks_at_once(masks, boxes, height, width)
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
        whole[top:bottom, left:right] = part >= heads.MASK_THRESHOLD
    return pasted


def paste_masks_at_once(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Paste masks as `paste_masks` does, by matrix products instead of a loop, for exports. Needs more memory."""
    left, top, right, bottom = boxes.float()[..., None].unbind(1)  # (N, 1) each
    places = torch.arange(masks.shape[-1], device=masks.device)
    weights = []
    for start, end, side in ((top, bottom, height), (left, right, width)):
        pixels = torch.arange(side, device=masks.device) + 0.5
        positions = (pixels - start) / (end - start) * masks.shape[-1] - 0.5  # (N, side)
        weights.append((1 - (positions[..., None] - places).abs()).clamp(min=0))  # of a bilinear interpolation
    return weights[0] @ masks.float() @ weights[1].transpose(1, 2) >= heads.MASK_THRESHOLD


class CompiledBackbone:
    """A detector whose `compile` compiles the backbone only: the other parts work on lists of varying sizes."""

    def compile(self, *args, **kwargs) -> None:
        self.backbone.compile(*args, **kwargs)


class TwinsRetinaNet(CompiledBackbone, RetinaNet):
    """RetinaNet (https://arxiv.org/abs/1708.02002) on the levels P3 to P7."""

    pretrained_cfg = {"classifier": "head.classification_head.cls_logits"}  # noqa: RUF012  see models.load_state_dict

    def __init__(self, body: nn.Module, num_classes: int, experiment: Experiment):
        channels = experiment.channels
        levels = LevelsP6P7(body.embed_dims[-1], channels)
        super().__init__(
            TwinsFPN(body, first=1, extra=levels, channels=channels),
            num_classes,
            anchor_generator=heads.Anchors((8, 16, 32, 64, 128), [4 * 2 ** (i / 3) for i in range(3)]),
            proposal_matcher=heads.MaxIoUMatcher(0.5, 0.4, least=0.0),
            score_thresh=experiment.score_threshold,
            nms_thresh=experiment.nms_threshold,
            detections_per_img=experiment.detections,
        )
        self.transform = Transform(experiment.scale)
        self.box_coder = heads.SymmetricBoxCoder((1.0, 1.0, 1.0, 1.0))
        for head in (self.head.classification_head, self.head.regression_head):
            for layer in head.conv.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=experiment.head_std)

    def forward(self, images: list[Tensor], targets: list[Target] | None = None):
        """Return losses in training and detections in evaluation, as torchvision does without a check of the boxes."""
        if not self.training:
            return super().forward(images)
        images, targets = self.transform(images, targets)
        maps = list(self.backbone(images.tensors).values())
        return self.compute_loss(targets, self.head(maps), self.anchor_generator(images, maps))

    def compute_loss(self, targets: list[Target], head_outputs: dict[str, Tensor], anchors: list[Tensor]) -> dict:
        """Differs from torchvision: losses are divided by all positives of the batch, and ignore the padding."""
        logits, codes = head_outputs["cls_logits"].float(), head_outputs["bbox_regression"].float()
        positives, classification, box_regression = 0, 0.0, 0.0
        images = zip(targets, anchors, self.anchor_generator.inside, logits, codes, strict=True)
        for target, image_anchors, inside, logit, code in images:
            match = self.proposal_matcher(target["boxes"], image_anchors, inside)
            positive, counted = (match >= 0)[:, None], (match != heads.IGNORED)[:, None]
            positives += positive.sum().clamp(min=1)
            classes = heads.of_boxes(target["labels"], match)[:, None]
            truth = positive & (classes == torch.arange(logit.shape[1], device=logit.device))
            classification += (sigmoid_focal_loss(logit, truth.float()) * counted).sum()
            wanted = self.box_coder.encode_single(heads.of_boxes(target["boxes"], match), image_anchors)
            box_regression += torch.where(positive, code - wanted, 0).abs().sum()
        return {"classification": classification / positives, "bbox_regression": box_regression / positives}

    def postprocess_detections(self, head_outputs, anchors, image_shapes) -> list[Target]:
        """Return the objects of each image."""
        detections = []
        for index, size in enumerate(image_shapes):
            levels = {name: [x[index] for x in head_outputs[name]] for name in ("cls_logits", "bbox_regression")}
            detections.append(self.select(*self.find_candidates(**levels, anchors=anchors[index], size=size)))
        return detections

    def find_candidates(self, cls_logits: list[Tensor], bbox_regression: list[Tensor], anchors, size):
        """Return the boxes `(n, 4)` of an image's candidates, and their scores `(n, classes)`.

        Differs from torchvision: candidates are the 1000 anchors of each level whose best class scores highest.
        """
        boxes, scores = [], []
        for logits, codes, level_anchors in zip(cls_logits, bbox_regression, anchors, strict=True):
            probabilities = logits.float().sigmoid()  # (anchors, classes)
            count = heads.smaller(self.topk_candidates, probabilities.shape[0])  # symbolic in an export
            best = probabilities.max(dim=1).values.topk(count).indices
            boxes.append(self.box_coder.decode_single(codes[best], level_anchors[best]))
            scores.append(probabilities[best])
        return clip_boxes_to_image(torch.cat(boxes), size), torch.cat(scores)

    def select(self, boxes: Tensor, scores: Tensor) -> Target:
        """Return the objects that remain of candidates, by the thresholds and non-maximum suppression."""
        candidates, labels = torch.where(scores > self.score_thresh)
        boxes, scores = boxes[candidates], scores[candidates, labels]
        keep = heads.suppress(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


class TwinsMaskRCNN(CompiledBackbone, GeneralizedRCNN):
    """Mask R-CNN (https://arxiv.org/abs/1703.06870) on the levels P2 to P6."""

    # The layers that `models.load_state_dict` skips in fine-tuning if the classes differ.
    pretrained_cfg = {  # noqa: RUF012
        "classifier": tuple(
            f"roi_heads.{name}"
            for name in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
        )
    }

    def __init__(self, body: nn.Module, num_classes: int, experiment: Experiment):
        channels, proposals = experiment.channels, experiment.proposals
        anchors = heads.Anchors((4, 8, 16, 32, 64), [8])
        rpn = heads.ProposalNetwork(
            anchors,
            heads.ProposalHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * proposals, "testing": proposals},
            post_nms_top_n={"training": proposals, "testing": proposals},
            nms_thresh=0.7,
        )
        rpn.proposal_matcher = heads.MaxIoUMatcher(0.7, 0.3, least=0.3)
        rpn.fg_bg_sampler = heads.Sampler(256, positive_fraction=0.5)
        rpn.box_coder = heads.SymmetricBoxCoder((1.0, 1.0, 1.0, 1.0))
        classes = num_classes + 1  # class 0 is the background
        roi_heads = heads.TwinsRoIHeads(
            heads.RoIPool(7),
            TwoMLPHead(channels * 7**2, 1024),
            heads.BoxPredictor(1024, classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=experiment.roi_samples,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=experiment.score_threshold,
            nms_thresh=experiment.nms_threshold,
            detections_per_img=experiment.detections,
            mask_roi_pool=heads.RoIPool(14),
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, dilation=1),
            mask_predictor=MaskRCNNPredictor(channels, channels, classes),
        )
        roi_heads.proposal_matcher = heads.MaxIoUMatcher(0.5, 0.5, least=0.5)
        roi_heads.fg_bg_sampler = heads.Sampler(experiment.roi_samples, positive_fraction=0.25)
        roi_heads.box_coder = heads.SymmetricBoxCoder((10.0, 10.0, 5.0, 5.0))
        backbone = TwinsFPN(body, first=0, extra=LastLevelMaxPool(), channels=channels)
        super().__init__(backbone, rpn, roi_heads, Transform(experiment.scale))
        self._initialise()

    def _initialise(self) -> None:
        """Differs from torchvision: the heads have the original's initial weights."""
        head, predictor = self.roi_heads.box_head, self.roi_heads.box_predictor
        for layer in (head.fc6, head.fc7):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(predictor.cls_score.weight, std=0.01)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
        masks = self.roi_heads.mask_predictor
        layers = head.fc6, head.fc7, predictor.cls_score, predictor.bbox_pred, masks.conv5_mask, masks.mask_fcn_logits
        for layer in layers:
            nn.init.zeros_(layer.bias)

    def forward(self, images: list[Tensor], targets: list[Target] | None = None):
        """Return losses in training and detections in evaluation; labels start from 0."""
        # Differs from the original: within the network the background is class 0, as in torchvision, not the last.
        if self.training:
            targets = [{**target, "labels": target["labels"] + 1} for target in targets]
            images, targets = self.transform(images, targets)
            features = self.backbone(images.tensors)
            proposals, losses = self.rpn(images, features, targets)
            return losses | self.roi_heads(features, proposals, images.image_sizes, targets)[1]
        return [{**found, "labels": found["labels"] - 1} for found in super().forward(images)]
