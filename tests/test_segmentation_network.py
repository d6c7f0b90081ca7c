"""Segmentation networks against the original's outputs, inference and figures against naive loops."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from core.distributed import all_reduce
from models.layers import Attention
from segmentation.configs.recipes import fpn_pvt_setting, upernet_swin_setting
from segmentation.data import IGNORED_LABEL
from segmentation.heads import FPN, FCNHead, FPNHead, UPerHead
from segmentation.metrics import ConfusionMatrix
from segmentation.network import build_segmentor, pixel_cross_entropy, predict
from segmentation.weights import load_segmentor
from tests import golden_rule
from tests.helpers import on_meta
from tests.test_engine import on_processes
from tests.test_models import DATA, PARAMETERS

GOLDEN = json.loads((DATA / "golden_segmentation.json").read_text())
# Millions, of the backbone with its classifier, UPerHead and FCNHead, as the published counts add them up.
PUBLISHED_PARAMETERS = {
    "pcpvt_small": 54.60,
    "pcpvt_base": 74.32,
    "pcpvt_large": 91.48,
    "alt_gvt_small": 54.37,
    "alt_gvt_base": 88.49,
    "alt_gvt_large": 133.81,
}


SETTINGS = {"upernet": upernet_swin_setting, "fpn": fpn_pvt_setting}


@pytest.fixture(scope="module", params=SETTINGS)
def golden(request, tmp_path_factory):
    return request.param, load_golden(request.param, tmp_path_factory.mktemp(request.param)), load_arrays()


def load_arrays():
    return np.load(DATA / "golden_segmentation.npz")


def load_golden(kind: str, folder) -> torch.nn.Module:
    """Return a network with the golden weights, loaded from a file as the original's library writes it."""
    with on_meta():
        model = build_segmentor(SETTINGS[kind]("pcpvt_small"), 150, pretrained=False)
    model.to_empty(device="cpu")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()} | GOLDEN["state"][kind]
    state = {name: torch.from_numpy(value) for name, value in golden_rule.state_from_shapes(shapes).items()}
    path = folder / "released.pth"
    torch.save({"meta": {"epoch": 1}, "state_dict": state}, path)
    report = load_segmentor(model, path)
    assert report.loaded == len(model.state_dict())
    assert set(report.skipped) == {
        f"backbone.{name}" for name in ("norm.weight", "norm.bias", "head.weight", "head.bias")
    }
    return model.eval()


@pytest.mark.parametrize(
    "build",
    [
        lambda: FPN((8, 16, 24, 32), 16),
        lambda: FPNHead(16, 5, 16),
        lambda: UPerHead((8, 16, 24, 32), 5, 16),
        lambda: FCNHead(24, 5, 16),
    ],
    ids=["FPN", "FPNHead", "UPerHead", "FCNHead"],
)
def test_heads_and_neck_start_with_the_published_distributions(build):
    """Over 20 seeds: normal, with a deviation of sqrt(2 / (channels x kernel area of the output)), 0.01 for classes."""
    weights = {}
    for seed in range(20):
        torch.manual_seed(seed)
        for name, layer in build().named_modules():
            if isinstance(layer, torch.nn.Conv2d):
                weights.setdefault(name, []).append(layer.weight.detach())
                assert layer.bias is None or not layer.bias.any()
    for name, drawn in weights.items():
        out_channels, _, height, width = drawn[0].shape
        deviation = 0.01 if name == "conv_seg" else (2 / (out_channels * height * width)) ** 0.5
        shares = torch.stack(drawn).double() / deviation
        assert shares.mean().item() == pytest.approx(0, abs=0.07), name
        assert shares.std().item() == pytest.approx(1, rel=0.05), name
        assert (shares.abs() < 1).double().mean().item() == pytest.approx(0.683, abs=0.03), name


def assert_golden(tensor: torch.Tensor, name: str, arrays, manifest=GOLDEN) -> None:
    assert list(tensor.shape) == manifest["arrays"][name]["shape"]
    sampled = tensor.reshape(-1)[:: manifest["arrays"][name]["stride"]].numpy()
    np.testing.assert_allclose(sampled, arrays[name], atol=1e-3, rtol=1e-4)  # the tolerance of both manifests


@torch.inference_mode()
def test_outputs_equal_the_originals(golden):
    kind, model, arrays = golden
    given = GOLDEN["inputs"]["eval"]
    images = torch.from_numpy(golden_rule.image(given["height"], given["width"], given["seed"]))
    seen = {}  # inputs and outputs of the neck and the decode head
    hooks = [
        part.register_forward_hook(lambda part, inputs, output: seen.update({part: (*inputs, output)}))
        for part in (model.neck, model.decode_head)
    ]
    classes = predict(model, [images], (given["height"], given["width"]))
    for hook in hooks:
        hook.remove()
    maps, neck_maps = seen[model.neck]
    for stage in range(4):
        assert_golden(maps[stage], f"stage{stage}", arrays)
        if kind == "fpn":
            assert_golden(neck_maps[stage], f"fpn_neck{stage}", arrays)
    if kind == "upernet":
        assert_golden(model.auxiliary_head(maps), "upernet_aux_logits", arrays)
    _, logits = seen[model.decode_head]
    assert_golden(logits, f"{kind}_logits", arrays)
    np.testing.assert_allclose(logits.mean((0, 2, 3)), arrays[f"{kind}_class_mean"], atol=1e-4, rtol=1e-4)
    assert (classes.numpy() != arrays[f"{kind}_argmax"]).mean() <= 0.001


