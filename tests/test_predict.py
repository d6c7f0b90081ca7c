"""Prediction of one's own images: equal to the evaluation of each task, its files, its pictures and bad input."""

import csv
import io
import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.transforms.v2.functional import to_pil_image

import main as main_script
import models
import predict
from core import shapes
from core.options import ArgumentParser, add_loader_options, add_process_options
from core.predictor import open_image
from detection import test as detection_test
from predict import load_predictor
from segmentation import data as segmentation_data
from segmentation import test as segmentation_test
from tests.helpers import ROOT, TINY, damage_jpeg, fails, train_dense
from tests.test_detection_runs import MASK, RETINA
from tests.test_detection_runs import SMALL as SMALL_DETECTOR
from tests.test_options import options_of
from tests.test_segmentation_runs import SMALL as SMALL_SEGMENTOR
from tests.test_segmentation_runs import UPERNET
from transforms import to_input

CPU = ["--device", "cpu", "--num_workers", "0"]
CLASSES = ["n01440764", "n01443537", "n01484850"]

# Tests of the options of predict.py; those of computation and of processes are tested with main.py.
OPTIONS = {
    "paths": "test_files_of_a_prediction",
    "pretrained": "test_published_weights_know_imagenet",
    "model": "test_published_weights_know_imagenet",
    "config": "test_released_label_maps_have_the_classes_of_ade20k",
    "model_ema": "test_options_of_computation",
    "compile": "test_options_of_computation",
    "amp": "test_options_of_computation",
    "out": "test_files_of_a_prediction",
    "json": "test_files_of_a_prediction",
    "csv": "test_files_of_a_prediction",
    "topk": "test_files_of_a_prediction",
    "score_thr": "test_objects_equal_the_evaluation",
    "batch_size": "test_options_of_computation",
    "attention": "test_attention_is_drawn",
    "blocks": "test_attention_is_drawn",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums depend on the number of threads, and the tests compare predictions bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*argv) -> None:
    predict.main([str(arg) for arg in (*argv, *CPU)])


# -------------------------------------------------------------------------------------- predictions are evaluations


def recorded_logits(monkeypatch) -> list[torch.Tensor]:
    """Return a list to which each call of a Twins classifier appends its logits."""
    logits, forward = [], models.Twins.forward

    def record(self, x):
        logits.append(forward(self, x))
        return logits[-1]

    monkeypatch.setattr(models.Twins, "forward", record)
    return logits


def test_classes_equal_the_evaluation(classifier, image_folder, monkeypatch):
    """The evaluation has batches of 1.5 times --batch-size."""
    logits = recorded_logits(monkeypatch)
    main_script.main([*TINY, "--eval", "--resume", str(classifier), "--data-path", str(image_folder)])
    counted = torch.cat(logits)
    paths = sorted((image_folder / "val").rglob("*.JPEG"))
    results = load_predictor(classifier, device="cpu")(paths, batch_size=6)
    assert torch.equal(torch.stack([result.logits for result in results]), counted)
    assert results[0].classes == CLASSES
    best = results[0].to_dict(topk=2)["classes"]
    index = counted[0].argmax().item()
    assert len(best) == 2
    assert (best[0]["index"], best[0]["name"]) == (index, CLASSES[index])
    assert best[0]["probability"] == pytest.approx(counted[0].softmax(0).max().item())


def test_classes_of_shapes_equal_the_evaluation(tmp_path, monkeypatch):
    """The images of SHAPES are not cropped: the checkpoint says so."""
    for name in ("SHAPES_TRAIN", "SHAPES_VAL"):
        monkeypatch.setattr(f"datasets.{name}", 8)
    options = [*TINY, "--data-set", "SHAPES", "--epochs", "1", "--input-size", "64", "--output_dir", str(tmp_path)]
    main_script.main(options)
    logits = recorded_logits(monkeypatch)
    main_script.main([*CPU, "--batch-size", "4", "--eval", "--resume", str(tmp_path / "checkpoint.pth")])
    counted = torch.cat(logits)
    images = [shapes.draw_scene((1, i), 64, labels=[i % 10], radii=shapes.LARGE_RADII).image for i in range(8)]
    results = load_predictor(tmp_path / "checkpoint.pth", device="cpu")(images, batch_size=6)
    assert torch.equal(torch.stack([result.logits for result in results]), counted)
    assert results[0].classes == list(shapes.CLASSES)


