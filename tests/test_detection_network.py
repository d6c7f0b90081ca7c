"""RetinaNet and Mask R-CNN against the original's outputs."""

import json

import numpy as np
import pytest
import torch

from detection.configs.recipes import Experiment
from detection.network import build_detector
from detection.weights import load_detector
from tests import golden_rule
from tests.helpers import on_meta
from tests.test_models import DATA, PARAMETERS

KINDS = ("retinanet", "mask_rcnn")


def build(kind: str, name: str = "pcpvt_small", classes: int = 80):
    return build_detector(Experiment(name, kind, drop_path=0.0), classes, pretrained=False)


class Golden:
    """A detector with the golden weights, loaded from a file as the original's library writes it, and its outputs."""

    def __init__(self, kind: str, folder):
        self.kind = kind
        self.facts = json.loads((DATA / f"golden_detection_{kind}.json").read_text())
        self.arrays = np.load(DATA / f"golden_detection_{kind}.npz")
        state = golden_rule.state_from_shapes(self.facts["state"])
        path = folder / "released.pth"
        torch.save({"meta": {}, "state_dict": {name: torch.from_numpy(value) for name, value in state.items()}}, path)
        with on_meta():
            self.model = build(kind)
        self.model.to_empty(device="cpu")
        self.report = load_detector(self.model, path)
        self.model.eval()

    def check(self, tensor: torch.Tensor, name: str) -> None:
        facts = self.facts["arrays"][name]
        assert list(tensor.shape) == facts["shape"], name
        sampled = tensor.detach().reshape(-1)[:: facts.get("stride", 1)].numpy()
        np.testing.assert_allclose(sampled, self.arrays[name].reshape(-1), atol=1e-3, rtol=1e-4, err_msg=name)

    def image(self, part: str, index: int = 0) -> torch.Tensor:
        """Return a golden image, normalised, as the network sees it before padding."""
        facts = self.facts["inputs"][part]
        size = facts["sizes"][index] if part == "train" else (facts["height"], facts["width"])
        seed = facts["seeds"][index] if part == "train" else facts["seed"]
        return torch.from_numpy(golden_rule.image(*size, seed))[0]


@pytest.fixture(scope="module", params=KINDS)
def golden(request, tmp_path_factory):
    return Golden(request.param, tmp_path_factory.mktemp(request.param))


MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def raw_image(golden: Golden, part: str, index: int = 0) -> torch.Tensor:
    """Return a golden image as it is before the network normalises it."""
    return golden.image(part, index) * STD + MEAN


@pytest.fixture
def detect(golden, monkeypatch):
    """Return what finds the objects of the golden image, at its own size."""
    monkeypatch.setattr(golden.model.transform, "min_size", (golden.facts["inputs"]["eval"]["height"],))
    return lambda: golden.model([raw_image(golden, "eval")])[0]


@pytest.fixture
def features(golden, detect):
    """The maps of the pyramid, by level, of the golden image."""
    images, _ = golden.model.transform([raw_image(golden, "eval")])
    assert images.tensors.shape == (1, 3, 256, 384)
    with torch.inference_mode():
        return golden.model.backbone(images.tensors)


def test_released_weights_load_strictly(golden):
    assert golden.report.loaded == len(golden.model.state_dict())
    unused = ("norm.weight", "norm.bias", "head.weight", "head.bias")
    assert set(golden.report.skipped) == {f"backbone.{name}" for name in unused}


@torch.inference_mode()
def test_maps_and_raw_heads_equal_the_originals(golden, features):
    images, _ = golden.model.transform([raw_image(golden, "eval")])
    for stage, x in enumerate(
        golden.model.backbone.body.forward_intermediates(images.tensors, intermediates_only=True)
    ):
        golden.check(x, f"backbone{stage}")
    for level, x in enumerate(features.values()):
        golden.check(x, f"p{level}")
        if golden.kind == "retinanet":
            head = golden.model.head
            golden.check(head.classification_head.cls_logits(head.classification_head.conv(x)), f"cls{level}")
            golden.check(head.regression_head.bbox_reg(head.regression_head.conv(x)), f"reg{level}")
        else:
            logits, codes = golden.model.rpn.head([x])
            golden.check(logits[0], f"cls{level}")
            golden.check(codes[0], f"reg{level}")


@torch.inference_mode()
def test_detections_equal_the_originals(golden, detect):
    assert_golden_detections(golden, detect())


