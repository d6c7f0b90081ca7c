"""Attention maps against a loop over all tokens, and Grad-CAM against differences of logits."""

import math

import pytest
import timm
import torch

import models
from models.attention import attention_maps, grad_cam
from tests.test_models import image

SIZES = {"whole windows": (224, 224), "padded": (96, 160), "one side": (224, 160), "small": (64, 64)}


def naive_weights(block, x: torch.Tensor) -> torch.Tensor:
    """Return softmax(q k^T) of GSA `(heads, queries, keys)` for the tokens `(H, W, C)` of an image."""
    attention, x = block.attn, block.norm1(x)
    heads, dim = attention.num_heads, x.shape[-1] // attention.num_heads
    keys = x
    if attention.sr_ratio > 1:
        keys = attention.norm(attention.sr(x.permute(2, 0, 1)[None])[0].permute(1, 2, 0))
    q = attention.q(x).reshape(-1, heads, dim)
    k = attention.kv(keys).reshape(-1, 2, heads, dim)[:, 0]
    return torch.stack([(q[:, i] @ k[:, i].T / math.sqrt(dim)).softmax(dim=1) for i in range(heads)])


def naive_windows(block, x: torch.Tensor) -> torch.Tensor:
    """Return how much attention each token `(H, W)` receives in LSA, by a loop over windows; padding has no part."""
    attention, x = block.attn, block.norm1(x)
    heads, dim, size = attention.num_heads, x.shape[-1] // attention.num_heads, attention.window_size
    received = torch.zeros(x.shape[:2])
    for top in range(0, x.shape[0], size):
        for left in range(0, x.shape[1], size):
            part = x[top : top + size, left : left + size]
            qkv = attention.qkv(part).reshape(-1, 3, heads, dim)
            shares = torch.zeros(qkv.shape[0])
            for head in range(heads):
                shares += (qkv[:, 0, head] @ qkv[:, 1, head].T / math.sqrt(dim)).softmax(dim=1).mean(0) / heads
            received[top : top + size, left : left + size] = shares.view(part.shape[:2])
    return received


@torch.no_grad()
def inputs_of(model, name: str, images: torch.Tensor) -> torch.Tensor:
    """Return the tokens `(B, H, W, C)` that a block gets."""
    tokens = []
    with model.get_submodule(name).register_forward_pre_hook(lambda _, args: tokens.append(args[0])):
        model(images)
    return tokens[0]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", ["alt_gvt_tiny", "pcpvt_tiny"])
@torch.no_grad()
def test_attention_equals_a_plain_softmax(name, size):
    """All blocks: the subsampled grid of GSA, and the windows of LSA, which padding makes smaller."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("attn.q.weight", "attn.kv.weight", "attn.qkv.weight")):
            parameter.mul_(12)  # fresh weights give nearly the same attention to all keys
    models.cpu.accelerate(model)
    images = image(2, *size)
    blocks = [f"blocks.{stage}.{i}" for stage, part in enumerate(model.blocks) for i in range(len(part))]
    logits = model(images)
    maps = attention_maps(model, images, blocks)
    assert list(maps) == blocks
    largest = 0.0
    for block in blocks:
        module = model.get_submodule(block)
        for tokens, found in zip(inputs_of(model, block, images), maps[block], strict=True):
            if hasattr(module.attn, "sr_ratio"):
                rows, cols = (side // module.attn.sr_ratio for side in tokens.shape[:2])
                expected = naive_weights(module, tokens).mean(dim=(0, 1)).view(rows, cols)
            else:
                expected = naive_windows(module, tokens)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            largest = max(largest, (expected.max() / expected.mean()).item())
    assert largest > 1.2
    assert torch.equal(model(images), logits)  # the model is as before
    assert all(module.fused_attn for module in model.modules() if hasattr(module, "fused_attn"))


def test_grad_cam_follows_the_logits():
    """The gradient is that of finite differences; positions that speak against the class are zero."""
    torch.manual_seed(0)
    model = (
        timm.create_model("pcpvt_tiny", num_classes=5, embed_dims=(8, 8, 12, 16), num_heads=(1, 1, 2, 2))
        .double()
        .eval()
    )
    images = image(2, 64, 96).double()
    classes = torch.tensor([3, 1])
    cam = grad_cam(model, images, classes)
    assert cam.shape == (2, 4, 6)
    assert cam.min() >= 0
    tokens = []
    with model.blocks[2].register_forward_hook(lambda _, args, output: tokens.append(output)):
        model(images)
    tokens = tokens[0].detach()
    step, importance = 1e-6, torch.zeros(2, tokens.shape[-1], dtype=torch.float64)
    for channel in range(tokens.shape[-1]):
        change = torch.zeros_like(tokens)
        change[..., channel] = step
        sides = []
        for sign in (1, -1):
            with model.blocks[2].register_forward_hook(lambda _, args, output, s=sign, c=change: output + s * c):
                sides.append(model(images).detach().gather(1, classes[:, None])[:, 0])
        importance[:, channel] = (sides[0] - sides[1]) / (2 * step) / (4 * 6)  # mean over the positions
    expected = (importance[:, None, None] * tokens).sum(-1).clamp(min=0)
    torch.testing.assert_close(cam, expected, rtol=1e-4, atol=1e-8)
    assert expected.max() > 0


def test_unknown_blocks_are_refused():
    model = timm.create_model("alt_gvt_tiny").eval()
    with pytest.raises(models.TwinsError, match=r"block 'blocks.9.0' is unknown; choose from blocks.0.0 to blocks.3.0"):
        attention_maps(model, image(1, 64, 64), ["blocks.9.0"])
