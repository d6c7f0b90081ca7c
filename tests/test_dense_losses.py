"""Losses, matching, sampling and pooling of the dense networks against torch's and torchvision's forms and loops."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, roi_align, sigmoid_focal_loss

from detection import heads
from segmentation.data import IGNORED_LABEL
from segmentation.network import pixel_cross_entropy
from tests import test_cuda_dense


def draw_boxes(count: int, seed: int, sides: tuple[int, int] = (80, 60)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor(sides)
    centres, halves = (torch.rand(count, 2, generator=generator) * x for x in (limits, limits / 3))
    return torch.cat([(centres - halves - 1).clamp(min=0), torch.minimum(centres + halves, limits)], dim=1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pixel_cross_entropy_equals_the_loss_of_a_map(memory_format):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 8, 6).to(memory_format=memory_format).requires_grad_()
    labels = torch.randint(5, (2, 16, 12), dtype=torch.uint8)
    labels[0, :3] = IGNORED_LABEL
    resized = F.interpolate(logits, size=(16, 12), mode="bilinear")
    expected = F.cross_entropy(resized, labels.long(), ignore_index=IGNORED_LABEL, reduction="sum") / labels.numel()
    loss = pixel_cross_entropy(logits, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_box_coder_equals_torchvisions_but_for_the_lower_limit(weights):
    coder, original = heads.SymmetricBoxCoder(weights), BoxCoder(weights)
    boxes, anchors = draw_boxes(50, 0), draw_boxes(50, 1)
    assert torch.equal(coder.encode_single(boxes, anchors), original.encode_single(boxes, anchors))
    codes = torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(coder.decode_single(codes, anchors), original.decode_single(codes, anchors))
    least, lower = (torch.tensor([[0, 0, -value, -value]]) for value in (coder.bbox_xform_clip * weights[2], 99.0))
    assert torch.equal(coder.decode_single(lower, anchors[:1]), coder.decode_single(least, anchors[:1]))
    upper = coder.decode_single(-lower, anchors[:1])
    torch.testing.assert_close(upper, original.decode_single(-lower, anchors[:1]))


@pytest.mark.parametrize(("high", "low", "least"), [(0.5, 0.4, 0.0), (0.7, 0.3, 0.3), (0.5, 0.5, 0.5)])
@pytest.mark.parametrize("count", [0, 1, 12])
def test_matches_equal_a_loop_over_anchors(high, low, least, count):
    boxes, anchors = draw_boxes(count, 3), draw_boxes(400, 4)
    if count:
        boxes[-1] = boxes[0]
        anchors[:6] = boxes[0]  # several anchors are the best of a box, and of two boxes
    inside = torch.rand(400, generator=torch.Generator().manual_seed(5)) > 0.2
    overlaps = box_iou(boxes, anchors)
    expected = []
    for i in range(400):
        best = max((overlaps[box, i].item() for box in range(count)), default=0.0)
        match = overlaps[:, i].argmax().item() if best >= high else -2 if best >= low else -1
        for box in range(count):
            highest = overlaps[box, inside].max()
            if overlaps[box, i] == highest and highest >= least:
                match = box
        expected.append(match if inside[i] else -2)
    assert heads.MaxIoUMatcher(high, low, least)(boxes, anchors, inside).tolist() == expected


@pytest.mark.parametrize("size", [8, 64, 1000])
def test_samples_are_those_of_torchvision(size):
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(-1, 3, (count,), generator=generator) for count in (90, 41)] + [torch.zeros(20)]
    torch.manual_seed(1)
    masks = BalancedPositiveNegativeSampler(size, 0.25)(labels)
    random_state = torch.get_rng_state()
    torch.manual_seed(1)
    drawn = heads.Sampler(size, 0.25)(labels)
    assert torch.equal(torch.get_rng_state(), random_state)
    starts = (0, 90, 131)
    for of_kind, of_kind_masks in zip(drawn, masks, strict=True):
        for index, mask, start in zip(of_kind, of_kind_masks, starts, strict=True):
            assert sorted(index.tolist()) == (torch.where(mask)[0] + start).tolist()


@pytest.mark.parametrize(("scale", "size"), [(0.25, 7), (1.0, 14)])
def test_deterministic_alignment_equals_torchvisions(scale, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 40, 60, generator=generator).requires_grad_()
    boxes = draw_boxes(30, 1, (round(60 / scale), round(40 / scale)))
    boxes[0] = torch.tensor([0, 0, 60 / scale, 40 / scale])
    rois = torch.cat([torch.arange(30)[:, None] % 2, boxes], dim=1)
    rois[1] = 0
    expected = roi_align(x, rois, (size, size), scale, sampling_ratio=0, aligned=True)
    found = heads.align_by_products(x, rois, size, scale)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert heads.align_by_products(x[:0], rois[:0], size, scale).shape == (0, 3, size, size)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(heads.align_by_products(x, rois, size, scale), found)
    factors = torch.randn(expected.shape, generator=generator)
    gradients = [torch.autograd.grad(output, x, factors)[0] for output in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)


def test_anchors_of_the_padding_are_those_beyond_an_image():
    anchors, maps = heads.Anchors((8, 64), [4, 5]), [torch.zeros(1, 1, 20, 16), torch.zeros(1, 1, 3, 2)]
    found = anchors(ImageList(torch.zeros(1), [(100, 128), (160, 60)]), maps)
    locations = [(8 * y, 8 * x) for y in range(20) for x in range(16)]
    locations = [*locations, *((64 * y, 64 * x) for y in range(3) for x in range(2))]
    for inside, (height, width) in zip(anchors.inside, [(128, 128), (160, 64)], strict=True):
        assert inside.tolist() == [y < height and x < width for y, x in locations for _ in range(6)]
    assert len(found[0]) == 6 * len(locations)


def test_regions_are_pooled_from_the_level_of_their_area():
    maps = {
        str(i): torch.rand(2, 3, 64 // 2**i, 64 // 2**i, generator=torch.Generator().manual_seed(i)) for i in range(4)
    }
    sides = (0, 5, 100, 111, 113, 200, 230, 250)  # one level up from 112 and from 224 pixels
    boxes = [torch.tensor([[3.0, 1.0, 3 + side, 1 + side] for side in sides])] * 2
    expected = []
    for i in range(2):
        for side, box in zip(sides, boxes[i], strict=True):
            level = (side >= 112) + (side >= 224)
            roi = [box[None]] if i == 0 else [box[None][:0], box[None]]
            expected.append(roi_align(maps[str(level)], roi, (7, 7), 0.25 / 2**level, 0, aligned=True))
    torch.testing.assert_close(heads.RoIPool(7)(maps, boxes, []), torch.cat(expected))


def test_losses_of_retinanet_equal_a_loop_over_images(monkeypatch):
    monkeypatch.setattr(test_cuda_dense, "DEVICE", torch.device("cpu"))
    model, (_, targets) = test_cuda_dense.build("retinanet"), test_cuda_dense.build_batch("retinanet")
    anchors, inside = draw_boxes(300, 0, (128, 96)), [torch.arange(300) < count for count in (300, 250)]
    model.anchor_generator.inside = inside
    torch.manual_seed(0)
    logits, codes = torch.randn(2, 300, 5).requires_grad_(), torch.randn(2, 300, 4).requires_grad_()
    losses = model.compute_loss(targets, {"cls_logits": logits, "bbox_regression": codes}, [anchors] * 2)
    focal, distance, positives = 0.0, 0.0, 0
    for i, target in enumerate(targets):
        match = model.proposal_matcher(target["boxes"], anchors, inside[i])
        positive, counted = torch.where(match >= 0)[0], match != heads.IGNORED
        truth = torch.zeros(300, 5)
        truth[positive, target["labels"][match[positive]]] = 1
        focal += sigmoid_focal_loss(logits[i][counted], truth[counted], reduction="sum")
        wanted = model.box_coder.encode_single(target["boxes"][match[positive]], anchors[positive])
        distance += (codes[i][positive] - wanted).abs().sum()
        positives += max(1, len(positive))
    assert positives > 2
    torch.testing.assert_close(losses, {"classification": focal / positives, "bbox_regression": distance / positives})
    found, expected = (torch.autograd.grad(sum(x), (logits, codes)) for x in (losses.values(), (focal, distance)))
    torch.testing.assert_close(found, tuple(gradient / positives for gradient in expected))


WAITING = ("aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::nll_loss2d")


class Waits(TorchDispatchMode):
    """Lists operations for which the host would wait on a GPU, and the loss of a map, which is not deterministic there.

    The host also waits for non-maximum suppression and for the counts of the samplers, which are not listed.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name()
        indices = args[1] if name.startswith("aten::index") and isinstance(args[1], (list, tuple)) else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if by_mask or (name.startswith(WAITING) and "static" not in name):
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [pytest.param("upernet", marks=pytest.mark.slow), "fpn", "retinanet", "mask_rcnn"])
def test_a_training_step_has_no_shapes_that_depend_on_values(kind, monkeypatch):
    monkeypatch.setattr(test_cuda_dense, "DEVICE", torch.device("cpu"))
    model, batch = test_cuda_dense.build(kind), test_cuda_dense.build_batch(kind)
    with Waits() as waits:
        sum(model(*batch).values()).backward()
    assert waits.found == []