def assert_golden_detections(golden: Golden, found: dict[str, torch.Tensor]) -> None:
    found = {name: value.cpu().numpy() for name, value in found.items()}
    arrays, tolerance = golden.arrays, golden.facts["tolerance"]
    assert len(found["boxes"]) == len(arrays["boxes"]) == 100
    np.testing.assert_allclose(found["scores"], arrays["scores"], **tolerance["scores"])
    different, masks = (
        0,
        np.unpackbits(arrays["masks"])[: 20 * 256 * 360].reshape(20, 256, 360) if "masks" in arrays else [],
    )
    matched = set()
    for i, (box, label) in enumerate(zip(arrays["boxes"], arrays["labels"], strict=True)):
        distances = np.abs(found["boxes"] - box).max(axis=1) + 1e6 * (found["labels"] != label)
        assert distances.min() < tolerance["boxes"]["atol"], i
        matched.add(distances.argmin())
        if i < len(masks):
            different += (found["masks"][distances.argmin()] != masks[i]).sum()
    assert len(matched) == 100  # each by another
    assert different <= 1e-4 * 20 * 256 * 360


@torch.inference_mode()
def test_parts_of_mask_rcnn_equal_the_originals(golden, features):
    if golden.kind != "mask_rcnn":
        pytest.skip("Mask R-CNN alone")
    images, _ = golden.model.transform([raw_image(golden, "eval")])
    proposals, _ = golden.model.rpn(images, features)
    expected = torch.from_numpy(golden.arrays["proposals"][:, :4])
    nearest = (proposals[0][None] - expected[:, None]).abs().amax(-1).amin(1)
    assert len(proposals[0]) == 1000
    assert (nearest < 0.05).float().mean() >= 0.99
    heads, sizes = golden.model.roi_heads, images.image_sizes
    for boxes, cls, reg in (
        (expected, "proposal_cls0", "proposal_reg0"),
        (golden.arrays["rois"], "roi_cls0", "roi_reg0"),
    ):
        boxes = [torch.as_tensor(boxes)[:, -4:]]
        pooled = heads.box_roi_pool(features, boxes, sizes)
        logits, codes = heads.box_predictor(heads.box_head(pooled))
        golden.check(logits.roll(-1, dims=1), cls)
        golden.check(codes[:, 4:], reg)
    golden.check(pooled, "roi_feat0")
    pooled = heads.mask_roi_pool(features, boxes, sizes)
    golden.check(pooled, "roi_mask_feat0")
    golden.check(heads.mask_predictor(heads.mask_head(pooled))[:, 1:], "roi_mask0")


LOSSES = {
    **{"classification": "loss_cls", "bbox_regression": "loss_bbox"},
    **{"loss_objectness": "loss_rpn_cls", "loss_rpn_box_reg": "loss_rpn_bbox"},
    **{"loss_classifier": "loss_cls", "loss_box_reg": "loss_bbox", "loss_mask": "loss_mask"},
}


def golden_targets(golden, without_second: bool) -> list[dict[str, torch.Tensor]]:
    targets = []
    for i, size in enumerate(golden.facts["inputs"]["train"]["sizes"]):
        target = {"boxes": golden.arrays[f"gt_boxes{i}"], "labels": golden.arrays[f"gt_labels{i}"].astype(np.int64)}
        if golden.kind == "mask_rcnn":
            count = len(target["boxes"])
            masks = np.unpackbits(golden.arrays[f"gt_masks{i}"])[: count * size[0] * size[1]]
            target["masks"] = masks.reshape(count, *size)
        keep = 0 if i == 1 and without_second else len(target["boxes"])
        targets.append({name: torch.from_numpy(value[:keep]) for name, value in target.items()})
    return targets


@pytest.mark.slow
@pytest.mark.parametrize("without_second", [False, True])
def test_losses_equal_the_originals(golden, without_second, monkeypatch):
    golden.model.train()
    golden.model.backbone.body.eval()
    if golden.kind == "mask_rcnn":  # nothing is drawn at random
        monkeypatch.setattr(golden.model.rpn.fg_bg_sampler, "batch_size_per_image", 10**6)
        monkeypatch.setattr(golden.model.roi_heads.fg_bg_sampler, "batch_size_per_image", 10**6)
    losses = golden.model([raw_image(golden, "train", i) for i in range(2)], golden_targets(golden, without_second))
    golden.model.eval()
    expected = golden.facts["losses"]["values_second_image_without_objects" if without_second else "values"]
    found = {LOSSES[name]: value.item() for name, value in losses.items()}
    assert found == pytest.approx(expected, rel=golden.facts["tolerance"]["losses"]["rtol"])


# Millions, of the original's without its unused classifier; Mask R-CNN's background adds 4,357.
COUNTS = {
    "retinanet": (33.84, 53.56, 70.73, 33.78, 66.24, 109.89),
    "mask_rcnn": (43.76, 63.48, 80.64, 43.70, 75.58, 118.64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_counts(kind):
    for name, expected in zip(PARAMETERS, COUNTS[kind], strict=True):
        with on_meta():
            count = sum(parameter.numel() for parameter in build(kind, name).parameters())
        assert (count - 4357 * (kind == "mask_rcnn")) / 1e6 == pytest.approx(expected, abs=0.006), name
