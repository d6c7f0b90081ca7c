"""Our models in other people's software, each compared with an independent computation.

The marker `client` names the package that a test needs; without it the test is skipped. The test's docstring is its row
in the table of docs/clients.md, which `python -m pytest -m client --write-clients` writes.
"""

import copy
import logging
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from torch import nn

import models.cpu
from models.complexity import count_module_macs
from tests import client_workers, test_timm_interface
from tests.clients_page import PAGE
from tests.helpers import ROOT
from tests.test_models import TINY, image

SIZES = [(1, 64, 96), (2, 96, 128), (1, 160, 160), (1, 96, 224), (3, 224, 224), (1, 225, 230), (1, 256, 256)]
DYNAMIC = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)


def client(package: str, module: str | None = None):
    """Mark a slow test of a package, which is imported as `module`."""

    def mark(test):
        return pytest.mark.slow(pytest.mark.client(package, module or package)(test))

    return mark


def create(name: str = "alt_gvt_tiny", biases: bool = True, **kwargs) -> nn.Module:
    """Create a model with the biases of a trained one."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if biases and key.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def assert_equals_at_all_sizes(function, model: nn.Module, sizes=SIZES) -> None:
    """Compare a function of arrays `(B, 3, H, W)` with a model."""
    for size in sizes:
        with torch.no_grad():
            expected = model(image(*size))
        torch.testing.assert_close(torch.as_tensor(function(image(*size).numpy())), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- dense prediction


DECODERS = ("Unet", "UnetPlusPlus", "FPN", "PSPNet", "MAnet", "Linknet", "UPerNet", "Segformer")


@client("segmentation_models_pytorch")
@pytest.mark.parametrize("decoder", DECODERS)
def test_segmentation_models_pytorch(decoder):
    """`tu-alt_gvt_tiny` in eight decoders: the maps are the model's, and gradients reach the first layer"""
    import segmentation_models_pytorch as smp

    network = getattr(smp, decoder)("tu-alt_gvt_tiny", encoder_weights=None, classes=3).eval()
    model = create()
    model.load_state_dict(network.encoder.model.model.state_dict(), strict=False)
    images = image(2, 96, 160)
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True)
        maps = network.encoder(images)
    used = network.encoder.model.feature_info.channels()
    torch.testing.assert_close(maps[-len(used) :], expected[: len(used)])
    logits = network(images)
    assert logits.shape == (2, 3, 96, 160)
    logits.square().sum().backward()
    assert network.encoder.model.model.patch_embeds[0].proj.weight.grad.abs().max() > 0


@client("segmentation_models_pytorch")
@torch.no_grad()
def test_small_encoder_of_segmentation_models_pytorch():
    """`tu-alt_gvt_small` in Unet"""
    import segmentation_models_pytorch as smp

    network = smp.Unet("tu-alt_gvt_small", encoder_weights=None, classes=3).eval()
    assert network(image(1, 64, 64)).shape == (1, 3, 64, 64)
    assert network.encoder.out_channels[-4:] == [64, 128, 256, 512]


@client("torchmetrics")
def test_mean_iou_of_torchmetrics():
    """IoU of each class and mean IoU equal those of segmentation/metrics.py to 1e-7"""
    from torchmetrics.classification import MulticlassJaccardIndex

    from segmentation.metrics import ConfusionMatrix

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (3, 40, 50), generator=generator)
    labels[labels == 5] = 255
    other = torch.randint(5, labels.shape, generator=generator)
    predictions = torch.where(torch.rand(labels.shape, generator=generator) < 0.7, labels % 250, other)
    ours = ConfusionMatrix(5)
    theirs = MulticlassJaccardIndex(5, average=None, ignore_index=255)
    for prediction, label in zip(predictions, labels, strict=True):
        ours.update(prediction, label)
        theirs.update(prediction[None], label[None])
    torch.testing.assert_close(theirs.compute().double(), ours.per_class()["IoU"], rtol=0, atol=1e-7)
    assert ours.summary()["mIoU"] == pytest.approx(theirs.compute().mean().item(), abs=1e-7)


