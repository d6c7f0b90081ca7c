"""The interface that timm's own tests require of its models, and timm's utilities, for all entry points.

Beyond the size of the images, `test_models.py` tests the numbers of this interface.
"""

import copy

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.models import get_notrace_functions, get_notrace_modules, register_model
from timm.utils import AttentionExtract
from timm.utils.model import freeze, unfreeze
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import models
from models import twins
from tests.helpers import on_meta
from tests.test_models import TINY, image

SLOW = [pytest.param(name, marks=[] if name in TINY else pytest.mark.slow) for name in models.list_models()]
TIMM = pytest.mark.client("timm", "timm")  # a row in the table of docs/clients.md
LAST = 3  # index of the last stage


def create(name: str, **kwargs) -> torch.nn.Module:
    """Create a model; those that are not tiny have full widths, but few blocks."""
    depths = {} if name in TINY else {"depths": (1, 1, 2, 1)}
    return timm.create_model(name, **depths, **kwargs)


@TIMM
@pytest.mark.parametrize("name", SLOW)
def test_default_configuration(name):
    """`create_model`: the default configuration, and shapes without pooling or head"""
    with on_meta():
        model = create(name).eval()
    config = model.default_cfg
    assert {f"{config['first_conv']}.weight", f"{config['classifier']}.weight"} < set(model.state_dict())
    assert model.in_chans == config["input_size"][0]
    images = torch.empty(1, *config["input_size"], device="meta")
    tokens = model.forward_features(images)
    assert tokens.shape == (1, *config["pool_size"], model.num_features)
    assert model.forward_head(tokens, pre_logits=True).shape == (1, model.head_hidden_size)
    for kwargs, shape in (({}, tokens.mean((1, 2)).shape), ({"global_pool": ""}, tokens.shape)):
        model.reset_classifier(0, **kwargs)
        with on_meta():
            headless = create(name, num_classes=0, **kwargs)
        assert model(images).shape == headless(images).shape == shape
    assert model.to(torch.bfloat16)(images.bfloat16()).dtype == torch.bfloat16


@TIMM
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", TINY)
def test_device_and_data_type_of_the_constructor(name, device):
    """`create_model` with `device` and `dtype`"""
    model = timm.create_model(name, device=device, dtype=torch.float64)
    assert {(value.device.type, value.dtype) for value in model.parameters()} == {(device, torch.float64)}
    assert model(image(1, 32, 32).to(device, torch.float64)).dtype == torch.float64
    with pytest.raises(TypeError, match="unknown_argument"):
        timm.create_model(name, unknown_argument=1)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_a_new_classifier_is_like_the_model(name, train):
    model = timm.create_model(name, device="meta", dtype=torch.float64).train(train)
    model.reset_classifier(0)
    model.reset_classifier(2)
    assert {(value.device.type, value.dtype) for value in model.get_classifier().parameters()} == {
        ("meta", torch.float64)
    }
    assert {module.training for module in model.modules()} == {train}
    model.requires_grad_(False)
    for kwargs in ({}, {"global_pool": ""}):
        model.reset_classifier(0, **kwargs)
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", SLOW)
def test_forward_and_backward(name):
    """Without and with recomputation of the blocks, and by `forward_intermediates`."""
    model = create(name, num_classes=42)
    images = image(2, 32, 32)
    logits = model(images)
    logits.mean().backward()
    assert logits.shape == (2, 42)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    tokens, maps = model.forward_intermediates(images)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images), logits)
    recomputed_tokens, recomputed_maps = model.forward_intermediates(images)
    torch.testing.assert_close(model.forward_features(images), tokens)
    torch.testing.assert_close([recomputed_tokens, *recomputed_maps], [tokens, *maps])


@TIMM
@pytest.mark.parametrize("feature_cls", ["getter", "hook", "fx"])
@pytest.mark.parametrize("name", SLOW)
@torch.no_grad()
def test_features(name, feature_cls):
    """`features_only` by getter, hooks and FX: the maps equal those of `forward_intermediates`"""
    features = create(name, features_only=True, feature_cls=feature_cls).eval()
    model = create(name).eval()
    state = {key.split(".", 1)[1]: value for key, value in features.state_dict().items()}
    model.load_state_dict(state, strict=False)
    images = image(1, 64, 96)
    maps = features(images)
    layout = "NCHW" if maps[0].shape[1] == features.feature_info.channels()[0] else "NHWC"
    torch.testing.assert_close(
        maps, model.forward_intermediates(images, output_fmt=layout, intermediates_only=True), rtol=0, atol=0
    )
    for tokens, channels, reduction in zip(
        maps, features.feature_info.channels(), features.feature_info.reduction(), strict=True
    ):
        height, width, depth = 64 // reduction, 96 // reduction, channels
        assert tokens.shape[1:] == ((depth, height, width) if layout == "NCHW" else (height, width, depth))


