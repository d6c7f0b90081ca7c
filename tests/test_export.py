"""Exported networks: their outputs in other software, what is refused, and the examples of docs/export.md."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

import export
import main
from core.options import ArgumentParser, add_process_options
from core.shapes import draw_quarters
from dense.experiments import load_experiment
from detection.network import build_detector, paste_masks, paste_masks_at_once
from predict import add_network_options, load_predictor
from segmentation.heads import AveragePool
from segmentation.network import build_segmentor
from tests.helpers import ROOT, TINY, fails
from tests.test_options import options_of
from transforms import STATISTICS

PAGE = (ROOT / "docs/export.md").read_text()
CONFIGS = {
    name: ROOT / folder / f"configs/{name}_alt_gvt_tiny_shapes.py"
    for folder, names in {"segmentation": ("upernet", "fpn"), "detection": ("retinanet", "mask_rcnn")}.items()
    for name in names
}
# Tests of the options of export.py; those that name a network are tested with predict.py.
OPTIONS = {
    "weights": "test_classifiers_in_onnx_and_pt2",
    "format": "test_classifiers_in_onnx_and_pt2",
    "out": "test_classifiers_in_onnx_and_pt2",
    "with_preprocessing": "test_classifiers_in_onnx_and_pt2",
}


def spread_scores(detector: nn.Module) -> None:
    """Give a detector random heads that find many objects with different scores."""
    if hasattr(detector, "roi_heads"):
        heads = detector.roi_heads
        spread = {detector.rpn.head.cls_logits: 0.5, detector.rpn.head.bbox_pred: 0.1}
        spread |= {heads.box_predictor.cls_score: 0.1, heads.mask_predictor.mask_fcn_logits: 0.5}
    else:
        spread = {detector.head.classification_head.cls_logits: 0.03, detector.head.regression_head.bbox_reg: 0.02}
    for layer, std in spread.items():
        nn.init.normal_(layer.weight, std=std)


@pytest.fixture(scope="module")
def network(request, tmp_path_factory) -> tuple[Path, list[str]]:
    """Return a file of random weights of a tiny network, and the options that name the network."""
    name = request.param
    path = tmp_path_factory.mktemp("weights") / f"{name}.pth"
    torch.manual_seed(0)
    if name in CONFIGS:
        build = build_segmentor if name in ("upernet", "fpn") else build_detector
        built, options = build(load_experiment(CONFIGS[name]), 4, pretrained=False), ["--config", str(CONFIGS[name])]
        if build is build_detector:
            spread_scores(built)
    else:
        built, options = timm.create_model(name, num_classes=3), ["--model", name]
    torch.save(built.state_dict(), path)
    return path, options


def run_export(path, format: str, out: Path, *options) -> None:
    for package in ("onnxruntime", "onnxscript") if format == "onnx" else ():
        pytest.importorskip(package)
    export.main([str(path), "--format", format, "--out", str(out), *map(str, options)])


def load(network: tuple[Path, list[str]]) -> nn.Module:
    """Return the network of the fixture, as predict.py loads it."""
    path, (option, value) = network
    return load_predictor(path, **{option.removeprefix("--"): value}).model


def draw_bytes(batch: int, height: int, width: int) -> torch.Tensor:
    """Return scenes of shapes, uint8 `(batch, 3, height, width)`."""
    scenes = [draw_quarters((7, index), max(height, width)).image for index in range(batch)]
    return torch.stack([pil_to_tensor(image)[:, :height, :width] for image in scenes])


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS)
    return (pixels / 255 - mean) / std


def read_onnx(path):
    """Return a function from an input to the outputs of an ONNX file, by onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]


def read_pt2(path):
    """Return a function from an input to the outputs of a program of torch.export."""
    program = torch.export.load(path).module()
    return lambda images: [program(images)]


READERS = {"onnx": read_onnx, "pt2": read_pt2}
SIZES = [(64, 96), (225, 230), (224, 224), (320, 256)]


def test_every_option_is_tested():
    shared = ArgumentParser()
    add_network_options(shared)
    add_process_options(shared)
    assert options_of(export.get_parser()) == {*OPTIONS} | options_of(shared)