@client("torchmetrics")
def test_average_precision_of_torchmetrics(monkeypatch):
    """AP of boxes and masks equals that of detection/metrics.py to 1e-7"""
    from torchmetrics.detection import MeanAveragePrecision

    from detection import data
    from detection.configs.recipes import shapes_setting
    from detection.metrics import METRICS, summarise, to_results

    monkeypatch.setattr(data, "SHAPES_VAL", 12)
    dataset = data.build_dataset(shapes_setting("alt_gvt_tiny", "retinanet", scale=(64, 64)), "val")
    # By default torchmetrics has the thresholds of COCO in float32, which moves recalls that equal one.
    thresholds = {
        "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
        "rec_thresholds": np.linspace(0, 1, 101).tolist(),
        "backend": "pycocotools",
    }
    theirs = {kind: MeanAveragePrecision(iou_type=kind, **thresholds) for kind in ("bbox", "segm")}
    generator = torch.Generator().manual_seed(0)
    results = []
    for index in range(len(dataset)):
        _, target = dataset[index]
        found = disturb(target, generator)
        results += to_results(
            target["image_id"], {key: value.clone() for key, value in found.items()}, dataset.category_ids
        )
        truth = {key: target[key] for key in ("boxes", "labels", "masks")}
        for metric in theirs.values():
            metric.update([found | {"masks": found["masks"].bool()}], [truth | {"masks": truth["masks"].bool()}])
    ours = summarise(dataset.coco, dataset.ids, results, theirs)
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    for kind, metric in theirs.items():
        figures = metric.compute()
        expected = {f"{kind}_{ours_name}": figures[name].item() for ours_name, name in zip(METRICS, names, strict=True)}
        assert {key: ours[key] for key in expected} == pytest.approx(expected, abs=1e-7)
        assert 0.1 < ours[f"{kind}_AP"] < 0.9


def disturb(target: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return objects like those of a target, moved, in part of another class, and with random scores."""
    count = len(target["labels"])
    shifts = torch.randint(-3, 4, (count, 2), generator=generator)
    masks = [mask.roll(shift.tolist(), dims=(1, 0)) for mask, shift in zip(target["masks"], shifts, strict=True)]
    return {
        "boxes": (target["boxes"] + shifts.repeat(1, 2)).clamp(0, 64),
        "labels": torch.where(torch.rand(count, generator=generator) < 0.8, target["labels"], 1),
        "scores": torch.rand(count, generator=generator),
        "masks": torch.stack(masks) if masks else target["masks"],
    }


@client("supervision")
@torch.inference_mode()
def test_supervision():
    """`Detections` of a detector's output: areas and non-maximum suppression equal those of torchvision"""
    import supervision
    from torchvision.ops import batched_nms, box_area

    from dense.experiments import load_experiment
    from detection.network import build_detector

    torch.manual_seed(0)
    experiment = load_experiment(ROOT / "detection/configs/mask_rcnn_alt_gvt_tiny_shapes.py")
    model = build_detector(experiment, num_classes=10, pretrained=False).eval()
    model.roi_heads.score_thresh = 0.0
    (found,) = model([torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))])
    assert len(found["boxes"]) > 20
    detections = supervision.Detections(
        xyxy=found["boxes"].numpy(),
        mask=found["masks"].numpy().astype(bool),
        confidence=found["scores"].numpy(),
        class_id=found["labels"].numpy(),
    )
    np.testing.assert_allclose(detections.box_area, box_area(found["boxes"]), rtol=1e-5)
    np.testing.assert_array_equal(detections.area, found["masks"].flatten(1).sum(1))
    kept = batched_nms(found["boxes"], found["scores"], found["labels"], 0.3).sort().values
    assert 0 < len(kept) < len(detections)
    left = supervision.Detections(detections.xyxy, None, detections.confidence, detections.class_id).with_nms(0.3)
    np.testing.assert_array_equal(np.sort(left.confidence), found["scores"][kept].sort().values)


# ------------------------------------------------------------------------------------------------------ explanations


def rescale(maps: torch.Tensor) -> torch.Tensor:
    return (maps - maps.min()) / (maps.max() - maps.min())


