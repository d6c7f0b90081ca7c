"""Tests of the models on a GPU: against the CPU, against themselves compiled, and that no step waits for the GPU."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import models  # noqa: F401  registers our models
from models.layers import WINDOW_PADDINGS, LocallyGroupedAttention
from tests.test_models import TINY, image

DEVICE = "cuda"
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
MODELS = [("pcpvt_tiny", {}), *(("alt_gvt_tiny", {"window_padding": padding}) for padding in WINDOW_PADDINGS)]
# In each stage of SVT: no side padded, the right one, the lower one, both; and a size that no stride divides.
SIZES = [(224, 224), (224, 100), (100, 224), (100, 100), (250, 333)]
# (batch, heads, queries, keys, channels of a head) of the stages of SVT-S: windows of 7x7 tokens, and GSA.
LSA_SHAPES = [(512, 2, 49, 49, 32), (64, 8, 49, 49, 32), (64, 16, 49, 49, 32)]
GSA_SHAPES = [(4, 2, 3136, 49, 32), (4, 8, 196, 49, 32), (4, 16, 49, 49, 32), (2, 1, 5000, 70, 64), (2, 5, 196, 49, 64)]
BACKENDS = [
    (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
    (SDPBackend.FLASH_ATTENTION, torch.float16),
    (SDPBackend.EFFICIENT_ATTENTION, torch.bfloat16),
    (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
    (SDPBackend.CUDNN_ATTENTION, torch.bfloat16),
    (SDPBackend.CUDNN_ATTENTION, torch.float16),
]


@pytest.fixture(autouse=True)
def _fp32():
    """Switch TF32 off."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(precision)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference, relative to that of the expected tensor."""
    expected = expected.detach().double().cpu()
    return float((found.detach().double().cpu() - expected).norm() / expected.norm())


def run(model, images: torch.Tensor, amp: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and all gradients of a model, in one vector, on the device of its parameters."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, amp, enabled=amp is not None):
        logits = model(images.to(device))
    model.zero_grad()
    F.cross_entropy(logits.float(), torch.arange(len(images), device=device)).backward()
    return logits, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def build_pair(name: str, kwargs: dict) -> list[torch.nn.Module]:
    """Return a model on the CPU and the same one on the GPU."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    for key, parameter in model.named_parameters():
        if key.endswith("qkv.bias"):
            torch.nn.init.normal_(parameter)  # so that the padding has keys and values
    other = timm.create_model(name, num_classes=10, **kwargs)
    other.load_state_dict(model.state_dict())
    return [model, other.to(DEVICE, memory_format=torch.channels_last)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "kwargs"), MODELS)
def test_logits_and_gradients_equal_those_of_the_cpu(name, kwargs, size):
    on_cpu, on_gpu = build_pair(name, kwargs)
    images = image(2, *size)
    expected = run(on_cpu, images)
    for found, value in zip(run(on_gpu, images), expected, strict=True):
        assert error(found, value) < 1e-4
    for found, value in zip(run(on_gpu, images, torch.bfloat16), expected, strict=True):
        assert error(found, value) < 0.05


@pytest.mark.parametrize("name", TINY)
def test_evaluation_equals_that_of_the_cpu(name):
    on_cpu, on_gpu = build_pair(name, {})
    images = image(3, 250, 333)
    with torch.inference_mode():
        assert error(on_gpu.eval()(images.to(DEVICE)), on_cpu.eval()(images)) < 1e-4


@pytest.mark.parametrize("windows", [65_535, 65_536, 70_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_number_of_windows(windows, dtype):
    torch.manual_seed(0)
    lsa = LocallyGroupedAttention(32, num_heads=1, window_size=7).to(DEVICE, dtype)
    x = torch.randn(windows, 7, 7, 32, device=DEVICE, dtype=dtype, requires_grad=True)
    results = []
    for size in (windows, 30_000):
        output = torch.cat([lsa(part) for part in x.split(size)])
        results.append([output, *torch.autograd.grad(output.float().square().sum(), [x, *lsa.parameters()])])
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for found, expected in zip(*results, strict=True):
        assert error(found, expected) < tolerance


@pytest.mark.parametrize("shape", [*LSA_SHAPES, *GSA_SHAPES])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_attention_backends_equal_the_plain_formula(backend, dtype, shape):
    if backend != SDPBackend.EFFICIENT_ATTENTION and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs an A100 or newer")
    batch, heads, queries, keys, channels = shape
    torch.manual_seed(0)
    # In memory as the layers have them: heads after tokens, keys beside values.
    q = torch.randn(batch, queries, heads, channels, device=DEVICE, dtype=dtype).transpose(1, 2).requires_grad_()
    kv = torch.randn(batch, keys, 2, heads, channels, device=DEVICE, dtype=dtype, requires_grad=True)
    results = []
    for kernel, kind in ((backend, dtype), (SDPBackend.MATH, torch.float32)):
        k, v = (part.transpose(1, 2) for part in kv.to(kind).unbind(2))
        with sdpa_kernel(kernel):
            output = F.scaled_dot_product_attention(q.to(kind), k, v)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), [q, kv])])
    for found, expected in zip(*results, strict=True):
        assert error(found, expected) < (1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_compiled_models_equal_eager_ones(name, amp):
    _, model = build_pair(name, {})
    images = image(4, 224, 224)
    torch._dynamo.reset()
    results = [run(model, images, amp), run(torch.compile(model, fullgraph=True), images, amp)]
    for expected, found in zip(*results, strict=True):
        assert error(found, expected) < (1e-4 if amp is None else 0.05)


@pytest.mark.parametrize("name", TINY)
def test_a_training_step_does_not_wait_for_the_gpu(name):
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.1).to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, labels = image(4, 224, 224).to(DEVICE), torch.arange(4, device=DEVICE)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()  # the first one allocates memory and loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
