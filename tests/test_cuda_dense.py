"""Segmentation networks and detectors on a GPU: golden outputs, deterministic training steps, and waits of the host."""

import os
import warnings

import pytest
import torch

from detection.configs.recipes import Experiment
from detection.network import build_detector
from engine import to_device
from segmentation.configs.recipes import fpn_pvt_setting, upernet_swin_setting
from segmentation.network import build_segmentor
from tests import golden_rule
from tests.test_detection_network import Golden, assert_golden_detections, raw_image
from tests.test_segmentation_network import GOLDEN, assert_golden, load_arrays, load_golden
from utils import make_deterministic

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = torch.device("cuda")
SETTINGS = {"upernet": upernet_swin_setting, "fpn": fpn_pvt_setting}
NETWORKS = ("upernet", "fpn", "retinanet", "mask_rcnn")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind in SETTINGS:
        model = build_segmentor(SETTINGS[kind]("alt_gvt_tiny"), 5, pretrained=False)
    else:
        model = build_detector(Experiment("alt_gvt_tiny", kind, channels=32, proposals=100), 5, pretrained=False)
    return model.to(DEVICE, memory_format=torch.channels_last).train()


def build_batch(kind: str) -> tuple:
    """Return images of two sizes and targets, one of them without objects, or crops and labels."""
    generator = torch.Generator().manual_seed(0)
    if kind in SETTINGS:
        batch = torch.randn(2, 3, 96, 96, generator=generator), torch.randint(5, (2, 96, 96), generator=generator)
    else:
        images, targets = [], []
        for (height, width), count in (((96, 128), 3), ((120, 100), 0)):
            corners = 50 * torch.rand(count, 2, generator=generator)
            images.append(torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator))
            masks = torch.ones(count, height, width, dtype=torch.uint8)
            boxes = torch.cat([corners, corners + 40], dim=1)
            targets.append({"boxes": boxes, "labels": torch.arange(count), "masks": masks})
        batch = images, targets
    return to_device(batch, DEVICE)


def train(model: torch.nn.Module, batch: tuple, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        sum(model(*batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn"])
@torch.inference_mode()
def test_golden_detections(kind, tmp_path):
    golden = Golden(kind, tmp_path)
    golden.model.transform.min_size = (golden.facts["inputs"]["eval"]["height"],)
    assert_golden_detections(golden, golden.model.to(DEVICE)([raw_image(golden, "eval").to(DEVICE)])[0])


@pytest.mark.parametrize("kind", SETTINGS)
@torch.inference_mode()
def test_golden_segmentations(kind, tmp_path):
    model, given = load_golden(kind, tmp_path).to(DEVICE), GOLDEN["inputs"]["eval"]
    images = torch.from_numpy(golden_rule.image(given["height"], given["width"], given["seed"])).to(DEVICE)
    maps = model.backbone.forward_intermediates(images, intermediates_only=True)
    assert_golden(model.decode_head(model.neck(maps)).cpu(), f"{kind}_logits", load_arrays())


@pytest.mark.parametrize("kind", NETWORKS)
def test_deterministic_steps_are_equal_bit_for_bit(kind):
    states = []
    make_deterministic()
    try:
        for _ in range(2):
            model = build(kind)
            train(model, build_batch(kind), steps=2)
            states.append(model.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert all(value.isfinite().all() for value in states[0].values())


@pytest.mark.parametrize("kind", NETWORKS)
def test_waits_of_a_training_step(kind):
    """Mask R-CNN waits once for each of its two samplers, and once an image in non-maximum suppression."""
    model, batch = build(kind), build_batch(kind)
    train(model, batch, steps=1)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, batch, steps=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) <= (4 if kind == "mask_rcnn" else 0), [f"{wait.filename}:{wait.lineno}" for wait in waits]
