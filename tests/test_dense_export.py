"""Segmentation networks and detectors in ONNX: exported at one size, run by onnxruntime at others."""

import pytest
import torch
from torch import nn

from dense.networks import build_backbone
from detection.configs.recipes import Experiment
from detection.network import TwinsMaskRCNN, TwinsRetinaNet, paste_masks, paste_masks_at_once
from segmentation.heads import FPN, AveragePool, FPNHead, UPerHead
from segmentation.network import Segmentor

DEPTHS = (1, 1, 1, 1)  # small graphs, for short exports


def image(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


# ------------------------------------------------------------------------------------------------ pyramid pooling


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 5), (7, 6), (12, 13), (16, 64), (25, 42)])
def test_pooling_is_torchs(size, bins):
    maps = image(2, 3, *size).requires_grad_()
    results = []
    for pool in (AveragePool(bins), nn.AdaptiveAvgPool2d(bins)):
        pooled = pool(maps)
        weights = image(*pooled.shape)
        results.append([pooled, *torch.autograd.grad((pooled * weights).sum(), maps)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------------- segmentation


def build_tiny_segmentor(head: str, backbone: str) -> Segmentor:
    torch.manual_seed(0)
    body = build_backbone(backbone, "", depths=DEPTHS, window_padding="released")
    if head == "fpn":
        return Segmentor(body, FPN(body.embed_dims, 16), FPNHead(16, 5, channels=16), None).eval()
    return Segmentor(body, nn.Identity(), UPerHead(body.embed_dims, 5, channels=16), None).eval()


def export(network: nn.Module, example: torch.Tensor, exporter: str, path):
    """Export a network of one input for all sizes, and return a function that runs the result.

    Args:
        network: Network in evaluation mode.
        example: Input; all its sizes but that of the channels are dynamic.
        exporter: `"dynamo"` or `"legacy"` for ONNX and onnxruntime, `"program"` for `torch.export`.
        path: File to write.
    """
    dims = [dim for dim in range(example.dim()) if example.shape[dim] != 3]
    shapes = (dict.fromkeys(dims, torch.export.Dim.AUTO),)
    if exporter == "program":
        return torch.export.export(network, (example,), dynamic_shapes=shapes).module()
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if exporter == "dynamo":
        torch.onnx.export(network, (example,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    else:
        names = {dim: f"side{dim}" for dim in dims}
        options = {"input_names": ["images"], "dynamic_axes": {"images": names}}
        torch.onnx.export(network, (example,), path, dynamo=False, **options)
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "exporter", "backbone"),
    [("upernet", "dynamo", "pcpvt_tiny"), ("upernet", "legacy", "alt_gvt_tiny"), ("fpn", "legacy", "pcpvt_tiny")],
)
def test_segmentation_networks_run_at_all_sizes(head, exporter, backbone, tmp_path):
    network = build_tiny_segmentor(head, backbone)
    run = export(network, image(2, 3, 160, 128), exporter, str(tmp_path / "network.onnx"))
    for batch, height, width in [(1, 32, 32), (1, 64, 96), (1, 96, 224), (1, 225, 230), (3, 224, 224), (1, 480, 640)]:
        images = image(batch, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(run(images)[0], network(images), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ detection


def test_masks_are_pasted_at_once_as_one_by_one():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(200, 28, 28, generator=generator)
    corners = torch.rand(200, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([90.0, 60.0])
    boxes = torch.cat([corners[:, 0], corners[:, 1] + 0.01], dim=1)
    boxes[:20] = boxes[:20].round() + torch.tensor([0, 0, 1, 1])
    pasted = paste_masks(masks, boxes, 60, 90)
    assert pasted.any(dim=0).float().mean() > 0.9
    assert torch.equal(paste_masks_at_once(masks, boxes, 60, 90), pasted)


class SingleImage(nn.Module):
    """A detector of one image `(3, H, W)` that returns boxes, scores, labels and, with Mask R-CNN, masks."""

    names = ("boxes", "scores", "labels", "masks")

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        (found,) = self.detector([x])
        return [found[name] for name in self.names if name in found]


def build_tiny_detector(kind: str, backbone: str) -> SingleImage:
    """Build a detector whose random weights find many objects with different scores."""
    torch.manual_seed(0)
    body = build_backbone(backbone, "", window_padding="zero", depths=DEPTHS)
    if kind == "retinanet":
        detector = TwinsRetinaNet(body, 5, Experiment(backbone, kind, scale=(512, 256), channels=16, head_std=0.08))
        spread = {detector.head.classification_head.cls_logits: 0.2, detector.head.regression_head.bbox_reg: 0.1}
    else:
        detector = TwinsMaskRCNN(body, 5, Experiment(backbone, kind, scale=(512, 256), channels=16, proposals=100))
        heads = detector.roi_heads
        spread = {detector.rpn.head.cls_logits: 0.5, detector.rpn.head.bbox_pred: 0.1}
        spread |= {heads.box_predictor.cls_score: 0.1, heads.mask_predictor.mask_fcn_logits: 0.5}
    for layer, std in spread.items():
        nn.init.normal_(layer.weight, std=std)
    return SingleImage(detector).eval()


def picture(height: int, width: int) -> torch.Tensor:
    return nn.functional.interpolate(image(1, 3, height // 8, width // 8), size=(height, width), mode="bilinear")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "exporter", "backbone"),
    [
        ("retinanet", "program", "alt_gvt_tiny"),  # and the dynamo exporter, which takes three times as long
        ("retinanet", "legacy", "pcpvt_tiny"),
        ("mask_rcnn", "dynamo", "pcpvt_tiny"),
        ("mask_rcnn", "legacy", "pcpvt_tiny"),
    ],
)
def test_detectors_run_at_all_sizes(kind, exporter, backbone, tmp_path):
    """The exported graphs have the non-maximum suppression; torchvision's own detectors fail in the dynamo exporter."""
    network = build_tiny_detector(kind, backbone)
    run = export(network, picture(150, 170), exporter, str(tmp_path / "network.onnx"))
    for size in [(150, 170), (128, 256), (320, 96), (480, 640), (64, 64)]:
        with torch.no_grad():
            boxes, scores, labels, *masks = network(picture(*size))
        found_boxes, found_scores, found_labels, *found_masks = run(picture(*size))
        distances = (found_boxes - boxes[:, None]).abs().amax(dim=2) + 1e6 * (found_labels != labels[:, None])
        # Boxes that are clipped to no area may be the same; their scores tell them apart.
        nearest = (distances + 1e3 * (found_scores - scores[:, None]).abs()).argmin(dim=1)
        assert len(boxes) == len(found_boxes) == len(nearest.unique()) > 50
        assert distances.gather(1, nearest[:, None]).max() < 0.05  # pixels
        torch.testing.assert_close(found_scores[nearest], scores, rtol=0, atol=1e-4)
        for mask, found_mask in zip(masks, found_masks, strict=True):
            assert (mask != found_mask[nearest]).sum() <= 1e-3 * mask.sum()
