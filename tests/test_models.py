"""Tests of the models: outputs of the original, the models of timm, naive loops, and the model API of timm."""

import json
import math
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch.utils._python_dispatch import TorchDispatchMode

import models  # noqa: F401  registers our models
from models.complexity import count_macs
from models.layers import WINDOW_PADDINGS, Block, GlobalSubsampledAttention, LocallyGroupedAttention
from tests import golden_rule
from tests.helpers import on_meta

DATA = Path(__file__).parent / "data"
PARAMETERS = {
    "pcpvt_small": 24_106_216,
    "pcpvt_base": 43_828_456,
    "pcpvt_large": 60_989_672,
    "alt_gvt_small": 24_060_776,
    "alt_gvt_base": 56_070_952,
    "alt_gvt_large": 99_271_400,
}
TIMM_NAMES = {name: f"twins_{name.replace('alt_gvt', 'svt')}" for name in PARAMETERS}
MACS = {  # in 10^9: convolutions, linear layers and norms (README of the original); with attention (paper)
    "pcpvt_small": (3.684, 3.827),
    "pcpvt_base": (6.463, 6.679),
    "pcpvt_large": (9.533, 9.844),
    "alt_gvt_small": (2.824, 2.942),
    "alt_gvt_base": (8.361, 8.590),
    "alt_gvt_large": (14.843, 15.148),
}
TINY = ("pcpvt_tiny", "alt_gvt_tiny")
SIX = [
    pytest.param(name, marks=[] if name.endswith("small") else pytest.mark.slow)  # large models take seconds each
    for name in PARAMETERS
]
ALL = (*TINY, *SIX)