@pytest.mark.parametrize("name", SLOW)
def test_pruning(name):
    """A pruned model has the maps of the whole one and no unused parameters; features end at the last map."""
    model = create(name).eval()
    images = image(2, 64, 64)
    with torch.no_grad():
        logits, maps = model(images), model.forward_intermediates(images, intermediates_only=True)
        whole = copy.deepcopy(model)
        whole.prune_intermediate_layers([LAST], prune_head=False)
        assert torch.equal(whole(images), logits)
    for index, expected in enumerate(maps):
        pruned = copy.deepcopy(model)
        indices = pruned.prune_intermediate_layers([index], prune_norm=True)
        (found,) = pruned.forward_intermediates(images, indices=indices, intermediates_only=True)
        assert torch.equal(found, expected)
        features = pruned.forward_features(images)
        assert torch.equal(features.permute(0, 3, 1, 2), expected)
        features.sum().backward()
        assert [key for key, parameter in pruned.named_parameters() if parameter.grad is None] == []


def trace(model: torch.nn.Module) -> torch.nn.Module:
    """Trace a model by FX as timm does; the result returns the output under the name of its node."""
    options = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=options)
    last = {"train_return_nodes": train_nodes[-1:], "eval_return_nodes": eval_nodes[-1:]}
    return create_feature_extractor(model, **last, tracer_kwargs=options)


@TIMM
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", SLOW)
def test_fx(name, train):
    """FX tracing: outputs and gradients of the traced model, at several sizes"""
    model = create(name, num_classes=3).train(train)
    traced = trace(model).train(train)
    for size in ((2, 32, 32), (1, 64, 96), (1, 225, 230)):
        (output,) = traced(image(*size)).values()
        expected = model(image(*size))
        torch.testing.assert_close(output, expected)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(output.square().sum(), [traced.get_parameter(key) for key in parameters])
    for key, found, gradient in zip(
        parameters, gradients, torch.autograd.grad(expected.square().sum(), parameters.values()), strict=True
    ):
        torch.testing.assert_close(found, gradient, msg=key)


@pytest.fixture
def unfused():
    """Create models whose attention is computed by separate operations."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_unfused_attention_equals_fused(name, unfused):
    plain = timm.create_model(name).eval()
    set_fused_attn(True)
    fused = timm.create_model(name).eval()
    fused.load_state_dict(plain.state_dict())
    for size in ((1, 224, 224), (2, 75, 140)):
        torch.testing.assert_close(plain(image(*size)), fused(image(*size)), rtol=0, atol=1e-5)


def attend_naively(block, tokens: torch.Tensor) -> torch.Tensor:
    """Return the weights of the attention of a block, `(B * windows, heads, queries, keys)`, without padding."""
    attention, x = block.attn, block.norm1(tokens)
    if hasattr(attention, "qkv"):
        C = x.shape[-1]
        size = attention.window_size
        windows = x.permute(0, 3, 1, 2).unfold(2, size, size).unfold(3, size, size)  # (B, C, rows, cols, size, size)
        windows = windows.permute(0, 2, 3, 4, 5, 1).reshape(-1, size**2, C)
        q, k, _ = attention.qkv(windows).chunk(3, dim=-1)
    else:
        q = attention.q(x).flatten(1, 2)
        keys = attention.norm(attention.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).flatten(1, 2)
        k, _ = attention.kv(keys).chunk(2, dim=-1)
    q, k = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (q, k))
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)


@TIMM
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_attention_maps(name, unfused):
    """`AttentionExtract`: the attention of all blocks, equal to a softmax by hand"""
    model = timm.create_model(name).eval()
    images = image(2, 224, 224)
    maps = AttentionExtract(model, method="hook")(images)
    blocks = [f"blocks.{stage}.{index}" for stage, part in enumerate(model.blocks) for index in range(len(part))]
    assert [key.removesuffix(".attn.attn_drop") for key in maps] == blocks
    first = model.patch_embeds[0](images.permute(0, 2, 3, 1))
    torch.testing.assert_close(maps["blocks.0.0.attn.attn_drop"], attend_naively(model.blocks[0][0], first))
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@torch.no_grad()
def test_attention_maps_by_fx(unfused):
    model = timm.create_model("pcpvt_tiny").eval()
    images = image(1, 64, 96)
    maps = AttentionExtract(model, method="fx")(images)
    torch.testing.assert_close(list(maps.values()), list(AttentionExtract(model, method="hook")(images).values()))
    assert len(maps) == sum(map(len, model.blocks))


def test_a_variant_without_a_default_configuration_has_that_of_the_others(caplog):
    def alt_gvt_mine(pretrained=False, **kwargs):
        return twins._create(
            "alt_gvt_mine", pretrained, kwargs, window_size=7, embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4)
        )

    register_model(alt_gvt_mine)
    model = timm.create_model("alt_gvt_mine", num_classes=5)
    assert not caplog.records
    expected = timm.create_model("alt_gvt_tiny").pretrained_cfg
    for key in ("input_size", "crop_pct", "interpolation", "mean", "std", "first_conv", "classifier"):
        assert model.pretrained_cfg[key] == expected[key]
    assert (model.head.out_features, model.pretrained_cfg["architecture"]) == (5, "alt_gvt_mine")


@TIMM
@pytest.mark.parametrize("name", TINY)
def test_freezing(name):
    """`freeze` and `unfreeze` of stages"""
    model = timm.create_model(name)
    freeze(model, ["patch_embeds", "blocks.0"])
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad != key.startswith(("patch_embeds.", "blocks.0.")), key
    unfreeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
