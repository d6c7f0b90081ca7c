"""The layers for CPUs against torch's own."""

import copy

import pytest
import timm
import torch
from timm.layers import Mlp as TimmMlp
from torch import nn

from models import cpu
from models.cpu import Linear, Mlp


@pytest.fixture
def plain():
    """Return a way to run something with torch's layers."""

    def run(function):
        cpu.set_enabled(False)
        try:
            return function()
        finally:
            cpu.set_enabled(True)

    return run


def build(kind: str) -> tuple[nn.Module, nn.Module]:
    """Return a layer of ours and torch's or timm's with the same parameters."""
    torch.manual_seed(0)
    ours, peer = (Linear(24, 40), nn.Linear(24, 40)) if kind == "linear" else (Mlp(24, 96), TimmMlp(24, 96))
    peer.load_state_dict(ours.state_dict())
    return ours, peer


def run_backward(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return output and gradients of the input and the parameters."""
    x = x.detach().requires_grad_()
    output = layer(x)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator))
    return [output, x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("part_bytes", [4 << 20, 96 * 4 * 10])  # all tokens at once, and 10 at a time
@pytest.mark.parametrize("shape", [(24,), (7, 24), (3, 5, 7, 24), (0, 24)])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_layers_equal_torchs(kind, shape, part_bytes, monkeypatch):
    monkeypatch.setattr(cpu, "PART_BYTES", part_bytes)
    ours, peer = build(kind)
    x = torch.randn(shape)
    for a, b in zip(run_backward(ours, x), run_backward(peer, x), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), peer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_memory_that_is_not_contiguous(kind):
    ours, peer = build(kind)
    x = torch.randn(24, 6, 5).permute(2, 1, 0)
    for a, b in zip(run_backward(ours, x), run_backward(peer, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    results = []
    for layer in (ours, peer):
        layer.zero_grad()
        x = torch.randn(5, 6, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
        layer(x).transpose(0, 1).square().sum().backward()  # so the gradient that arrives is transposed
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_the_mlp_keeps_its_hidden_layer_once():
    ours, peer = build("mlp")
    sizes = []
    for layer in (ours, peer):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.setdefault(x.data_ptr(), x), lambda x: x
        ):
            layer(torch.randn(1000, 24, requires_grad=True))
        sizes.append(sum(x.numel() for x in saved.values()))
    weights = 2 * 24 * 96
    assert sizes[0] <= 1000 * (24 + 96) + weights
    assert sizes[1] >= 1000 * (24 + 2 * 96)


def test_what_is_frozen_gets_no_gradient():
    ours, _ = build("mlp")
    ours.fc1.requires_grad_(False)
    ours(torch.randn(3, 24)).sum().backward()
    assert ours.fc1.weight.grad is None
    assert ours.fc2.weight.grad is not None


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_other_types_are_left_to_torch(kind):
    ours, peer = build(kind)
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), peer(x))
        assert ours(x).dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(ours).double()(x.double()), copy.deepcopy(peer).double()(x.double()))


def test_dropout_is_left_to_torch():
    layer = Mlp(24, 96, drop=0.5).train()
    x = torch.randn(5, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer.fc2(layer.act(layer.fc1(x))))


def test_replaced_and_hooked_layers_take_part():
    layer, _ = build("mlp")
    x = torch.randn(5, 24)
    layer.fc1 = nn.Sequential(layer.fc1, nn.Linear(96, 96))
    torch.testing.assert_close(layer(x), layer.fc2(layer.act(layer.fc1(x))))
    calls = []
    linear = Linear(24, 24)
    linear.register_forward_hook(lambda *_: calls.append(1))
    linear(x)
    assert calls


@pytest.mark.parametrize("name", ["pcpvt_tiny", "alt_gvt_tiny"])
def test_models_are_the_same_without_them(name, plain):
    model = timm.create_model(name, num_classes=5)
    images = torch.randn(2, 3, 96, 70)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        output = model(images)
        output.square().sum().backward()
        return [output, *(parameter.grad for parameter in model.parameters())]

    for a, b in zip(step(), plain(step), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