@client("grad-cam", "pytorch_grad_cam")
@pytest.mark.parametrize("name", TINY)
def test_grad_cam(name):
    """Grad-CAM of the last norm equals the class activation map; of a block, gradient times activation by hand"""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = create(name, num_classes=5)
    images = image(1, 224, 160)
    activations = {}
    block = model.blocks[-1][-1]
    block.register_forward_hook(lambda _module, _inputs, output: activations.update(block=output))
    logits = model(images)
    (gradients,) = torch.autograd.grad(logits[0, 2], activations["block"])
    expected = {
        model.norm: model.forward_features(images) @ model.head.weight[2],
        block: activations["block"] @ gradients.mean((0, 1, 2)),
    }
    for layer, weighted in expected.items():
        with GradCAM(model, [layer], reshape_transform=lambda tokens: tokens.permute(0, 3, 1, 2)) as cam:
            (found,) = cam(images, [ClassifierOutputTarget(2)])
        by_hand = F.interpolate(rescale(weighted.relu())[None].detach(), images.shape[2:], mode="bilinear")
        torch.testing.assert_close(torch.from_numpy(found), rescale(by_hand)[0, 0], rtol=0, atol=1e-4)


@client("captum")
@pytest.mark.parametrize("name", TINY)
def test_captum(name):
    """Integrated gradients add up to the difference of the logits; saliency is the gradient's magnitude"""
    from captum.attr import IntegratedGradients, Saliency

    model = create(name, num_classes=5)
    images = image(1, 64, 96).requires_grad_()
    attributions = IntegratedGradients(model).attribute(images, target=2, n_steps=100)
    difference = (model(images) - model(torch.zeros_like(images)))[0, 2]
    torch.testing.assert_close(attributions.sum(), difference.double(), rtol=1e-3, atol=1e-4, check_dtype=False)
    (gradient,) = torch.autograd.grad(model(images)[0, 2], images)
    torch.testing.assert_close(Saliency(model).attribute(images, target=2), gradient.abs())


# ----------------------------------------------------------------------------------------------------------- counting


@pytest.fixture(params=[False, True], ids=["plain", "accelerated"])
def counted(request):
    """A model, its multiply-accumulates, and images."""
    model, images = create(), image(1, 224, 224)
    macs = count_module_macs(copy.deepcopy(model), images)
    if request.param:
        models.cpu.accelerate(model)
    return model, macs, images


@client("fvcore")
def test_fvcore(counted):
    """`FlopCountAnalysis` counts the multiply-accumulates of all layers exactly"""
    from fvcore.nn import FlopCountAnalysis, parameter_count

    model, macs, images = counted
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    assert FlopCountAnalysis(model, images).unsupported_ops_warnings(False).total() == macs.layers
    assert parameter_count(model)[""] == sum(parameter.numel() for parameter in model.parameters())


@client("ptflops")
@pytest.mark.parametrize("backend", ["pytorch", "aten"])
def test_ptflops(counted, backend):
    """Multiply-accumulates equal models/complexity.py to 1 %, by both backends"""
    from ptflops import get_model_complexity_info

    model, macs, images = counted
    if backend == "pytorch":
        models.cpu.accelerate(model, enabled=False)  # this backend finds layers by their exact type
    quiet = {"as_strings": False, "print_per_layer_stat": False}
    count, parameters = get_model_complexity_info(model, tuple(images.shape[1:]), backend=backend, **quiet)
    assert count == pytest.approx(macs.layers, rel=0.01)  # neither counts fused attention on a CPU
    assert parameters == sum(parameter.numel() for parameter in model.parameters())


@client("torch")
def test_profiler(counted):
    """The profiler's `with_flops` equals models/complexity.py to 2 %"""
    model, macs, images = counted
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, with_flops=True) as profile, torch.no_grad():
        model(images)
    assert sum(event.flops for event in profile.key_averages()) / 2 == pytest.approx(
        macs.layers, rel=0.02
    )  # without attention


# ------------------------------------------------------------------------------------------------------- quantisation


