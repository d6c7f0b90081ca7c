"""Tests of the fast CPU layers against those of torch and timm."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import cpu
from models.cpu import accelerate
from tests.helpers import ROOT


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


def build(kind: str) -> tuple[nn.Module, nn.Module]:
    """Return a fast layer, and the layer of torch or timm with the same parameters."""
    torch.manual_seed(0)
    peer = nn.Linear(24, 40) if kind == "linear" else Mlp(24, 96)
    return accelerate(copy.deepcopy(peer)), peer


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
    layer = accelerate(Mlp(24, 96, drop=0.5)).train()
    x = torch.randn(5, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer.fc2(layer.act(layer.fc1(x))))


def test_dropout_in_training_mode_of_a_model_in_evaluation_mode():
    layer = accelerate(Mlp(24, 96, drop=0.5)).eval()
    layer.drop1.train()
    x = torch.randn(5, 24)
    assert not torch.equal(layer(x), layer(x))


def test_a_backward_pass_is_counted():
    counts = []
    for layer in build("mlp"):
        output = layer(torch.randn(5, 24, requires_grad=True)).sum()
        with FlopCounterMode(display=False) as counter:
            output.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 2 * 5 * 24 * 96


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("fc1", nn.Linear(24, 96)),
        ("act", nn.ReLU()),
        ("drop1", nn.ReLU()),
        ("norm", nn.LayerNorm(96)),
        ("fc2", nn.Linear(96, 24)),
        ("drop2", nn.Tanh()),
    ],
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


def count_flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 64, 64)).sum().backward()
        with torch.no_grad():
            model(torch.randn(1, 3, 64, 64))
    return counter.get_total_flops()


def profile_flops(model: nn.Module) -> int:
    with torch.profiler.profile(with_flops=True) as profiler, torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    return sum(event.flops for event in profiler.key_averages())


@pytest.mark.parametrize("count", [count_flops, profile_flops])
def test_operations_are_counted(count, calls):
    model = timm.create_model("alt_gvt_tiny").eval()
    expected = count(model)
    assert expected > 1e7
    assert count(accelerate(model)) == expected
    assert not calls


def test_models_have_the_layers_of_torch_and_timm_unless_accelerated(calls):
    model = timm.create_model("alt_gvt_tiny", num_classes=5)
    plain = {name: type(module) for name, module in model.named_modules()}
    names = list(model.state_dict())
    assert list(plain.values()).count(nn.Linear) == 31
    assert list(plain.values()).count(Mlp) == 7
    model(torch.randn(1, 3, 64, 64))
    assert not calls
    assert accelerate(model) is model
    assert not {nn.Linear, Mlp} & set(map(type, model.modules()))
    assert list(model.state_dict()) == names
    model(torch.randn(1, 3, 64, 64))
    assert calls
    accelerate(model, enabled=False)
    assert {name: type(module) for name, module in model.named_modules()} == plain


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_traced_layers_are_those_of_torch(kind):
    layer, peer = build(kind)
    graphs = [torch.jit.trace(module, torch.randn(3, 24)).inlined_graph for module in (layer, peer)]
    found, expected = ([node.kind() for node in graph.nodes()] for graph in graphs)
    assert found == expected


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def parametrise(layer: nn.Linear) -> None:
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())


def replace_weight(layer: nn.Linear) -> None:
    weight = layer.weight.detach() * 2
    del layer.weight
    layer.weight = weight


def patch_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize("change", [parametrise, replace_weight, patch_forward])
@pytest.mark.parametrize("part", ["", "fc1", "fc2"])
def test_changed_layers_are_computed_by_torch(change, part, calls):
    ours, peer = build("mlp" if part else "linear")
    for layer in (ours, peer):
        change(layer.get_submodule(part))
    x = torch.randn(5, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), peer(x))
    assert len(calls) == (1 if part else 0)  # the other layer of the MLP is fast


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_layers_with_global_hooks_are_computed_by_torch(kind, calls):
    ours, _ = build(kind)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        ours(torch.randn(5, 24))
    finally:
        handle.remove()
    assert type(ours) in seen
    assert not calls


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_replaced_function_of_torch_is_called(kind, calls, monkeypatch):
    ours, peer = build(kind)
    monkeypatch.setattr(nn.functional, "linear", lambda x, weight, bias: 2 * (x @ weight.T) + bias)
    x = torch.randn(5, 24)
    torch.testing.assert_close(ours(x), peer(x))
    assert not calls


def test_all_linear_layers_of_a_model_can_be_quantised():
    model = timm.create_model("alt_gvt_tiny").eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert sum(isinstance(module, torch.ao.nn.quantized.dynamic.Linear) for module in quantised.modules()) == 31
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(quantised(images), model(images), rtol=0.1, atol=0.02)


PRIVATE = [
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._len_torch_dispatch_stack",
    "torch.autograd.profiler._is_profiler_enabled",
    "torch.autograd.forward_ad._current_level",
    "torch.ops.mkldnn._linear_pointwise",
]
WITHOUT = """
import timm, torch  # before the removal, because they may call the function when imported
{removal}
import models
from models import cpu
model = cpu.accelerate(timm.create_model("alt_gvt_tiny", num_classes=3))
model(torch.randn(2, 3, 64, 64)).sum().backward()
model.eval()(torch.randn(2, 3, 64, 64))
print(cpu.AVAILABLE, type(model.blocks[0][0].mlp) is cpu.Mlp)
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

    def step(model: nn.Module) -> list[torch.Tensor]:
        output = model(images)
        output.square().sum().backward()
        return [output, *(parameter.grad for parameter in model.parameters())]

    for a, b in zip(step(accelerate(copy.deepcopy(model))), step(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