# -------------------------------------------------------------------------------------------------------- networks


@pytest.mark.slow
@pytest.mark.parametrize("format", READERS)
@pytest.mark.parametrize("network", ["alt_gvt_tiny", "pcpvt_tiny"], indirect=True)
def test_classifiers_in_onnx_and_pt2(network, format, tmp_path):
    path = tmp_path / f"model.{format}"
    as_bytes = format == "onnx"
    run_export(network[0], format, path, *network[1], *["--with-preprocessing"] * as_bytes)
    model, run = load(network), READERS[format](path)
    for batch, size in zip((1, 3, 2, 1), SIZES, strict=True):
        pixels = draw_bytes(batch, *size)
        with torch.no_grad():
            expected = model(normalised(pixels))
        (found,) = run(pixels if as_bytes else normalised(pixels))
        torch.testing.assert_close(found, expected.softmax(dim=1) if as_bytes else expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "format", "as_bytes"),
    [("upernet", "onnx", True), ("fpn", "onnx", False), ("upernet", "pt2", False), ("fpn", "pt2", True)],
    indirect=["network"],
)
def test_segmentation_networks(network, format, as_bytes, tmp_path):
    path = tmp_path / f"model.{format}"
    run_export(network[0], format, path, *network[1], *["--with-preprocessing"] * as_bytes)
    model, run = load(network), READERS[format](path)
    for batch, size in zip((1, 3, 1, 1), SIZES, strict=True):
        pixels = draw_bytes(batch if format == "onnx" else 1, *size)
        with torch.no_grad():
            expected = model(normalised(pixels))
        (found,) = run(pixels if as_bytes else normalised(pixels))
        assert found.shape[2:] == size
        torch.testing.assert_close(found, expected.softmax(dim=1) if as_bytes else expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "as_bytes"), [("retinanet", True), ("mask_rcnn", False)], indirect=["network"])
def test_detectors_in_onnx(network, as_bytes, tmp_path):
    """torchvision's own detectors fail in the exporter."""
    path = tmp_path / "model.onnx"
    run_export(network[0], "onnx", path, *network[1], *["--with-preprocessing"] * as_bytes)
    model, run, count = load(network), read_onnx(path), 0
    for size in [(150, 170), (128, 256), (320, 96), (480, 640), (64, 64)]:
        pixels = draw_bytes(1, *size)[0]
        with torch.no_grad():
            (expected,) = model([pixels])
        found = dict(zip(export.DETECTIONS, run(pixels if as_bytes else pixels / 255), strict=False))
        assert set(found) == set(expected)
        assert len(found["scores"]) == len(expected["scores"])
        count += len(found["scores"])
        rest = list(range(len(expected["scores"])))
        for label, score, box, *mask in zip(*(found[name] for name in ORDER if name in found), strict=True):
            i = next(i for i in rest if is_same(label, score, box, *(expected[name][i] for name in ORDER[:3])))
            rest.remove(i)
            if mask:
                assert (mask[0] != expected["masks"][i]).sum() <= 1e-3 * mask[0].sum()
    assert count > 20


ORDER = ("labels", "scores", "boxes", "masks")


def is_same(label, score, box, other_label, other_score, other_box) -> bool:
    """Return True if two objects have the same class, score and box (in pixels)."""
    return label == other_label and abs(score - other_score) < 1e-4 and (box - other_box).abs().max() < 0.05