def assert_close_to_quantised(model: nn.Module, quantised: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Check dequantised weights, by name of the layer, and the outputs: those of the plain model with these weights."""
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert set(weights) == set(layers)
    images = image(2, 224, 224)
    with torch.no_grad():
        original = model(images)
        for key, layer in layers.items():
            step = layer.weight.abs().amax() / 127
            assert (weights[key] - layer.weight).abs().max() <= step, key
            layer.weight.copy_(weights[key])
        expected, found = model(images), quantised(images)
    scale = original.std()
    assert (found - original).abs().max() > 0
    assert (found - expected).abs().max() < 0.05 * scale
    assert (found - original).abs().max() < 0.2 * scale


@client("torchao")
@pytest.mark.parametrize("name", TINY)
def test_torchao(name):
    """`Int8WeightOnlyConfig` quantises all linear layers, and the outputs are those of the rounded weights"""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from torchao.utils import TorchAOBaseTensor

    model = create(name, num_classes=5)
    quantised = copy.deepcopy(model)
    models.cpu.accelerate(quantised)
    quantize_(quantised, Int8WeightOnlyConfig())
    weights = {
        key: layer.weight.dequantize()
        for key, layer in quantised.named_modules()
        if isinstance(layer, nn.Linear) and isinstance(layer.weight, TorchAOBaseTensor)
    }
    assert_close_to_quantised(model, quantised, weights)


@client("torch")
@pytest.mark.parametrize("name", TINY)
def test_dynamic_quantisation(name):
    """`quantize_dynamic(model, {nn.Linear})` quantises all linear layers, and the outputs stay close"""
    model = create(name, num_classes=5)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kind = torch.ao.nn.quantized.dynamic.Linear
    weights = {key: layer.weight().dequantize() for key, layer in quantised.named_modules() if isinstance(layer, kind)}
    assert_close_to_quantised(model, quantised, weights)


# ------------------------------------------------------------------------------------------------------------- export


def export_onnx(model: nn.Module, path, dynamo: bool) -> None:
    """Export a model for all sizes, by the exporter of torch.export or by the older one of tracing."""
    if dynamo:
        torch.onnx.export(model, (image(*SIZES[1]),), path, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    else:
        axes = {"images": {0: "batch", 2: "height", 3: "width"}}
        names = {"input_names": ["images"], "dynamic_axes": axes}
        torch.onnx.export(model, (image(*SIZES[1]),), path, dynamo=False, **names)


SHALLOW = {"num_classes": 3, "depths": (1, 1, 2, 1)}  # a model that exporters read quickly, with all kinds of blocks


@client("onnxruntime")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
@pytest.mark.parametrize(
    ("name", "padding"), [("pcpvt_tiny", "mask"), ("alt_gvt_tiny", "mask"), ("alt_gvt_tiny", "released")]
)
def test_onnxruntime(name, padding, dynamo, tmp_path):
    """One file by either exporter of torch serves all sizes, to 1e-5"""
    import onnxruntime

    pytest.importorskip("onnxscript")
    model = create(name, window_padding=padding, **SHALLOW)
    export_onnx(model, tmp_path / "model.onnx", dynamo)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    name = session.get_inputs()[0].name
    assert_equals_at_all_sizes(lambda images: session.run(None, {name: images})[0], model, [(1, 32, 32), *SIZES])


@client("openvino")
@pytest.mark.parametrize("padding", ["mask", "released"])
def test_openvino(padding):
    """`convert_model(model, example_input=...)` serves all sizes, to 1e-5"""
    import openvino

    model = create(window_padding=padding, **SHALLOW)
    converted = openvino.convert_model(model, example_input=image(1, 160, 160))
    # Its cache gives wrong outputs of large images after one of 32x32, of timm's models, too.
    options = {"INFERENCE_PRECISION_HINT": "f32", "CPU_RUNTIME_CACHE_CAPACITY": "0"}
    compiled = openvino.Core().compile_model(converted, "CPU", options)
    assert_equals_at_all_sizes(lambda images: compiled(images)[0], model, [(1, 32, 32), *SIZES])


@client("executorch", "executorch.exir")
def test_executorch():
    """One portable program serves images from 64x64 to 256x256, to 1e-5"""
    from executorch.exir import to_edge
    from executorch.runtime import Runtime

    model = create(**SHALLOW)
    sides = {2: torch.export.Dim("height", min=64, max=256), 3: torch.export.Dim("width", min=64, max=256)}
    exported = torch.export.export(model, (image(1, 224, 224),), dynamic_shapes=(sides,))
    portable = to_edge(exported).to_executorch()  # holds the memory of the program
    program = Runtime.get().load_program(portable.buffer)
    method = program.load_method("forward")
    sizes = [size for size in SIZES if size[0] == 1]
    assert_equals_at_all_sizes(lambda images: method.execute([torch.from_numpy(images)])[0], model, sizes)


# ------------------------------------------------------------------------------------------------ weights and training


@client("transformers")
@torch.no_grad()
def test_timm_backbone_of_transformers():
    """`TimmBackbone`: the maps of all stages equal the model's"""
    from transformers import TimmBackbone, TimmBackboneConfig

    config = TimmBackboneConfig(backbone="alt_gvt_tiny", use_pretrained_backbone=False, out_indices=(0, 1, 2, 3))
    backbone = TimmBackbone(config).eval()
    model = create()
    state = {key.removeprefix("_backbone.model."): value for key, value in backbone.state_dict().items()}
    model.load_state_dict(state, strict=False)
    expected = model.forward_intermediates(image(2, 96, 160), intermediates_only=True)
    torch.testing.assert_close(list(backbone(image(2, 96, 160)).feature_maps), expected)


@client("transformers")
@torch.no_grad()
def test_timm_wrapper_of_transformers(tmp_path):
    """`TimmWrapperForImageClassification`: the logits equal the model's, also after saving and loading"""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="pcpvt_tiny", num_labels=5)).eval()
    model = create("pcpvt_tiny", num_classes=5)
    wrapper.timm_model.load_state_dict(model.state_dict())
    wrapper.save_pretrained(tmp_path)
    for found in (wrapper, TimmWrapperForImageClassification.from_pretrained(tmp_path)):
        outputs = found(image(2, 75, 140), output_hidden_states=True)
        assert torch.equal(outputs.logits, model(image(2, 75, 140)))
        maps = model.forward_intermediates(image(2, 75, 140), intermediates_only=True)
        torch.testing.assert_close(list(outputs.hidden_states), maps)