def image(*size: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    return torch.randn(*size[:-2], channels, *size[-2:], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SIX)
@torch.inference_mode()
def test_equals_the_original(name):
    manifest = json.loads((DATA / "golden_classification.json").read_text())
    golden_name = name if name in manifest["inputs"] else f"{name}_v0"
    given = manifest["inputs"][golden_name]
    with on_meta():
        model = timm.create_model(name).eval()
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    state = {key: torch.from_numpy(value) for key, value in golden_rule.state_from_shapes(shapes).items()}
    model.load_state_dict(state, assign=True)
    images = golden_rule.image(given["height"], given["width"], given["seed"], given["batch"])
    logits = model(torch.from_numpy(images)).numpy()
    expected = np.load(DATA / "golden_classification.npz")[golden_name]
    np.testing.assert_allclose(logits, expected, **manifest["tolerance"]["logits"])


@lru_cache(maxsize=2)
@torch.inference_mode(False)
def beside_timms(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return our model and that of timm, with the same weights."""
    with on_meta():
        ours = timm.create_model(name, window_padding="zero")
    theirs = timm.create_model(TIMM_NAMES[name])
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("name", SIX)
@torch.inference_mode()
def test_equals_timm(name):
    ours, theirs = (model.eval() for model in beside_timms(name))
    assert sum(parameter.numel() for parameter in ours.parameters()) == PARAMETERS[name]
    for size in ((1, 224, 224), (1, 250, 333), (2, 96, 160)):
        images = image(*size)
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["pcpvt_small", "alt_gvt_small"])
def test_gradients_equal_those_of_timm(name):
    ours, theirs = beside_timms(name)
    for model in (ours, theirs):
        model.train()(image(2, 96, 160)).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        error = (parameter.grad - expected[key].grad).norm() / expected[key].grad.norm()
        assert error < 1e-4, key


@pytest.mark.parametrize("name", PARAMETERS)
def test_multiply_accumulates(name):
    with on_meta():
        macs = count_macs(name)
    assert [macs.layers / 1e9, macs.total / 1e9] == pytest.approx(MACS[name], abs=1e-3)


def naive_window_attention(lsa: LocallyGroupedAttention, x: torch.Tensor) -> torch.Tensor:
    """Attend in one window at a time, with an explicit softmax over the tokens that take part."""
    B, H, W, C = x.shape
    size, heads = lsa.window_size, lsa.num_heads
    height, width = math.ceil(H / size) * size, math.ceil(W / size) * size
    padded_sides = int(height > H) + int(width > W)
    if lsa.window_padding == "zero" or (lsa.window_padding == "released" and padded_sides == 1):
        padded = x.new_zeros(B, height, width, C)
        padded[:, :H, :W] = x
        x = padded
    out = torch.zeros_like(x)
    for top in range(0, H, size):
        for left in range(0, W, size):
            window = x[:, top : top + size, left : left + size]
            tokens = window.reshape(B, -1, C)
            q, k, v = F.linear(tokens, lsa.qkv.weight, lsa.qkv.bias).chunk(3, dim=-1)
            parts = []
            for part in range(heads):
                head = slice(part * C // heads, (part + 1) * C // heads)
                scores = q[..., head] @ k[..., head].transpose(1, 2) / (C // heads) ** 0.5
                parts.append(scores.softmax(-1) @ v[..., head])
            attended = F.linear(torch.cat(parts, -1), lsa.proj.weight, lsa.proj.bias)
            out[:, top : top + size, left : left + size] = attended.reshape(window.shape)
    return out[:, :H, :W]


@pytest.mark.parametrize("size", [(14, 14), (14, 17), (17, 14), (16, 20), (3, 2), (7, 1), (1, 7)])
@pytest.mark.parametrize("padding", WINDOW_PADDINGS)
@torch.no_grad()
def test_window_attention_equals_a_loop_over_windows(padding, size):
    torch.manual_seed(0)
    lsa = LocallyGroupedAttention(64, num_heads=2, window_size=7, window_padding=padding)
    torch.nn.init.normal_(lsa.qkv.bias)
    x = torch.randn(2, *size, 64)
    torch.testing.assert_close(lsa(x), naive_window_attention(lsa, x), atol=1e-5, rtol=1e-5)


# In each stage: no side padded, the right one, the lower one, both.
@pytest.mark.parametrize("size", [(224, 224), (224, 100), (100, 224), (100, 100)])
@pytest.mark.parametrize("padding", WINDOW_PADDINGS)
@torch.no_grad()
def test_window_paddings_of_each_stage_equal_a_loop_over_windows(padding, size, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("alt_gvt_tiny", window_padding=padding, stage_norm=True).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            torch.nn.init.normal_(parameter)
    images = image(2, *size)
    maps = model.forward_intermediates(images, intermediates_only=True)
    monkeypatch.setattr(LocallyGroupedAttention, "forward", naive_window_attention)
    for found, expected in zip(maps, model.forward_intermediates(images, intermediates_only=True), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_window_paddings_differ_only_at_padding():
    mask = LocallyGroupedAttention(64, 2, 7, "mask")
    zero = LocallyGroupedAttention(64, 2, 7, "zero")
    torch.nn.init.normal_(mask.qkv.bias)
    zero.load_state_dict(mask.state_dict())
    x = torch.randn(1, 14, 17, 64)
    assert torch.equal(mask(x[:, :, :14]), zero(x[:, :, :14]))
    torch.testing.assert_close(mask(x)[:, :, :14], zero(x)[:, :, :14])
    assert (mask(x)[:, :, 14:] - zero(x)[:, :, 14:]).abs().max() > 1e-3


def run_windows(lsa, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output of window attention and the gradients of its input and parameters."""
    x = x.clone().requires_grad_()
    output = lsa(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, *lsa.parameters()])]