@torch.inference_mode()
def test_maps_of_other_sizes_equal_the_originals(golden):
    _, model, arrays = golden
    given = GOLDEN["inputs"]["other_sizes"]
    for height, width in given["sizes"]:
        images = torch.from_numpy(golden_rule.image(height, width, given["seed"]))
        for stage, x in enumerate(model.backbone.forward_intermediates(images, intermediates_only=True)):
            assert_golden(x, f"size_{height}x{width}_stage{stage}", arrays)


def capture(way: str, model: torch.nn.Module, images: torch.Tensor) -> Callable:
    """Return a captured form of a model; `images` are those that it is captured with."""
    if way == "traced":
        return torch.jit.trace(model, images)
    if way == "compiled":
        return torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    if way == "exported":
        sizes = ({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
        return torch.export.export(model, (images,), dynamic_shapes=sizes).module()
    return model


class Maps(torch.nn.Module):
    """The maps of the four stages of a backbone."""

    def __init__(self, backbone: torch.nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.backbone.forward_intermediates(images, intermediates_only=True))


@pytest.mark.parametrize(
    ("setting", "way"),
    [
        (upernet_swin_setting, "eager"),
        (fpn_pvt_setting, "eager"),
        (fpn_pvt_setting, "in_steps"),
        pytest.param(fpn_pvt_setting, "traced", marks=pytest.mark.slow),
        pytest.param(fpn_pvt_setting, "compiled", marks=pytest.mark.slow),
        pytest.param(fpn_pvt_setting, "exported", marks=pytest.mark.slow),
    ],
)
def test_maps_with_padding_on_one_side_equal_the_originals(setting, way):
    """The padding of the released Twins-SVT weights: stages padded on both sides, on one, and not at all."""
    manifest = json.loads((DATA / "golden_segmentation_sizes.json").read_text())
    given, arrays = manifest["inputs"]["eval"], np.load(DATA / "golden_segmentation_sizes.npz")
    with on_meta():
        model = build_segmentor(setting("alt_gvt_small"), 150, pretrained=False).backbone.eval()
    model.to_empty(device="cpu")
    state = golden_rule.state_from_shapes(manifest["state"]["backbone"])
    tensors = {name.removeprefix("backbone."): torch.from_numpy(value) for name, value in state.items()}
    assert not model.load_state_dict(tensors, strict=False).missing_keys
    if way == "in_steps":
        for module in model.modules():
            if isinstance(module, Attention):
                module.fused_attn = False
    images = torch.from_numpy(golden_rule.image(given["height"], given["width"], given["seed"]))
    with torch.no_grad():
        captured = capture(way, Maps(model), images[:, :, :224, :160].clone())
        for stage, x in enumerate(captured(images)):
            assert_golden(x, f"size_{given['height']}x{given['width']}_stage{stage}", arrays, manifest)


@pytest.mark.slow
@torch.no_grad()
def test_losses_equal_the_originals(golden):
    kind, model, arrays = golden
    given = GOLDEN["inputs"]["train"]
    images = torch.from_numpy(golden_rule.image(given["height"], given["width"], given["seed"], given["batch"]))
    heads = [head for head in (model.decode_head, model.auxiliary_head) if head is not None]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for head in heads:
        head.train()
        head.dropout.eval()
    losses = model(images, torch.from_numpy(arrays["labels"]).long())
    model.load_state_dict(state)  # the running statistics have seen a batch
    model.eval()
    expected = {name.removeprefix("loss_"): value for name, value in GOLDEN["losses"]["values"][kind].items()}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    """The published ones less the classifier of 1000 classes and its norm, and with the norms between SVT's stages."""
    with on_meta():
        model = build_segmentor(upernet_swin_setting(name), 150, pretrained=False)
    dims = model.backbone.embed_dims
    classifier = dims[-1] * 1000 + 1000 + 2 * dims[-1]
    stage_norms = 2 * sum(dims) if name.startswith("alt_gvt") else 0
    count = sum(parameter.numel() for parameter in model.parameters())
    assert (count + classifier - stage_norms) / 1e6 == pytest.approx(PUBLISHED_PARAMETERS[name], abs=0.011)


def test_weights_of_another_backbone_are_refused(tmp_path):
    other = build_segmentor(fpn_pvt_setting("alt_gvt_tiny"), 150, pretrained=False)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "svt.pth")
    with pytest.raises(ValueError, match=r"svt\.pth: these weights do not fit the model; .* missing: .*"):
        load_segmentor(build_segmentor(fpn_pvt_setting("pcpvt_tiny"), 150, pretrained=False), tmp_path / "svt.pth")


def test_loss_divides_by_all_pixels():
    logits = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (2, 4, 6), generator=torch.Generator().manual_seed(1))
    labels[0, :2] = IGNORED_LABEL
    shares = logits.log_softmax(dim=1)
    expected = 0.0
    for b, y, x in np.ndindex(2, 4, 6):
        if labels[b, y, x] != IGNORED_LABEL:
            expected -= shares[b, labels[b, y, x], y, x].item()
    assert pixel_cross_entropy(logits, labels).item() == pytest.approx(expected / 48)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return build_segmentor(fpn_pvt_setting("alt_gvt_tiny"), 4, pretrained=False).eval()