@client("safetensors", "safetensors.torch")
def test_safetensors(tmp_path):
    """Weights are the same after saving and loading"""
    from safetensors.torch import load_model, save_model

    model, other = create(), create(biases=False)
    save_model(model, tmp_path / "model.safetensors")
    load_model(other, tmp_path / "model.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


def train_in_one_process() -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of the step of `client_workers` and the weights after it."""
    model = client_workers.make_model()
    loss = client_workers.take_step(model, client_workers.IMAGES, client_workers.LABELS)
    return loss, {key: value.detach() for key, value in model.named_parameters()}


@client("lightning")
def test_lightning(tmp_path):
    """A step of two processes equals one of a single process"""
    command = [sys.executable, "-m", "tests.client_workers", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    written = torch.load(tmp_path / "lightning.pth", weights_only=True)
    assert written["steps"] == 1
    torch.testing.assert_close(written["state"], train_in_one_process()[1], rtol=0, atol=1e-6)


@client("torch")
def test_fully_sharded_data_parallel(tmp_path):
    """FSDP2 (`fully_shard`): loss and step of two processes, each with half of the weights, equal those of one"""
    torch.multiprocessing.spawn(client_workers.train_sharded, (str(tmp_path),), nprocs=2)
    loss, state = train_in_one_process()
    ranks = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]
    assert sum(rank["loss"] for rank in ranks) / 2 == pytest.approx(loss, abs=1e-5)
    assert sum(rank["held"] for rank in ranks) == sum(value.numel() for value in state.values())
    for rank in ranks:
        torch.testing.assert_close(rank["state"], state, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ docs/clients.md


def test_the_page_has_all_tests():
    page = PAGE.read_text()
    for test in (*vars(test_timm_interface).values(), *globals().values()):
        if any(mark.name == "client" for mark in getattr(test, "pytestmark", [])):
            assert f"| {test.__doc__.strip()} |" in page, "run python -m pytest -m client --write-clients"


@pytest.mark.slow
@pytest.mark.parametrize("lines", re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
def test_lines_of_the_page(lines):
    for module in re.findall(r"^(?:import|from) (\w+)", lines, re.MULTILINE):
        pytest.importorskip(module)
    found = {
        "boxes": torch.rand(2, 4),
        "labels": torch.arange(2),
        "scores": torch.rand(2),
        "masks": torch.ones(2, 9, 9),
    }
    names = {"models": models, "model": create(), "images": image(1, 64, 64), "found": found}
    try:
        exec(lines.replace("_small", "_tiny"), names)
    finally:
        set_fused_attn(True)