@pytest.mark.slow
def test_options_of_classifiers_are_refused_for_other_tasks(segmentor, image_folder, tmp_path, capsys):
    image = image_folder / "val" / CLASSES[0] / "0.JPEG"
    for options, message in (
        (["--attention", "--out", tmp_path], "applies to classifiers"),
        (["--model-ema"], "no moving av"),
    ):
        assert message in fails(capsys, predict, segmentor, image, *options, *CPU)


@pytest.mark.slow
def test_label_maps_equal_the_evaluation(segmentor, ade20k_folder, tmp_path):
    config = ROOT / "segmentation" / UPERNET
    options = [*CPU, "--data-root", str(ade20k_folder), "--out", str(tmp_path / "test")]
    segmentation_test.main([str(config), str(segmentor), *options, "--cfg-options", *SMALL_SEGMENTOR])
    run(segmentor, ade20k_folder / "images/validation", "--out", tmp_path / "own", "--json", tmp_path / "own.json")
    entries = json.loads((tmp_path / "own.json").read_text())
    assert len(entries) == 5
    for entry in entries:
        tested = np.asarray(Image.open(tmp_path / "test" / f"{Path(entry['path']).stem}.png"))
        labels = np.asarray(Image.open(entry["label_map"]))
        assert np.array_equal(labels + 1, tested)  # labels of ADE20K start at 1
        assert sum(area["share"] for area in entry["areas"]) == pytest.approx(1)
        largest = entry["areas"][0]
        assert largest["share"] == pytest.approx((labels == largest["index"]).mean())
    classes, colours = segmentation_data.read_classes(segmentation_data.ADE20K_CLASSES)
    result = load_predictor(segmentor, device="cpu")(entries[0]["path"])
    assert (result.classes, result.colours) == (classes, colours)


@pytest.mark.slow
@pytest.mark.parametrize("config", [pytest.param(MASK, id="mask_rcnn"), pytest.param(RETINA, id="retinanet")])
def test_objects_equal_the_evaluation(config, coco_folder, tmp_path):
    options = [*SMALL_DETECTOR, "epochs=1", "score_threshold=0.001"]
    weights = train_dense("detection", config, options, tmp_path / "run", coco_folder)
    config = ROOT / "detection" / config
    options = [*CPU, "--data-root", str(coco_folder), "--out", str(tmp_path / "test.json")]
    detection_test.main(
        [str(config), str(weights), *options, "--cfg-options", *SMALL_DETECTOR, "score_threshold=0.001"]
    )
    tested = json.loads((tmp_path / "test.json").read_text())
    run(weights, coco_folder / "val2017", "--json", tmp_path / "own.json", "--score-thr", 0)
    entries = json.loads((tmp_path / "own.json").read_text())
    assert len(entries) == 6
    assert sum(len(entry["objects"]) for entry in entries) == len(tested) > 20
    ids = {1: "person", 18: "dog", 90: "toothbrush"}
    for entry in entries:
        rows = [row for row in tested if row["image_id"] == int(Path(entry["path"]).stem)]
        for row, found in zip(rows, entry["objects"], strict=True):
            x, y, width, height = row["bbox"]
            assert found["box"] == pytest.approx([x, y, x + width, y + height], abs=1e-9)
            assert (found["score"], found["name"]) == (row["score"], ids[row["category_id"]])
            assert found.get("mask") == row.get("segmentation")