def picture(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("size", [(64, 64), (70, 101), (40, 130)])
@torch.inference_mode()
def test_sliding_window_equals_a_loop_over_pixels_and_windows(tiny, size):
    image = picture(*size)
    height, width = size
    sums, counts = torch.zeros(4, height, width), torch.zeros(height, width)
    starts = [sorted({min(start, max(0, side - 64)) for start in range(0, side, 48)}) for side in size]
    for top in starts[0]:
        for left in starts[1]:
            part = tiny(image[:, :, top : top + 64, left : left + 64])[0]
            for y, x in np.ndindex(*part.shape[1:]):
                sums[:, top + y, left + x] += part[:, y, x]
                counts[top + y, left + x] += 1
    expected = (sums / counts).argmax(0)
    assert counts.min() > 0
    assert (predict(tiny, [image], size, window=64, stride=48) == expected).float().mean() > 0.999


@torch.inference_mode()
def test_sizes_and_mirror_images_are_averaged(tiny):
    images = [picture(64, 96), picture(96, 144)]
    shares = []
    for image in images:
        for view in (lambda x: x, lambda x: x.flip(-1)):
            logits = torch.nn.functional.interpolate(tiny(view(image)), size=(50, 80), mode="bilinear")
            shares.append(view(logits.softmax(1)))
    expected = (sum(shares) / 4).argmax(1)[0]
    assert torch.equal(predict(tiny, images, (50, 80), flip=True), expected)


# ------------------------------------------------------------------------------------------------------------ mIoU


def labelled(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predictions and labels of six classes, of which the last occurs in neither."""
    generator = torch.Generator().manual_seed(seed)
    size = (20 + seed, 31)
    predictions, labels = (torch.randint(5, size, generator=generator) for _ in range(2))
    labels[torch.rand(size, generator=generator) < 0.5] = predictions[0, 0]
    labels[0] = IGNORED_LABEL
    return predictions, labels


def naive_figures(images: list) -> dict[str, float]:
    """Count each class by itself."""
    predictions = np.concatenate([p.numpy().ravel() for p, _ in images])
    labels = np.concatenate([t.numpy().ravel() for _, t in images])
    predictions, labels = predictions[labels != IGNORED_LABEL], labels[labels != IGNORED_LABEL]
    ious, accuracies = [], []
    for label in range(6):
        hits = np.sum((predictions == label) & (labels == label))
        union = np.sum((predictions == label) | (labels == label))
        if union:
            ious.append(hits / union)
        if np.sum(labels == label):
            accuracies.append(hits / np.sum(labels == label))
    return {"mIoU": np.mean(ious), "mAcc": np.mean(accuracies), "aAcc": np.mean(predictions == labels)}


def test_figures_equal_naive_counts():
    images = [labelled(seed) for seed in range(5)]
    matrix = ConfusionMatrix(6)
    for image in images:
        matrix.update(*image)
    assert matrix.summary() == pytest.approx(naive_figures(images), rel=1e-12)
    table = matrix.table(["wall", "building", "sky", "floor", "tree", "ceiling"]).splitlines()
    assert len(table) == 7
    assert table[6] == "classes without labelled pixels: ceiling"
    assert float(table[1].split()[1]) == pytest.approx(100 * matrix.per_class()["IoU"][0].item(), abs=0.005)


def figures_of_a_share(rank: int) -> dict[str, float]:
    matrix = ConfusionMatrix(6)
    for seed in range(rank, 5, 2):
        matrix.update(*labelled(seed))
    all_reduce(matrix.counts)
    return matrix.summary()


@pytest.mark.slow
def test_figures_are_exact_for_two_processes(tmp_path):
    matrix = ConfusionMatrix(6)
    for seed in range(5):
        matrix.update(*labelled(seed))
    assert on_processes(2, figures_of_a_share, tmp_path) == [matrix.summary()] * 2