@pytest.mark.slow
def test_one_size_of_small_and_foreign_classifiers(classifier, tmp_path):
    """A classifier of 32x32 pixels keeps its size, and one of timm's its statistics."""
    run_export(classifier, "pt2", tmp_path / "small.pt2")
    model = load_predictor(classifier).model
    images = normalised(draw_bytes(3, 32, 32))
    torch.testing.assert_close(read_pt2(tmp_path / "small.pt2")(images)[0], model(images), rtol=0, atol=1e-5)
    name = "test_vit.r160_in1k"
    torch.save(timm.create_model(name).state_dict(), tmp_path / "vit.pth")
    run_export(tmp_path / "vit.pth", "pt2", tmp_path / "vit.pt2", "--model", name, "--with-preprocessing")
    predictor = load_predictor(tmp_path / "vit.pth", model=name)
    image = draw_quarters(3, 160).image
    predictor.prepare.keywords["to_input"].transforms = predictor.prepare.keywords["to_input"].transforms[2:]
    (found,) = read_pt2(tmp_path / "vit.pt2")(pil_to_tensor(image)[None].repeat(3, 1, 1, 1))
    torch.testing.assert_close(found[0], predictor(image).probabilities, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- timm

WITH_TIMM = """
import json, sys, timm, torch
from PIL import Image
model = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
with torch.no_grad():
    logits = [model(transform(Image.open(path).convert("RGB"))[None])[0].tolist() for path in sys.argv[2:]]
known = [name for name in sys.modules if name.split(".")[0] in ("models", "predict", "export")]
print(json.dumps([model.pretrained_cfg["architecture"], model.pretrained_cfg["label_names"], logits, known]))
"""
HAS_LOCAL_FOLDERS = tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 16)


in_timm = pytest.mark.skipif(not HAS_LOCAL_FOLDERS, reason="timm 1.0.16 loads folders")


@in_timm
@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("pcpvt_tiny", 64), ("alt_gvt_tiny", 224)])
def test_timm_alone_gives_the_logits_of_a_fine_tuned_classifier(name, size, image_folder, tmp_path):
    torch.save(timm.create_model(name, num_classes=5).state_dict(), tmp_path / "start.pth")
    options = [*TINY, "--epochs", "1", "--model", name, "--input-size", size, "--eval-crop-ratio", "0.9"]
    paths = ["--finetune", tmp_path / "start.pth", "--data-path", image_folder, "--output_dir", tmp_path]
    main.main([*map(str, options + paths)])
    run_export(tmp_path / "checkpoint.pth", "timm", tmp_path / "folder")
    photos = sorted((image_folder / "val").rglob("*.JPEG"))[::5]
    command = [sys.executable, "-I", "-W", "ignore", "-c", WITH_TIMM, tmp_path / "folder", *photos]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    architecture, names, logits, known = json.loads(run.stdout)
    assert architecture == {"pcpvt_tiny": "twins_pcpvt_small", "alt_gvt_tiny": "twins_svt_small"}[name]
    assert (names, known) == (["n01440764", "n01443537", "n01484850"], [])
    results = load_predictor(tmp_path / "checkpoint.pth")(photos)
    expected = torch.stack([result.logits for result in results])
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4)


@in_timm
def test_the_difference_of_the_padding_is_said(classifier, tmp_path, capsys):
    """At 32x32 pixels the maps of Twins-SVT are padded."""
    run_export(classifier, "timm", tmp_path / "folder")
    line = next(line for line in capsys.readouterr().out.splitlines() if "pads windows with zeros" in line)
    images = normalised(export.draw_images(2, (32, 32)))
    foreign = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    with torch.no_grad():
        difference = (load_predictor(classifier).model(images) - foreign(images)).abs().max().item()
    assert difference > 1e-3
    assert line.endswith(f"masks the padding: at 32x32 pixels the logits differ by up to {difference:.1g}")


# ----------------------------------------------------------------------------------------------------------- check


@in_timm
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shift", [2e-4, float("nan")])
def test_a_file_that_differs_is_not_written(shift, batch, classifier, tmp_path, capsys, monkeypatch):
    """It differs for batches of one size only."""
    real = export.READERS["timm"]

    def read(path):
        run = real(path)
        return lambda images: run(images) + shift * (len(images) == batch)

    monkeypatch.setitem(export.READERS, "timm", read)
    line = fails(capsys, export, classifier, "--format", "timm", "--out", tmp_path / "folder")
    assert "the outputs of the exported file differ from those of the network by" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("network", "format", "shapes"),
    [
        ("alt_gvt_tiny", "onnx", [(2, 160, 128), (1, 97, 225), (3, 230, 161), (1, 224, 224)]),
        ("alt_gvt_tiny", "aoti", [(2, 224, 224), (1, 224, 224), (3, 224, 224)]),
        ("upernet", "onnx", [(2, 160, 128), (1, 97, 225), (3, 230, 161), (1, 64, 64)]),
        ("upernet", "pt2", [(1, 160, 128), (1, 97, 225), (1, 230, 161), (1, 64, 64)]),
        ("retinanet", "onnx", [(160, 128), (97, 225), (230, 161), (96, 96)]),
    ],
    indirect=["network"],
)
def test_inputs_of_the_check(network, format, shapes):
    predictor = load_predictor(network[0], **{network[1][0].removeprefix("--"): network[1][1]})
    prepared = export.prepare_export(predictor, format, as_bytes=False)
    inputs = [prepared.example, *prepared.trials]
    assert [(*images.shape[:-3], *images.shape[-2:]) for images in inputs] == shapes