@pytest.mark.slow
def test_dense_predictors_apply_the_exif_orientation(segmentor, detector, classifier, tmp_path):
    """The classifier does not, as in training."""
    image = shapes.draw_scene(3, 96).image.resize((96, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert load_predictor(segmentor, device="cpu")(tmp_path / "turned.png").labels.shape == (96, 64)
    with Image.open(tmp_path / "turned.png") as opened:
        assert load_predictor(detector, device="cpu")(opened).masks.shape[1:] == (96, 64)
    network = load_predictor(classifier, device="cpu")
    assert torch.equal(network(tmp_path / "turned.png").logits, network(image).logits)


# ------------------------------------------------------------------------------------------------------- what it takes


def test_paths_images_and_arrays_give_the_same(classifier, image_folder):
    network = load_predictor(classifier, device="cpu")
    path = next((image_folder / "val").rglob("*.JPEG"))
    with Image.open(path) as image:
        sources = [str(path), path, image.copy(), np.asarray(image)]
    for result in network(sources, batch_size=1):
        assert torch.equal(result.logits, network(path).logits)
    with pytest.raises(ValueError, match=r"array of float64 and shape \(4, 4\)"):
        network(np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"array of uint8 and shape \(0, 5, 3\)"):
        network(np.zeros((0, 5, 3), np.uint8))
    with pytest.raises(ValueError, match="cannot be read as an image"):
        network("nowhere.jpg")


def test_published_weights_know_imagenet(monkeypatch, tmp_path):
    """By name with --pretrained, and a file with --model; the hub cannot be reached in tests."""
    create, asked = predict.timm.create_model, []

    def create_fresh(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        return create(name, **kwargs)

    monkeypatch.setattr(predict.timm, "create_model", create_fresh)
    info = ImageNetInfo()
    names = [info.index_to_description(index) for index in range(1000)]
    assert load_predictor("alt_gvt_tiny", pretrained=True, device="cpu").classes == names
    assert asked == [("alt_gvt_tiny", True)]
    torch.save(create("alt_gvt_tiny").state_dict(), tmp_path / "released.pth")
    torch.save(create("alt_gvt_tiny", num_classes=7).state_dict(), tmp_path / "other.pth")
    assert load_predictor(tmp_path / "other.pth", model="alt_gvt_tiny", device="cpu").classes[6] == "class 6"
    assert load_predictor(tmp_path / "released.pth", model="alt_gvt_tiny", device="cpu").classes == names
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 40)).save(image)
    run(image, "--model", "alt_gvt_tiny", "--pretrained", "--json", tmp_path / "out.json", "--topk", "3")
    assert asked[-1] == ("alt_gvt_tiny", True)
    (entry,) = json.loads((tmp_path / "out.json").read_text())
    assert len(entry["classes"]) == 3
    assert entry["classes"][0]["name"] in names


def test_models_of_timm_get_their_own_preprocessing(monkeypatch):
    """Mean 0.5, a crop of 0.9 and bicubic interpolation; ours have the statistics of ImageNet and 0.875."""
    create = predict.timm.create_model
    monkeypatch.setattr(predict.timm, "create_model", lambda name, pretrained=False, **kwargs: create(name, **kwargs))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    network = load_predictor(name, pretrained=True, device="cpu")
    resized = image.resize((248 * 300 // 200, 248), Image.Resampling.BICUBIC)
    left, top = (round((side - 224) / 2) for side in resized.size)
    pixels = np.asarray(resized.crop((left, top, left + 224, top + 224)), np.float32) / 255
    assert np.abs(network.prepare(image).permute(1, 2, 0).numpy() - (pixels - 0.5) / 0.5).max() < 1e-5
    with pytest.raises(ValueError, match="VisionTransformer is not a Twins model of this code"):
        network.explain(network(image))


def as_config(task: str, setting: str, changes: list[str], path: Path) -> Path:
    """Write an experiment with changed fields and return its path."""
    fields = ", ".join(change for change in changes if not change.startswith(("backbone", "pretrained")))
    path.write_text(f'from {task}.configs.recipes import {setting}\nconfig = {setting}("alt_gvt_tiny", {fields})\n')
    return path


@pytest.mark.slow
def test_released_label_maps_have_the_classes_of_ade20k(segmentor, tmp_path):
    """Bare weights of 150 classes, with the experiment that they were trained by."""
    weights = tmp_path / "bare.pth"
    torch.save(torch.load(segmentor, weights_only=True)["model"], weights)
    config = as_config("segmentation", "upernet_swin_setting", SMALL_SEGMENTOR, tmp_path / "config.py")
    image = shapes.draw_scene(3, 96).image
    own = load_predictor(segmentor, device="cpu")(image)
    result = load_predictor(weights, config=config, device="cpu")(image)
    assert torch.equal(result.labels, own.labels)
    assert result.classes == own.classes == segmentation_data.read_classes(segmentation_data.ADE20K_CLASSES)[0]
    assert result.colours == own.colours


@pytest.mark.slow
def test_released_objects_of_other_data_are_numbered(detector, tmp_path):
    """Bare weights of 3 classes; those of 80 are named after COCO."""
    weights = tmp_path / "bare.pth"
    torch.save(torch.load(detector, weights_only=True)["model"], weights)
    config = as_config(
        "detection", "mask_rcnn_1x_pvt_setting", [*SMALL_DETECTOR, "score_threshold=0.0"], tmp_path / "config.py"
    )
    image = shapes.draw_scene(3, 96).image
    own = load_predictor(detector, device="cpu")(image)
    result = load_predictor(weights, config=config, device="cpu")(image)
    assert torch.equal(result.boxes, own.boxes)
    assert len(result.boxes) > 0
    assert result.classes == ["class 0", "class 1", "class 2"]
    names = predict.name_classes("detection", 80)
    assert (len(names), names[0], names[-1]) == (80, "person", "toothbrush")


def test_every_option_has_a_test():
    shared = ArgumentParser()
    add_loader_options(shared)
    add_process_options(shared)
    assert options_of(predict.get_parser()) == {*OPTIONS, "tf32"} | options_of(shared)
    assert set(OPTIONS.values()) <= set(globals())


@pytest.mark.slow
def test_options_of_computation(image_folder, tmp_path, monkeypatch, compiled):
    """The moving average, bf16, compilation and the batch size reach the network."""
    options = [*TINY, "--epochs", "1", "--data-path", str(image_folder), "--output_dir", str(tmp_path)]
    main_script.main([*options, "--model-ema", "--model-ema-decay", "0.5"])
    weights = tmp_path / "checkpoint.pth"
    logits = recorded_logits(monkeypatch)
    for changes in ([], ["--model-ema"], ["--amp", "bf16"], ["--batch-size", "3"]):
        run(weights, image_folder / "val" / CLASSES[0], *changes)
    plain, average, half, *batches = logits
    assert not torch.equal(plain, average)
    assert half.dtype == torch.bfloat16
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert not compiled
    run(weights, image_folder / "val" / CLASSES[0], "--compile")
    assert len(compiled) == 1
    network = load_predictor(weights, ema=True, device="cpu")
    paths = sorted((image_folder / "val" / CLASSES[0]).iterdir())
    assert torch.equal(torch.stack([result.logits for result in network(paths)]), average)


@pytest.mark.slow
def test_a_missing_pycocotools_is_named(detector, image_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    image = image_folder / "val" / CLASSES[0] / "0.JPEG"
    assert "pip install pycocotools" in fails(capsys, predict, detector, image, *CPU)


# ------------------------------------------------------------------------------------------------------------- files


def test_files_of_a_prediction(classifier, image_folder, tmp_path, capsys, monkeypatch):
    """Folders, files and a list on standard input, in the order given; a file of the same name in two folders."""
    folder = tmp_path / "images"
    shutil.copytree(image_folder / "val", folder)
    for name in ("notes.txt", "clip.mpg", "._0.JPEG"):  # Pillow has a decoder for MPEG that only names it
        (folder / name).write_text("not an image")
    single = tmp_path / "0.JPEG"
    shutil.copy(folder / CLASSES[0] / "0.JPEG", single)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{single}\r\n\n"))
    files = ["--json", tmp_path / "new/out.json", "--csv", tmp_path / "out.csv", "--out", tmp_path / "pictures"]
    run(classifier, folder, *files, "--topk", "2", "-")  # an option between paths
    output = capsys.readouterr().out
    assert f"note: {folder}: files not used: 1 .mpg, 1 .txt" in output
    entries = json.loads((tmp_path / "new/out.json").read_text())
    paths = [str(path) for path in [*sorted(folder.rglob("[0-9]*.JPEG")), single]]
    assert [entry["path"] for entry in entries] == paths
    assert all(f"{path}: n0" in output for path in paths)
    table = (tmp_path / "out.csv").read_text().splitlines()
    assert table[0] == "path,name,index,probability"
    rows = list(csv.DictReader(table))
    assert [row["path"] for row in rows] == [path for path in paths for _ in range(2)]
    assert [float(row["probability"]) for row in rows[:2]] == [c["probability"] for c in entries[0]["classes"]]
    pictures = {str(path.relative_to(tmp_path / "pictures")) for path in (tmp_path / "pictures").rglob("*.png")}
    assert pictures == {f"{Path(path).relative_to(tmp_path)}.png" for path in paths}


def test_bad_files_are_listed_and_the_others_predicted(classifier, image_folder, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(image_folder / "val" / CLASSES[0], folder)
    damage_jpeg(folder / "3.JPEG")
    (folder / "4.JPEG").write_text("text")
    error = fails(capsys, predict, classifier, folder, "--json", tmp_path / "out.json", *CPU)
    assert "2 of 7 images cannot be predicted" in error
    names = [Path(entry["path"]).name for entry in json.loads((tmp_path / "out.json").read_text())]
    assert names == ["0.JPEG", "1.JPEG", "2.JPEG", "5.JPEG", "6.JPEG"]


def test_bad_files_are_named(classifier, image_folder, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(SystemExit):
        run(classifier, tmp_path / "text.jpg", tmp_path / "nowhere.jpg")
    output = capsys.readouterr().out
    assert f"skipped: {tmp_path / 'text.jpg'}: cannot be read as an image (its format is unknown)" in output
    assert f"skipped: {tmp_path / 'nowhere.jpg'}: cannot be read as an image (there is no such file)\n" in output


def test_pictures_stay_in_their_folder(classifier, image_folder, tmp_path, capsys, monkeypatch):
    """Paths with `..`, and a second run over the folder that holds the pictures of the first."""
    for place in ("a/0.JPEG", "b/1.JPEG"):
        (tmp_path / place).parent.mkdir()
        shutil.copy(image_folder / "val" / CLASSES[0] / "0.JPEG", tmp_path / place)
    monkeypatch.chdir(tmp_path / "a")
    run(classifier, "../b/1.JPEG", "0.JPEG", "--out", "pictures")
    written = ["0.JPEG.png", "1.JPEG.png"]
    assert sorted(path.name for path in (tmp_path / "a/pictures").rglob("*.png")) == written
    assert len(list(tmp_path.rglob("*.png"))) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{tmp_path}\n"))  # a folder in the list
    run(classifier, "-", "--out", "pictures", "--json", "out.json")
    paths = [str(tmp_path / place) for place in ("a/0.JPEG", "b/1.JPEG")]
    assert [entry["path"] for entry in json.loads((tmp_path / "a/out.json").read_text())] == paths
    assert "--out pictures: is searched for images" in fails(
        capsys, predict, classifier, "pictures", "--out", "pictures"
    )


def test_a_stopped_prediction_keeps_what_it_has(classifier, image_folder, tmp_path, capsys, monkeypatch):
    """A signal before the third of four batches; one image of the second has been removed."""
    folder = tmp_path / "images"
    shutil.copytree(image_folder / "val" / CLASSES[0], folder)
    draw, batches = predict.Classification.draw, []

    def remove_before_drawing(result, topk):
        Path(folder / "3.JPEG").unlink(missing_ok=True)
        return draw(result, topk)

    def stop():
        batches.append(1)
        return signal.SIGTERM if len(batches) == 3 else 0

    monkeypatch.setattr(predict.Classification, "draw", remove_before_drawing)
    monkeypatch.setattr(predict, "stop_requested", stop)
    files = ["--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv", "--out", tmp_path / "pictures"]
    with pytest.raises(SystemExit) as end:
        run(classifier, folder, *files, "--batch-size", 2, "--topk", 1)
    assert end.value.code == 128 + signal.SIGTERM
    printed = capsys.readouterr()
    assert "predict.py: stopped by SIGTERM; the predictions up to then are written" in printed.err
    assert "3 of 7 images are predicted" in printed.out
    assert f"skipped: {folder / '3.JPEG'}: cannot be read as an image (there is no such file)" in printed.out
    entries = json.loads((tmp_path / "out.json").read_text())
    assert [Path(entry["path"]).name for entry in entries] == ["0.JPEG", "1.JPEG", "2.JPEG"]
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 4
    assert not list(tmp_path.glob(".*.tmp"))


def test_bad_input_is_refused_in_one_line(classifier, image_folder, tmp_path, capsys):
    image = image_folder / "val" / CLASSES[0] / "0.JPEG"
    (tmp_path / "empty").mkdir()
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(classifier, weights_only=True)["model"], bare)
    assert "contains no images" in fails(capsys, predict, classifier, tmp_path / "empty", *CPU)
    assert "there are no images" in fails(capsys, predict, classifier, *CPU)
    assert "there is no such file" in fails(capsys, predict, tmp_path / "nowhere.pth", image, *CPU)
    assert "does not name its network; pass --model" in fails(capsys, predict, bare, image, *CPU)
    wrong = fails(capsys, predict, bare, image, "--config", ROOT / "segmentation" / UPERNET, *CPU)
    assert "has no layer decode_head.conv_seg" in wrong
    assert "'alt_gvt_smal' is unknown; did you mean" in fails(
        capsys, predict, bare, image, "--model", "alt_gvt_smal", *CPU
    )
    assert "unknown argument --topkk; did you mean --topk?" in fails(
        capsys, predict, classifier, image, "--topkk", 1, *CPU
    )
    assert "remove --model" in fails(capsys, predict, classifier, image, "--model", "alt_gvt_tiny", *CPU)
    assert "name the classifier with --model" in fails(capsys, predict, image, "--pretrained", *CPU)
    assert "name it with --out" in fails(capsys, predict, classifier, image, "--attention", *CPU)
    blocks = fails(capsys, predict, classifier, image, "--attention", "--out", tmp_path, "--blocks", "9.9", *CPU)
    assert "block '9.9' is unknown" in blocks
    assert "add that option" in fails(capsys, predict, classifier, image, "--blocks", "blocks.0.0", *CPU)
    for file in ("-", tmp_path):
        assert f"--json {file}: is not a file" in fails(capsys, predict, classifier, image, "--json", file, *CPU)
    twice = ["--json", tmp_path / "out", "--csv", tmp_path / "out"]
    assert "is also the file of --csv" in fails(capsys, predict, classifier, image, *twice, *CPU)
    for option in (["--model-ema"], ["--config", "x.py"]):
        published = [image, "--pretrained", "--model", "alt_gvt_tiny"]
        assert "--pretrained: the published weights take no" in fails(capsys, predict, *published, *option, *CPU)


def test_old_checkpoints_have_numbered_classes(classifier, image_folder, tmp_path, capsys):
    content = torch.load(classifier, weights_only=True)
    del content["description"]
    content["format"] = 2
    torch.save(content, tmp_path / "old.pth")
    run(tmp_path / "old.pth", image_folder / "val" / CLASSES[0] / "0.JPEG")
    output = capsys.readouterr().out
    assert "does not hold the names of its 3 classes; they are numbered" in output
    assert "class 1" in output


# ----------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.slow
def test_pictures(classifier, segmentor, detector, image_folder, tmp_path):
    """Each task draws the image at a whole factor; the objects below the threshold are left out."""
    path = image_folder / "val" / CLASSES[0] / "0.JPEG"  # 90x72
    network = load_predictor(classifier, device="cpu")
    drawn = network(path).draw(topk=2)
    assert 432 < drawn.height < network(path).draw(topk=3).height
    part = drawn.crop((0, 0, 540, 432)).resize((90, 72), Image.Resampling.NEAREST)
    assert part.tobytes() == open_image(path, upright=False).tobytes()
    result = load_predictor(detector, device="cpu")(path)
    shares = result.scores.sort().values
    limit = shares[len(shares) // 2].item()
    assert len(result.to_dict(limit)["objects"]) == (result.scores >= limit).sum() < len(shares)
    assert result.draw(min_score=limit).tobytes() != result.draw(min_score=0).tobytes()
    result = load_predictor(segmentor, device="cpu")(path)
    panels = np.asarray(result.draw(), int)[:432:6, : 2 * 548 : 6][:, :, :]
    image, labels = np.asarray(open_image(path, upright=True), int), result.labels.long()
    painted = np.asarray(result.draw(), int)[:432, 548:1088][::6, ::6]
    assert np.array_equal(panels[:, :90], image)
    colours = np.array(result.colours)[labels]
    assert np.abs(painted - (image + colours) / 2).max() <= 1


@pytest.mark.slow
def test_attention_is_drawn(classifier, image_folder, tmp_path):
    path = image_folder / "val" / CLASSES[0] / "0.JPEG"
    run(classifier, path, "--attention", "--out", tmp_path)
    run(classifier, path, "--attention", "--out", tmp_path / "one", "--blocks", "blocks.0.0")
    both = [Image.open(folder / "0.JPEG.attention.png") for folder in (tmp_path, tmp_path / "one")]
    assert both[0].width > both[1].width > 3 * 480
    network = load_predictor(classifier, device="cpu")
    seen = both[0].crop((0, 0, 480, 480)).resize((32, 32), Image.Resampling.NEAREST)
    image = to_pil_image(network.prepare(path))
    assert seen.tobytes() == image.tobytes()
    network.model.compile(backend="eager")
    compiled = [network.explain(network(path), ["blocks.0.0"]) for _ in range(2)][1]
    assert compiled.tobytes() == both[1].tobytes()
    heat = predict.attention_maps(network.model, to_input(network.prepare(path)[None]), ["blocks.0.0"])["blocks.0.0"][0]
    panel = both[1].crop((2 * 488, 0, 2 * 488 + 480, 480)).resize((32, 32), Image.Resampling.NEAREST)
    assert panel.tobytes() == predict.draw_heat(image, heat).tobytes()