@pytest.fixture
def counts(monkeypatch) -> list[int]:
    """List of the numbers of windows, or images, of each call of torch's fused attention."""
    counts = []
    attend = F.scaled_dot_product_attention

    def count(q, *others, **kwargs):
        counts.append(len(q))
        return attend(q, *others, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    return counts


@pytest.mark.parametrize(("most", "expected"), [(12, [12]), (11, [11, 1]), (6, [6, 6]), (5, [5, 5, 2])])
@pytest.mark.parametrize("padding", ["zero", "released"])
def test_many_windows_are_attended_in_chunks(padding, most, expected, monkeypatch, counts):
    torch.manual_seed(0)
    lsa = LocallyGroupedAttention(32, num_heads=2, window_size=7, window_padding=padding)
    x = torch.randn(2, 14, 16, 32)  # 12 windows
    whole = run_windows(lsa, x)
    counts.clear()
    monkeypatch.setattr("models.layers.MOST_WINDOWS", {"cpu": most})
    for found, value in zip(run_windows(lsa, x), whole, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    assert counts == expected


class Conversions(TorchDispatchMode):
    """Mode that lists the shapes of tensors of one size that change their data type."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel = numel
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default and args[0].numel() == self.numel:
            self.shapes.append(list(args[0].shape))
        return output


@pytest.mark.parametrize(
    "attention",
    [
        LocallyGroupedAttention(32, 2, 7),
        GlobalSubsampledAttention(32, 2, sr_ratio=2),
        GlobalSubsampledAttention(32, 2),
    ],
)
def test_a_block_converts_its_inputs_to_the_type_of_autocast_once(attention):
    block = Block(32, attention, mlp_ratio=4)
    x = torch.randn(2, 14, 14, 32, requires_grad=True)
    with Conversions(x.numel()) as seen:
        with torch.autocast("cpu", torch.bfloat16):
            output = block(x)
        output.sum().backward()
    # The inputs of the attention and of the MLP, before they are rearranged; their gradients; those of the two sums.
    assert seen.shapes == [[2, 14, 14, 32]] * 6


@pytest.mark.parametrize("name", ["pcpvt_small", "alt_gvt_small"])
def test_bf16_is_closer_to_fp32_than_that_of_timm(name, monkeypatch):
    """On GPUs autocast computes norms in fp32; then our residual stream is in fp32, and that of timm in bf16."""
    layer_norm = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, *others, **kwargs: layer_norm(x.float(), *others, **kwargs))
    torch.manual_seed(0)
    sizes = {"embed_dims": (32, 64, 96, 128), "depths": (2, 2, 4, 2), "num_heads": (1, 2, 3, 4), "num_classes": 0}
    ours, theirs = timm.create_model(name, **sizes), timm.create_model(TIMM_NAMES[name], **sizes)
    theirs.load_state_dict(ours.state_dict())
    images, direction = image(2, 224, 224), torch.randn(2, 49, 128)
    errors = []
    for model in (ours, theirs):
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                tokens = model.forward_features(images).view(2, 49, 128)
            model.zero_grad()
            (tokens * direction).sum().backward()
            gradients = {key: parameter.grad.flatten() for key, parameter in model.named_parameters()}
            results.append([tokens, torch.cat([gradients[key] for key in sorted(gradients)])])
        errors.append([float((low - full).norm() / full.norm()) for full, low in zip(*results, strict=True)])
    for found, expected in zip(*errors, strict=True):  # 0.0074 and 0.0077 against 0.0094
        assert found < 0.9 * expected


@pytest.mark.parametrize("name", ALL)
def test_timm_contract(name):
    model = timm.create_model(name, num_classes=10, in_chans=1, drop_rate=0.1, drop_path_rate=0.2, img_size=64)
    images = image(2, 64, 64, channels=1)
    logits = model(images)
    assert logits.shape == (2, 10)
    logits.sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []

    model.eval()
    with torch.no_grad():
        tokens = model.forward_features(images)
        assert tokens.shape == (2, 2, 2, model.num_features)
        assert model.forward_head(tokens, pre_logits=True).shape == (2, model.num_features)
        assert torch.equal(model.forward_head(tokens), model(images))
        final, maps = model.forward_intermediates(images, indices=(1, 3))
        assert torch.equal(final, tokens)
        assert [m.shape for m in maps] == [(2, model.embed_dims[1], 8, 8), (2, model.embed_dims[3], 2, 2)]
        (early,) = model.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
        assert torch.equal(early, maps[0])
        (last,) = model.forward_intermediates(images, 1, norm=True, output_fmt="NHWC", intermediates_only=True)
        assert torch.equal(last, tokens)

    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert model.get_classifier() is model.head
    assert model.no_weight_decay() == {key for key, _ in model.named_parameters() if key.startswith("pos_block.")}
    matcher = model.group_matcher()
    layers = timm.models.group_parameters(model, matcher, reverse=True)
    assert layers["patch_embeds.0.proj.weight"] < layers["blocks.0.0.mlp.fc1.weight"] < layers["head.weight"]
    assert layers["blocks.2.1.mlp.fc1.weight"] < layers["patch_embeds.3.proj.weight"] <= layers["norm.weight"]
    assert layers["patch_embeds.3.proj.weight"] == layers["blocks.3.0.mlp.fc1.weight"]

    model.reset_classifier(5)
    assert model(images).shape == (2, 5)
    model.reset_classifier(0, "")
    assert model(images).shape == (2, 2, 2, model.num_features)


@pytest.mark.parametrize("name", ALL)
def test_features_only(name):
    features = timm.create_model(name, features_only=True, out_indices=(0, 2))
    with torch.no_grad():
        maps = features(image(1, 75, 140))
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    assert [tuple(m.shape[2:]) for m in maps] == [(18, 35), (4, 8)]
    assert features.feature_info.reduction() == [4, 16]
    assert len(features.model.blocks) == 3  # unused stages are removed


@pytest.mark.parametrize("name", PARAMETERS)
def test_pretrained_weights_come_from_timms_hub(name):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.hf_hub_id == timm.get_pretrained_cfg(TIMM_NAMES[name]).hf_hub_id == f"timm/{TIMM_NAMES[name]}.in1k"
    assert cfg.has_weights


def test_pretrained_loads_from_a_file(tmp_path):
    donor = timm.create_model("alt_gvt_tiny")
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    model = timm.create_model(
        "alt_gvt_tiny", pretrained=True, num_classes=10, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")}
    )
    assert torch.equal(model.blocks[2][1].attn.q.weight, donor.blocks[2][1].attn.q.weight)


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_names_of_the_original(size):
    with on_meta(), pytest.warns(UserWarning, match="deprecated"):
        model = timm.create_model(f"pcpvt_{size}_v0")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[f"pcpvt_{size}"]


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_tiny(name):
    assert sum(parameter.numel() for parameter in timm.create_model(name).parameters()) < 1.5e6


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (61, 250)])
def test_any_size(name, size):
    model = timm.create_model(name, num_classes=3)
    assert model(image(1, *size)).shape == (1, 3)


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_does_not_change_gradients(name):
    model = timm.create_model(name, num_classes=3)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image(2, 64, 64)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_drop_path_grows_linearly_over_all_blocks():
    model = timm.create_model("alt_gvt_small", drop_path_rate=0.3)
    blocks = [block for stage in model.blocks for block in stage]
    rates = [block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.0 for block in blocks]
    assert rates == pytest.approx([0.3 * i / 17 for i in range(18)])


def test_stage_norm_normalises_the_input_of_the_next_stage():
    plain = timm.create_model("alt_gvt_tiny", features_only=True)
    normed = timm.create_model("alt_gvt_tiny", features_only=True, stage_norm=True)
    extra = set(normed.state_dict()) - set(plain.state_dict())
    assert extra == {f"model.norm_list.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}
    normed.load_state_dict({**normed.state_dict(), **plain.state_dict()})
    images = image(1, 64, 64)
    with torch.no_grad():
        (first, second, *_), (raw, *_) = normed(images), plain(images)
        expected = F.layer_norm(raw.permute(0, 2, 3, 1), raw.shape[1:2], eps=1e-6)
        torch.testing.assert_close(first, expected.permute(0, 3, 1, 2))
        torch.testing.assert_close(second.mean(1), torch.zeros_like(second[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(plain.model._forward_stage(expected, 1), second_stage_input(normed, expected))


def second_stage_input(normed, x: torch.Tensor) -> torch.Tensor:
    """Return the output of the second stage of a normed model without its norm."""
    norm, normed.model.norm_list[1] = normed.model.norm_list[1], torch.nn.Identity()
    try:
        return normed.model._forward_stage(x, 1)
    finally:
        normed.model.norm_list[1] = norm


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"window_padding": "reflect"}, "window_padding 'reflect' is unknown"),
        ({"global_pool": "max"}, "global_pool 'max' is unknown"),
        ({"num_heads": (3, 2, 3, 4)}, "3 attention heads do not divide an embedding of 32"),
        ({"img_size": 16}, "16x16 pixels are too small"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        timm.create_model("alt_gvt_tiny", **kwargs)


def test_small_images_are_refused():
    with pytest.raises(ValueError, match="31x40 pixels are too small"):
        timm.create_model("pcpvt_tiny")(image(1, 31, 40))