@in_timm
@pytest.mark.parametrize("where", ["write", "read", "run"])
def test_a_format_that_fails_ends_with_one_line(where, classifier, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise AssertionError("Guard failed:\nx.size()[0] == 2")

    if where == "write":
        monkeypatch.setitem(export.WRITERS, "timm", fail)
    else:
        monkeypatch.setitem(export.READERS, "timm", fail if where == "read" else lambda path: fail)
    line = fails(capsys, export, classifier, "--format", "timm", "--out", tmp_path / "folder")
    assert "--format timm: this network cannot be exported (AssertionError: Guard failed: x.size()[0] == 2)" in line
    assert not list(tmp_path.iterdir())


@in_timm
def test_a_stopped_export_leaves_nothing(classifier, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(export.WRITERS, "timm", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # not to end the tests if it is not handled
    with pytest.raises(SystemExit) as stop:
        export.main([str(classifier), "--format", "timm", "--out", str(tmp_path / "folder")])
    signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "export.py: stopped by SIGTERM; nothing is written\n"
    assert not list(tmp_path.iterdir())


def test_metadata(classifier, detector):
    entries = export.prepare_export(load_predictor(classifier), "onnx", as_bytes=True).metadata
    assert {name: json.loads(entries.pop(name)) for name in ("classes", "input_size", "mean", "std", "crop_ratio")} == {
        "classes": ["n01440764", "n01443537", "n01484850"],
        "input_size": [32, 32],
        "mean": list(STATISTICS[0]),
        "std": list(STATISTICS[1]),
        "crop_ratio": 0.875,
    }
    assert entries == {"task": "classification", "colours": "[]", "input": "(batch, 3, 32, 32), uint8"}
    entries = export.prepare_export(load_predictor(detector), "onnx", as_bytes=False).metadata
    assert entries["input"] == "(3, height, width), float32 from 0 to 1"
    assert (entries["score_threshold"], "mean" in entries) == ("0.0", False)


def test_detections_are_compared_one_to_one():
    generator = torch.Generator().manual_seed(0)
    boxes = 100 * torch.rand(40, 4, generator=generator)
    scores, labels = torch.rand(40, generator=generator), torch.arange(40) % 3
    masks = torch.rand(40, 10, 10, generator=generator) > 0.5
    found = [boxes, scores, labels, masks]

    def compare(**changes) -> float:
        order = torch.randperm(40, generator=generator)
        changed = [value.clone()[order] for value in found]
        for name, (where, value) in changes.items():
            changed[export.DETECTIONS.index(name)][where] = value
        return export.find_difference(changed, found, side=100)

    assert compare() == 0
    assert compare(labels=(0, 7)) == float("inf")
    assert compare(boxes=(slice(None), boxes[0])) > 1e-2
    assert compare(scores=(0, scores[0] + 2)) > 1e-2
    assert compare(masks=(0, ~masks[0])) > 1e-3
    assert compare(masks=(slice(None), masks)) > 1e-3  # of other objects
    assert export.find_difference([boxes[:, :2], *found[1:]], found, side=100) == float("inf")
    assert export.find_difference(found[:3], found, side=100) == float("inf")
    assert export.find_difference([value[1:] for value in found], found, side=100) == float("inf")
    none = [value[:0] for value in found]
    assert export.find_difference(none, none, side=100) == 0
    shifted = [boxes + 0.02, *found[1:]]
    assert export.find_difference(shifted, found, side=100) == pytest.approx(2e-4, rel=1e-2)
    doubled = [torch.cat([boxes[:1], boxes[:1], boxes[2:]]), *found[1:]]
    doubled[1], doubled[2] = doubled[1].clone(), doubled[2].clone()
    doubled[1][1], doubled[2][1] = scores[0], labels[0]
    assert export.find_difference(doubled, found, side=100) > 1e-2


@pytest.mark.parametrize("network", ["alt_gvt_tiny", "fpn", "retinanet"], indirect=True)
def test_what_a_format_does_not_take_is_refused(network, tmp_path, capsys):
    path, options = network
    able = {"alt_gvt_tiny": ("onnx", "pt2", "aoti", "timm"), "fpn": ("onnx", "pt2"), "retinanet": ("onnx",)}[path.stem]
    for format in set(export.WRITERS) - set(able):
        out = tmp_path / f"model{export.SUFFIXES[format]}"
        line = fails(capsys, export, path, *options, "--format", format, "--out", out)
        assert line.endswith(f"choose {' or '.join(able)}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--format", "onnx", "--out", "model.pt2"],
            "--out model.pt2: is not a .onnx file, which --format onnx",
        ),
        (["--format", "pt2", "--out", "model"], "--out model: is not a .pt2 file, which --format pt2 writes"),
        (["--format", "timm", "--out", "full"], "--out full: is a file or a folder with files; name a new folder"),
        (["--format", "timm", "--out", "new", "--with-preprocessing"], "--with-preprocessing: timm's own transforms"),
        (["--format", "pt2", "--out", "file/new.pt2"], "file: the folder cannot be created"),
        (
            ["--format", "timm", "--out", "new", "--pretrained"],
            "is a second source of weights",
        ),
    ],
)
def test_bad_options(options, message, classifier, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for path in ("full/model.safetensors", "file"):
        (tmp_path / path).touch()
    before = sorted(tmp_path.rglob("*"))
    assert message in fails(capsys, export, classifier, *options)
    assert sorted(tmp_path.rglob("*")) == before


def test_networks_of_timm_and_missing_software_are_refused(tmp_path, capsys, monkeypatch):
    torch.save(timm.create_model("test_vit.r160_in1k").state_dict(), tmp_path / "vit.pth")
    model = [tmp_path / "vit.pth", "--model", "test_vit"]
    line = fails(capsys, export, *model, "--format", "timm", "--out", tmp_path / "folder")
    assert "--format timm: VisionTransformer is a network of timm already; choose onnx, pt2 or aoti" in line
    monkeypatch.setattr("shutil.which", lambda name: None)
    line = fails(capsys, export, *model, "--format", "aoti", "--out", tmp_path / "vit.pt2")
    assert "--format aoti: there is no C++ compiler; install g++" in line
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = fails(capsys, export, *model, "--format", "onnx", "--out", tmp_path / "vit.onnx")
    assert "--format onnx needs the package onnx, which is not installed; install it: pip install onnx" in line


# ------------------------------------------------------------------------- operations in forms that can be exported


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 5), (7, 6), (12, 13), (16, 64), (25, 42)])
def test_pooling_is_torchs(size, bins):
    maps = torch.rand(2, 3, *size).requires_grad_()
    results = []
    for pool in (AveragePool(bins), nn.AdaptiveAvgPool2d(bins)):
        pooled = pool(maps)
        weights = torch.linspace(0, 1, pooled.numel()).view_as(pooled)
        results.append([pooled, *torch.autograd.grad((pooled * weights).sum(), maps)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_masks_are_pasted_at_once_as_one_by_one():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(200, 28, 28, generator=generator)
    corners = torch.rand(200, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([90.0, 60.0])
    boxes = torch.cat([corners[:, 0], corners[:, 1] + 0.01], dim=1)
    boxes[:20] = boxes[:20].round() + torch.tensor([0, 0, 1, 1])
    pasted = paste_masks(masks, boxes, 60, 90)
    assert pasted.any(dim=0).float().mean() > 0.9
    assert torch.equal(paste_masks_at_once(masks, boxes, 60, 90), pasted)


# ------------------------------------------------------------------------------------------------- docs/export.md


@pytest.fixture(scope="module")
def examples(network, image_folder, tmp_path_factory) -> Path:
    """Folder with the files of the examples: a photo of 224x224 pixels, and the exports of a network."""
    folder = tmp_path_factory.mktemp("examples")
    photo = Image.open(image_folder / "val/n01440764/0.JPEG").resize((224, 224))
    photo.save(folder / "photo.jpg")
    Image.open(folder / "photo.jpg").save(folder / "photo.ppm")
    (commands,) = re.findall(r"<!-- run -->\n```bash\n(.*?)```", PAGE, re.DOTALL)
    for command in commands.splitlines():
        words = command.removeprefix("python export.py checkpoint.pth ").split()
        export.main([str(network[0]), *network[1], *words[:-1], str(folder / words[-1])])
    return folder


def run_example(heading: str, folder: Path, monkeypatch) -> dict:
    """Run the Python example below a heading of the page in a folder, and return its variables."""
    section = PAGE[PAGE.index(f"\n## {heading}\n") :]
    (lines, *_) = re.findall(r"<!-- run -->\n```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(folder)
    names = {}
    exec(lines, names)
    return names


@in_timm
@pytest.mark.slow
@pytest.mark.parametrize("network", ["alt_gvt_tiny"], indirect=True)
def test_examples_of_the_page(network, examples, monkeypatch, capsys):
    model = load(network)
    with torch.no_grad():
        logits = model(normalised(pil_to_tensor(Image.open(examples / "photo.jpg"))[None]))[0]
    probabilities = logits.softmax(dim=0)
    best = f"class {logits.argmax()}"
    pytest.importorskip("onnxruntime")
    found = run_example("onnxruntime", examples, monkeypatch)["probabilities"][0]
    torch.testing.assert_close(torch.from_numpy(found), probabilities, rtol=0, atol=1e-5)
    assert capsys.readouterr().out.startswith(f"{best} 0.")
    logits_of_timm = run_example("Back to timm", examples, monkeypatch)["logits"][0]
    expected = load_predictor(network[0], model="alt_gvt_tiny")(examples / "photo.jpg").logits
    torch.testing.assert_close(logits_of_timm, expected, rtol=0, atol=1e-4)
    assert capsys.readouterr().out == f"class {expected.argmax()}\n"
    compiler = run_cpp(examples)
    assert compiler[0] == '["class 0", "class 1", "class 2"]'
    found = torch.tensor([float(x) for x in re.findall(r"-?\d+\.\d+", compiler[1])])
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)
    pytest.importorskip("openvino")
    found = run_example("OpenVINO", examples, monkeypatch)["probabilities"][0]
    torch.testing.assert_close(torch.from_numpy(found), probabilities, rtol=0, atol=1e-5)


def run_cpp(folder: Path) -> list[str]:
    """Compile the C++ example of the page by its commands, and return the lines that it prints."""
    source = re.search(r"```cpp\n(.*?)```", PAGE, re.DOTALL)[1]
    (folder / "classify.cpp").write_text(source)
    commands = next(lines for lines in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "classify.cpp" in lines)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", "-euc", commands], cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert run.returncode == 0, run.stderr
    first, *rest = run.stdout.splitlines()
    return [first, " ".join(rest)]


# ------------------------------------------------------------------------------------------------------- torch.hub

WITH_HUB = """
import sys, torch
folder, weights = sys.argv[1:]
model = torch.hub.load(folder, "alt_gvt_tiny", source="local", num_classes=3).eval()
predictor = torch.hub.load(folder, "predictor", weights, source="local")
print(sum(parameter.numel() for parameter in model.parameters()), ",".join(predictor.classes))
"""


@pytest.mark.slow
def test_torch_hub_loads_from_another_folder(classifier, tmp_path):
    command = [sys.executable, "-I", "-W", "ignore", "-c", WITH_HUB, ROOT, classifier]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    size = sum(parameter.numel() for parameter in timm.create_model("alt_gvt_tiny", num_classes=3).parameters())
    assert run.stdout.split() == [str(size), "n01440764,n01443537,n01484850"]
