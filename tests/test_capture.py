"""Tests of captured graphs: compiled, exported, traced and symbolically traced models, at sizes other than captured."""

import os

import pytest
import timm
import torch
from timm.layers import set_fused_attn

import models  # noqa: F401  registers our models
from models.layers import WINDOW_PADDINGS, LocallyGroupedAttention
from tests.test_models import TINY, image

# Sizes of which maps are multiples of the window and others are not, in both directions and in one; and maps of one
# window and of several, in each stage.
SIZES = [(64, 96), (160, 160), (224, 160), (96, 224), (224, 224), (225, 230), (256, 256), (480, 640)]
SMALL = (32, 32)  # the last map has one token; torch gives sides of length one a graph of their own
MODELS = [
    ("pcpvt_tiny", {}),
    ("alt_gvt_tiny", {"window_padding": "mask"}),
    ("alt_gvt_tiny", {"window_padding": "zero"}),
    ("alt_gvt_tiny", {"window_padding": "released"}),
]
DYNAMIC = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)


def build(name: str, kwargs: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **kwargs).eval()


@torch.no_grad()
def check_sizes(captured, model: torch.nn.Module, sizes: list[tuple[int, int]], batches=(3, 1)) -> None:
    """Check that a captured model and the model itself have the same outputs."""
    for batch in batches:
        for size in sizes:
            images = image(batch, *size)
            torch.testing.assert_close(captured(images), model(images), rtol=0, atol=1e-5)


def step(model, images: torch.Tensor, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the output of a model and, in training mode, the gradients of its parameters."""
    if not model.training:
        with torch.no_grad():
            return {"output": model(images)}
    output = model(images)
    gradients = torch.autograd.grad(output.square().sum(), parameters.values())
    return {"output": output, **dict(zip(parameters, gradients, strict=True))}


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_compile_without_graph_breaks(name, train):
    model = timm.create_model(name, num_classes=3).train(train)
    parameters = dict(model.named_parameters())
    images = image(2, 64, 96)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = step(model, images, parameters)
    for key, value in step(compiled, images, parameters).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


@pytest.fixture
def graphs():
    """List for the captured graphs. Equal sides of the first image stay two sizes."""
    torch._dynamo.reset()
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        yield []


@pytest.mark.slow
@pytest.mark.parametrize(("padding", "train"), [("mask", True), ("zero", False), ("released", False)])
def test_one_compiled_graph_for_all_sizes(padding, train, graphs):
    model = build("alt_gvt_tiny", {"window_padding": padding}).train(train)
    parameters = dict(model.named_parameters())

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for number, sizes in ((1, [(224, 224), *SIZES]), (2, [SMALL])):
        for size in sizes:
            images = image(3, *size)
            expected = step(model, images, parameters)
            for key, value in step(compiled, images, parameters).items():
                torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5)
        assert len(graphs) == number


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_windows_are_attended_in_chunks_in_compiled_graphs(dynamic, graphs, monkeypatch):
    lsa = LocallyGroupedAttention(32, num_heads=2, window_size=7)
    parameters = dict(lsa.named_parameters())
    x = torch.randn(2, 14, 16, 32)  # 12 windows, and a spare one
    expected = step(lsa, x, parameters)
    monkeypatch.setattr("models.layers.MOST_WINDOWS", {"cpu": 5})

    def count(graph, inputs):
        graphs.append(str(graph.graph).count("scaled_dot_product_attention"))
        return graph.forward

    compiled = torch.compile(lsa, backend=count, fullgraph=True, dynamic=dynamic)
    for key, value in step(compiled, x, parameters).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    assert graphs == [3]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kwargs"), MODELS)
def test_one_exported_program_for_all_sizes(name, kwargs):
    model = build(name, kwargs)
    exported = torch.export.export(model, (image(2, 224, 224),), dynamic_shapes=DYNAMIC).module()
    check_sizes(exported, model, SIZES)
    with pytest.raises(AssertionError, match="Guard failed"):
        exported(image(2, *SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (64, 96), (256, 256)])
def test_one_exported_program_of_a_single_image_for_all_sizes(size):
    """The batch is a constant of the program, so that the number of windows can be one."""
    model = build("alt_gvt_tiny", {})
    exported = torch.export.export(
        model, (image(1, *size),), dynamic_shapes=({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    )
    check_sizes(exported.module(), model, SIZES, batches=[1])


@pytest.mark.slow
@pytest.mark.skipif("TWINS_AOTI" not in os.environ, reason="takes minutes of a C++ compiler; set TWINS_AOTI=1")
@pytest.mark.parametrize("padding", WINDOW_PADDINGS)
def test_one_ahead_of_time_compiled_program_for_all_sizes(padding, tmp_path):
    dims = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1)}
    model = build("alt_gvt_tiny", {"window_padding": padding, **dims})
    exported = torch.export.export(model, (image(2, 224, 224),), dynamic_shapes=DYNAMIC)
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "twins.pt2"))
    check_sizes(torch._inductor.aoti_load_package(path), model, SIZES)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kwargs"), MODELS)
def test_one_trace_for_all_sizes(name, kwargs):
    model = build(name, kwargs)
    check_sizes(torch.jit.trace(model, image(1, 160, 160)), model, [SMALL, *SIZES])


@pytest.mark.parametrize("stage_norm", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_feature_extractors_of_timm(name, stage_norm):
    images = image(2, 64, 97)
    maps = {}
    for kind in ("getter", "hook", "fx"):
        torch.manual_seed(0)
        extractor = timm.create_model(name, features_only=True, feature_cls=kind, stage_norm=stage_norm).eval()
        with torch.no_grad():
            maps[kind] = extractor(images)
    for kind in ("hook", "fx"):  # channels-last, as timm's own extractors give them
        for found, expected in zip(maps[kind], maps["getter"], strict=True):
            assert torch.equal(found.permute(0, 3, 1, 2), expected)


@pytest.fixture
def attention_in_steps():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@pytest.mark.parametrize(("name", "kwargs"), MODELS)
def test_attention_in_steps_equals_fused_attention(name, kwargs, attention_in_steps):
    in_steps = build(name, kwargs)
    set_fused_attn(True)
    fused = build(name, kwargs)
    images = image(2, 96, 70)
    gradients = []
    for model in (in_steps, fused):
        torch.manual_seed(0)
        model.train()
        output = model(images)
        gradients.append([output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_of_attention_weights_in_both_ways(rate, attention_in_steps):
    """Fused and in steps, weights are dropped in training alone."""
    for fused in (False, True):
        set_fused_attn(fused)
        model = build("alt_gvt_tiny", {"attn_drop_rate": rate})
        images = image(1, 64, 64)
        outputs = [model.train(train)(images) for train in (False, False, True, True)]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[2], outputs[3]) == (rate == 0)
