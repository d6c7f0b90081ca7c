"""Tests of the fast CPU layers against those of torch and timm."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
from timm.layers import Mlp as TimmMlp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import cpu
from models.cpu import Linear, Mlp
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    monkeypatch.setattr(cpu, "LEAST_PRODUCTS", 1)


@pytest.fixture
def calls(monkeypatch):
    """List of the calls of oneDNN by the fast layers."""
    made = []

    def count(x, *others):
        made.append(x.shape)
        return multiply(x, *others)

    multiply = cpu._multiply
    monkeypatch.setattr(cpu, "_multiply", count)
    return made


def run_plain(function):
    """Return the result of a function with the fast layers disabled."""
    before = cpu._enabled
    cpu.set_enabled(False)
    try:
        return function()
    finally:
        cpu.set_enabled(before)


def build(kind: str) -> tuple[nn.Module, nn.Module]:
    """Return a fast layer, and the layer of torch or timm with the same parameters."""
    torch.manual_seed(0)
    if kind == "linear":
        ours, peer = Linear(24, 40), nn.Linear(24, 40)
    else:
        ours, peer = Mlp(24, 96), TimmMlp(24, 96)
    peer.load_state_dict(ours.state_dict())
    return ours, peer


def run_backward(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output and the gradients of the input and the parameters."""
    x = x.detach().requires_grad_()
    output = layer(x)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator))
    return [output, x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("part_bytes", [4 << 20, 96 * 4 * 10])  # all tokens at once, and 10 at a time
@pytest.mark.parametrize("shape", [(24,), (7, 24), (3, 5, 7, 24), (0, 24)])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_layers_equal_those_of_torch(kind, shape, part_bytes, monkeypatch):
    monkeypatch.setattr(cpu, "PART_BYTES", part_bytes)
    ours, peer = build(kind)
    x = torch.randn(shape)
    for a, b in zip(run_backward(ours, x), run_backward(peer, x), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), peer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_non_contiguous_tensors(kind):
    ours, peer = build(kind)
    x = torch.randn(24, 6, 5).permute(2, 1, 0)
    for a, b in zip(run_backward(ours, x), run_backward(peer, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    results = []
    for layer in (ours, peer):
        layer.zero_grad()
        x = torch.randn(5, 6, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
        layer(x).transpose(0, 1).square().sum().backward()  # so that the gradient of the output is transposed
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_the_mlp_saves_its_hidden_layer_once():
    ours, peer = build("mlp")
    sizes = []
    for layer in (ours, peer):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.setdefault(x.data_ptr(), x), lambda x: x
        ):
            layer(torch.randn(1000, 24, requires_grad=True))
        sizes.append(sum(x.numel() for x in saved.values()))
    weights = 2 * 24 * 96 + 96
    assert sizes[0] <= 1000 * (24 + 96) + weights
    assert sizes[1] >= 1000 * (24 + 2 * 96)


def test_frozen_layers_get_no_gradient():
    ours, _ = build("mlp")
    ours.fc1.requires_grad_(False)
    ours(torch.randn(3, 24)).sum().backward()
    assert ours.fc1.weight.grad is None
    assert ours.fc2.weight.grad is not None


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_other_data_types_are_computed_by_torch(kind):
    ours, peer = build(kind)
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), peer(x))
        assert ours(x).dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(ours).double()(x.double()), copy.deepcopy(peer).double()(x.double()))


def test_dropout_is_computed_by_torch():
    layer = Mlp(24, 96, drop=0.5).train()
    x = torch.randn(5, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer.fc2(layer.act(layer.fc1(x))))


@pytest.mark.parametrize(
    ("part", "other"),
    [("fc1", nn.Linear(24, 96)), ("act", nn.ReLU()), ("norm", nn.LayerNorm(96)), ("fc2", nn.Linear(96, 24))],
)
def test_replaced_layers_of_an_mlp_are_called(part, other):
    layer, peer = build("mlp")
    for mlp in (layer, peer):
        setattr(mlp, part, other)
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), peer(x))


@pytest.mark.parametrize("part", ["fc1", "act", "drop1", "norm", "fc2", "drop2"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_inside_an_mlp_are_called(part, kind):
    layer, _ = build("mlp")
    seen = []
    getattr(getattr(layer, part), kind)(lambda *_: seen.append(part))
    layer(torch.randn(5, 24, requires_grad=True)).sum().backward()
    assert seen == [part]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_gradients_of_gradients(kind):
    results = []
    for layer in build(kind):
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(3)).requires_grad_()
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_functional_transforms(kind):
    ours, peer = build(kind)
    x, v = torch.randn(2, 5, 24)
    for a, b in zip(torch.func.jvp(ours, (x,), (v,)), torch.func.jvp(peer, (x,), (v,)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        a, b = (torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent for layer in (ours, peer))
        torch.testing.assert_close(a, b)
    for transform in (torch.vmap, lambda f: torch.func.jacrev(lambda x: f(x).sum(0))):
        torch.testing.assert_close(transform(ours)(x), transform(peer)(x))


def test_small_layers_and_errors_are_left_to_torch(calls, monkeypatch):
    ours, _ = build("linear")
    ours(torch.randn(5, 24))
    assert len(calls) == 1
    monkeypatch.setattr(cpu, "LEAST_PRODUCTS", 5 * 24 * 40 + 1)
    ours(torch.randn(5, 24))
    assert len(calls) == 1  # too small
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ours(torch.randn(500, 23))
    with pytest.raises(RuntimeError, match="same dtype"):
        ours.double()(torch.randn(500, 24))


def test_operations_are_counted():
    model = timm.create_model("alt_gvt_tiny")

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, 64, 64)).sum().backward()
            with torch.no_grad():
                model(torch.randn(1, 3, 64, 64))
        return counter.get_total_flops()

    assert count() == run_plain(count)


PRIVATE = [
    "torch._C._functorch.peek_interpreter_stack",
    "torch.autograd.forward_ad._current_level",
    "torch.ops.mkldnn._linear_pointwise",
]
WITHOUT = """
import timm, torch  # before the removal, because they may call the function when imported
{removal}
import models
from models import cpu
model = timm.create_model("alt_gvt_tiny", num_classes=3)
model(torch.randn(2, 3, 64, 64)).sum().backward()
cpu.set_enabled(True)
model.eval()(torch.randn(2, 3, 64, 64))
print(cpu.AVAILABLE, cpu._enabled)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *PRIVATE])
def test_models_work_without_private_functions_of_torch(name):
    removal = f"del {name}" if name else ""
    if name and "ops" in name:  # a deleted operator would be looked up again
        removal = f"{name} = None"
    code = WITHOUT.format(removal=removal)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    expected = torch.backends.mkldnn.is_available() and name is None
    assert result.stdout.split() == [str(expected)] * 2


@pytest.mark.parametrize("name", ["pcpvt_tiny", "alt_gvt_tiny"])
def test_models_equal_those_with_layers_of_torch(name):
    model = timm.create_model(name, num_classes=5)
    images = torch.randn(2, 3, 96, 70)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        output = model(images)
        output.square().sum().backward()
        return [output, *(parameter.grad for parameter in model.parameters())]

    for a, b in zip(step(), run_plain(step), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
