"""Tests of `analyze.py evaluate` and `analyze.py data`, against scikit-learn, pycocotools and the training loaders."""

import csv
import json
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import analyze
import main as main_script
from analysis import data, evaluate
from analysis.classification import class_figures, describe_worst
from analysis.pictures import draw_bars, draw_matrix, save_sheet
from core.distributed import Processes
from core.options import ArgumentParser, add_loader_options, add_process_options
from datasets import build_train_loader, build_val_loader
from detection import test as detection_test
from segmentation import test as segmentation_test
from tests.helpers import ROOT, TINY, fails
from tests.test_detection_runs import MASK
from tests.test_detection_runs import SMALL as SMALL_DETECTOR
from tests.test_options import options_of
from tests.test_predict import as_config, one_thread  # noqa: F401  a fixture
from tests.test_segmentation_runs import SMALL as SMALL_SEGMENTOR
from tests.test_segmentation_runs import UPERNET

CPU = ["--device", "cpu", "--num_workers", "0"]
EVALUATE_OPTIONS = {
    "weights": "test_a_classifier_is_analysed",
    "data_path": "test_a_classifier_is_analysed",
    "out": "test_a_classifier_is_analysed",
    "worst": "test_a_classifier_is_analysed",
    "model": "test_released_weights_are_analysed",
    "config": "test_label_maps_are_analysed_without_the_network",
    "model_ema": "test_options_of_the_network_reach_it",
    "amp": "test_options_of_the_network_reach_it",
    "compile": "test_options_of_the_network_reach_it",
    "batch_size": "test_options_of_the_network_reach_it",
}
DATA_OPTIONS = {
    "source": "test_the_sheet_has_the_images_of_a_training",
    "images": "test_the_sheet_has_the_images_of_a_training",
    "out": "test_the_sheet_has_the_images_of_a_training",
    "cfg_options": "test_the_sheet_shows_labels_and_objects",
    "recipe": "test_options_of_the_sheet",
    "input_size": "test_options_of_the_sheet",
    "seed": "test_options_of_the_sheet",
}


def run(*argv) -> None:
    analyze.main([str(arg) for arg in (*argv, *CPU)])


def read_table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_every_option_has_a_test():
    shared = ArgumentParser()
    add_loader_options(shared)
    add_process_options(shared)
    for command, options, others in (
        (evaluate, EVALUATE_OPTIONS, []),
        (data, DATA_OPTIONS, [data.add_training_options]),
    ):
        parser, known = ArgumentParser(), ArgumentParser()
        command.add_options(parser)
        for add in others:
            add(known)
        assert options_of(parser) - {"tf32"} == {*options} | options_of(shared) | options_of(known)
        assert set(options.values()) <= set(globals())


# ------------------------------------------------------------------------------------------------------ classification


@pytest.mark.slow
def test_figures_of_classes_equal_scikit_learns():
    """Also for a class that is never predicted, and one without images."""
    metrics = pytest.importorskip("sklearn.metrics")
    draws = np.random.default_rng(0)
    true, predicted = draws.choice([0, 1, 2, 4], 300), draws.choice([0, 1, 3, 4], 300)
    counts = metrics.confusion_matrix(true, predicted, labels=range(5))
    rows = class_figures(torch.from_numpy(counts), list("abcde"))
    expected = metrics.precision_recall_fscore_support(true, predicted, labels=range(5), zero_division=0)
    for row, precision, recall, f1, images in zip(rows, *expected, strict=True):
        assert row[1] == images
        assert row[2:] == pytest.approx((precision, recall, f1), abs=1e-12)


@pytest.mark.slow
def test_a_classifier_is_analysed(classifier, image_folder, tmp_path, capsys):
    """The confusion matrix is scikit-learn's, and the worst images have the highest losses."""
    metrics = pytest.importorskip("sklearn.metrics")
    run("evaluate", classifier, "--data-path", image_folder, "--out", tmp_path, "--worst", 3)
    output = capsys.readouterr().out
    main_script.main(
        [*TINY, "--eval", "--resume", str(classifier), "--data-path", str(image_folder), "--batch-size", "14"]
    )
    accuracy = capsys.readouterr().out.split("Acc@1 ")[1].split()[0]
    assert f"accuracy {float(accuracy):.2f} % of 21 images" in output
    rows = [list(row.values()) for row in read_table(tmp_path / "confusion.csv")]
    network = evaluate.load_predictor(classifier, device="cpu")
    paths = sorted((image_folder / "val").rglob("*.JPEG"))
    results = network(paths, batch_size=21)
    true = [network.classes.index(path.parent.name) for path in paths]
    expected = metrics.confusion_matrix(true, [result.logits.argmax().item() for result in results], labels=range(3))
    assert [[int(cell) for cell in row[1:]] for row in rows] == expected.tolist()
    assert [row[0] for row in rows] == network.classes
    assert [row["recall"] for row in read_table(tmp_path / "classes.csv")] == [
        f"{expected[i, i] / expected[i].sum():.6g}" for i in range(3)
    ]
    losses = [-result.logits.log_softmax(0)[label].item() for result, label in zip(results, true, strict=True)]
    worst = np.argsort(losses)[::-1][:3]
    sheet = Image.open(tmp_path / "worst.png")
    for column, index in enumerate(worst):  # tiles of 240 pixels, enlarged from 32
        tile = np.asarray(
            sheet.crop((248 * column, 0, 248 * column + 240, 240)).resize((32, 32), Image.Resampling.BOX), int
        )
        seen = np.asarray(evaluation_picture(network, paths[index]), int)
        assert np.abs(tile - seen).mean() < 4
    assert (tmp_path / "confusion.png").stat().st_size > 5000
    logits = torch.tensor([0.0, 1.0, 3.0])
    caption, _ = describe_worst((1.0, "a.jpg", torch.zeros(3, 8, 8), logits, 1), ["x", "y", "z"])
    assert caption == "a.jpg\ntrue: y 11%\npredicted: z 84%"


def evaluation_picture(network, path: Path) -> Image.Image:
    return data.to_picture(network.prepare(path))


@pytest.mark.slow
def test_released_weights_are_analysed(classifier, image_folder, tmp_path, capsys):
    """Their classes have no names, so the data's are not compared; the input is that of the defaults, 224 pixels."""
    torch.save(torch.load(classifier, weights_only=True)["model"], tmp_path / "bare.pth")
    run("evaluate", tmp_path / "bare.pth", "--model", "alt_gvt_tiny", "--data-path", image_folder, "--worst", 1)
    assert "of 21 images" in capsys.readouterr().out
    assert Image.open(tmp_path / "bare_analysis/worst.png").width >= 240
    torch.save(timm.create_model("alt_gvt_tiny", num_classes=7).state_dict(), tmp_path / "other.pth")
    options = ["--model", "alt_gvt_tiny", "--data-path", image_folder, *CPU]
    assert "has 7 classes, the data 3" in fails(capsys, analyze, "evaluate", tmp_path / "other.pth", *options)


@pytest.mark.slow
def test_options_of_the_network_reach_it(classifier, image_folder, tmp_path, monkeypatch):
    asked, batches = [], []
    load = evaluate.load_predictor

    def load_and_note(path, **options):
        asked.append(options)
        return load(path, **(options | {"ema": False}))

    def build_and_note(args, processes):
        batches.append(args.batch_size)
        return build_val_loader(args, processes)

    monkeypatch.setattr(evaluate, "load_predictor", load_and_note)
    monkeypatch.setattr("analysis.classification.build_val_loader", build_and_note)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_, **__: compiled.append(self))
    options = ["--data-path", image_folder, "--out", tmp_path, "--amp", "bf16", "--model-ema", "--compile"]
    run("evaluate", classifier, *options, "--batch-size", 5)
    assert (asked[0]["amp"], asked[0]["ema"], batches, len(compiled)) == ("bf16", True, [5], 1)


# -------------------------------------------------------------------------------------------------------- dense tasks


@pytest.mark.slow
def test_label_maps_are_analysed_without_the_network(segmentor, ade20k_folder, tmp_path, capsys):
    """The figures are those of test.py; the label maps that it writes give the same as the network."""
    config = as_config("segmentation", "upernet_swin_setting", SMALL_SEGMENTOR, tmp_path / "config.py")
    options = [*CPU, "--data-root", str(ade20k_folder), "--out", str(tmp_path / "maps")]
    segmentation_test.main(
        [str(ROOT / "segmentation" / UPERNET), str(segmentor), *options, "--cfg-options", *SMALL_SEGMENTOR]
    )
    expected = capsys.readouterr().out
    run("evaluate", segmentor, "--data-path", ade20k_folder, "--out", tmp_path / "a", "--worst", 2)
    first = capsys.readouterr().out
    run(
        "evaluate",
        tmp_path / "maps",
        "--config",
        config,
        "--data-path",
        ade20k_folder,
        "--out",
        tmp_path / "b",
        "--worst",
        2,
    )
    figures = expected[expected.index("mIoU ") :].splitlines()[0]
    assert figures in first
    assert figures in capsys.readouterr().out
    for name in ("confusion.csv", "classes.csv", "worst.png", "iou.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    counts = np.array(
        [[int(cell) for cell in list(row.values())[1:]] for row in read_table(tmp_path / "a/confusion.csv")]
    )
    for i, row in enumerate(read_table(tmp_path / "a/classes.csv")):
        union = counts[i].sum() + counts[:, i].sum() - counts[i, i]
        if union:
            assert float(row["IoU"]) == pytest.approx(counts[i, i] / union, rel=1e-5)


@pytest.mark.slow
def test_the_worst_label_maps_come_first(ade20k_folder, tmp_path, monkeypatch):
    """Copies of the labels, of which more and more rows are of a wrong class."""
    pytest.importorskip("matplotlib")
    (tmp_path / "maps").mkdir()
    paths = sorted((ade20k_folder / "annotations/validation").glob("*.png"))
    for i, path in enumerate(paths):
        labels = np.array(Image.open(path))
        labels[labels == 0] = 1  # a prediction has no ignored pixels
        labels[: len(labels) * i // 6] = 150
        Image.fromarray(labels).save(tmp_path / "maps" / path.name)
    titles = []
    monkeypatch.setattr("analysis.segmentation.save_sheet", lambda panels, *_: titles.extend(t for t, _ in panels))
    config = as_config("segmentation", "upernet_swin_setting", SMALL_SEGMENTOR, tmp_path / "config.py")
    run(
        "evaluate", tmp_path / "maps", "--config", config, "--data-path", ade20k_folder, "--out", tmp_path, "--worst", 4
    )
    assert [title.partition(":")[0] for title in titles] == [path.stem for path in paths[:0:-1]]


@pytest.mark.slow
def test_a_detector_is_analysed_as_by_pycocotools(detector, coco_folder, tmp_path):
    """AP of classes and sizes, and the curves, of the network and of the results that test.py writes."""
    config = as_config("detection", "mask_rcnn_1x_pvt_setting", SMALL_DETECTOR, tmp_path / "config.py")
    results = tmp_path / "results.json"
    options = [*CPU, "--data-root", str(coco_folder), "--out", str(results)]
    detection_test.main(
        [
            str(ROOT / "detection" / MASK),
            str(detector),
            *options,
            "--cfg-options",
            *SMALL_DETECTOR,
            "score_threshold=0.0",
        ]
    )
    rows = json.loads(results.read_text())
    coco = COCO(coco_folder / "annotations/instances_val2017.json")
    for i, annotation in enumerate(coco.loadAnns(coco.getAnnIds(iscrowd=False))):  # some objects that are found
        row = {"image_id": annotation["image_id"], "category_id": annotation["category_id"], "bbox": annotation["bbox"]}
        rows.append(row | {"score": 0.9 - 0.05 * i, "segmentation": coco.annToRLE(annotation)})
        if isinstance(rows[-1]["segmentation"]["counts"], bytes):
            rows[-1]["segmentation"]["counts"] = rows[-1]["segmentation"]["counts"].decode()
    results.write_text(json.dumps(rows[::2] + rows[-3:]))
    run("evaluate", results, "--config", config, "--data-path", coco_folder, "--out", tmp_path / "a")
    for kind in ("bbox", "segm"):
        with redirect_stdout(StringIO()):
            found = coco.loadRes(
                [
                    row if kind == "bbox" else {k: row[k] for k in row if k != "bbox"}
                    for row in json.loads(results.read_text())
                ]
            )
            judge = COCOeval(coco, found, kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        table = read_table(tmp_path / f"a/{kind}_classes.csv")
        for column, figure in zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), judge.stats, strict=False):
            values = [float(row[column]) for row in table]
            mean = np.nanmean(values) if not np.isnan(values).all() else -1
            assert mean == pytest.approx(figure, rel=1e-5)
        assert 0 < judge.stats[0] < 1
        precision = judge.eval["precision"][0, :, :, 0, -1]
        curve = read_table(tmp_path / f"a/{kind}_curves.csv")
        assert len(curve) == 101
        assert [float(row["recall"]) for row in curve] == pytest.approx(judge.params.recThrs.tolist())
        for name, thresholds in (("IoU 0.75", [5]), ("IoU 0.50 to 0.95", range(10))):
            parts = judge.eval["precision"][list(thresholds), :, :, 0, -1].transpose(1, 0, 2).reshape(101, -1)
            expected = [part[part > -1].mean() for part in parts]
            assert [float(row[name]) for row in curve] == pytest.approx(expected, rel=1e-5)
        for k, name in enumerate(("person", "dog", "toothbrush")):
            own = judge.eval["precision"][:, :, k, 0, -1]
            assert float(table[k]["AP"]) == pytest.approx(own.mean(), rel=1e-5)
            assert (table[k]["class"], own.min() >= 0) == (name, True)
            found = [float(row[f"{name}, IoU 0.50"]) for row in curve]
            assert found == pytest.approx(own[0].tolist(), rel=1e-5)
        means = [column[column > -1].mean() for column in precision]
        assert [float(row["IoU 0.50"]) for row in curve] == pytest.approx(means, rel=1e-5)
        assert (tmp_path / f"a/{kind}_curves.png").stat().st_size > 5000
    run("evaluate", detector, "--data-path", coco_folder, "--out", tmp_path / "b")
    assert len(read_table(tmp_path / "b/segm_classes.csv")) == 3


# --------------------------------------------------------------------------------------------------------------- data


def tiles(path: Path, tile: tuple[int, int], size: tuple[int, int], count: int) -> list[np.ndarray]:
    """Return the first images of a sheet's first row at their own size."""
    sheet = Image.open(path)
    parts = [sheet.crop((left, 0, left + tile[0], tile[1])) for left in range(0, count * (tile[0] + 8), tile[0] + 8)]
    return [np.asarray(part.resize(size, Image.Resampling.BOX), int) for part in parts]


def test_the_sheet_has_the_images_of_a_training(image_folder, tmp_path, capsys):
    """After augmentation; those of a run's options, and those of the command line, which are the same here."""
    options = ["--data-path", str(image_folder), "--input-size", "48", "--aa", "v0", "--seed", "3"]
    run("data", *options, "--images", 5, "--out", tmp_path / "own.png")
    assert f"wrote {tmp_path / 'own.png'}: 5 images" in capsys.readouterr().out
    training = main_script.parse_args([*TINY, *options, "--batch-size", "1", "--mixup", "0", "--cutmix", "0"])
    loader = build_train_loader(training, Processes(torch.device("cpu")), global_batch=1)
    seen = [np.asarray(data.to_picture(images.normalise()[0]), int) for images, _ in loader][:5]
    found = tiles(tmp_path / "own.png", (240, 240), (48, 48), 5)
    assert all(np.abs(tile - image).mean() < 6 for tile, image in zip(found, seen, strict=True))
    assert np.abs(found[0] - seen[1]).mean() > 20
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "args.json").write_text(json.dumps({"args": vars(training)}))
    run("data", run_folder, "--images", 5, "--out", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "own.png").read_bytes()
    run("data", run_folder, "--images", 5, "--seed", 4, "--out", tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() != (tmp_path / "own.png").read_bytes()


def test_options_of_the_sheet(tmp_path):
    """A recipe's values, unless the command line gives others."""
    pictures = []
    for i, options in enumerate(([], ["--seed", 1], ["--input-size", 96], ["--aa", "v0"])):
        run("data", "--recipe", "shapes", "--images", 2, "--out", tmp_path / f"{i}.png", *options)
        pictures.append((tmp_path / f"{i}.png").read_bytes())
    assert len(set(pictures)) == 4
    parser = ArgumentParser()
    data.add_options(parser)
    assert data.merge_options(parser.parse_args(["--seed", "0"]), {"seed": 3}).seed == 0  # also a default value
    merged = data.merge_options(parser.parse_args(["--recipe", "shapes", "--input-size", "96"]), data.SHAPES)
    assert (merged.input_size, merged.aa, merged.data_set) == (96, "none", "SHAPES")


def test_the_sheet_shows_labels_and_objects(tmp_path, monkeypatch):
    """The arguments of the two drawing functions are the batches of the training loaders."""
    drawn = []

    def draw(image, annotated, *_):
        drawn.append((image, annotated))
        return Image.new("RGB", (64, 64))

    monkeypatch.setattr(data, "draw_overlay", draw)
    monkeypatch.setattr("detection.pictures.draw_detections", draw)
    for config in (
        "segmentation/configs/upernet_alt_gvt_tiny_shapes.py",
        "detection/configs/mask_rcnn_alt_gvt_tiny_shapes.py",
    ):
        run("data", ROOT / config, "--images", 3, "--out", tmp_path / "sheet.png", "--cfg-options", "scale=(64, 64)")
    (image, labelled), (detected, target) = drawn[0], drawn[3]
    assert len(drawn) == 6
    assert image.dtype == detected.dtype == torch.uint8
    assert labelled["labels"].shape == image.shape[1:]
    assert max(detected.shape[1:]) == 64
    assert target["masks"].shape[1:] == detected.shape[1:]
    inside = target["masks"][0].nonzero()
    top, left = inside.min(dim=0).values.tolist()
    assert abs(target["boxes"][0][0] - left) <= 1
    assert abs(target["boxes"][0][1] - top) <= 1


@pytest.mark.slow
def test_figures_of_matplotlib():
    """Rows of the matrix are true classes, in percent; bars are sorted, also those of equal names."""
    pytest.importorskip("matplotlib")
    axis = draw_matrix(torch.tensor([[3, 1], [0, 2]]), ["a", "b"]).axes[0]
    assert axis.images[0].get_array().tolist() == [[75, 25], [0, 100]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert axis.get_ylabel() == "true class"
    axis = draw_bars(["a", "b", "b", "c"], [2.0, 5.0, 1.0, float("nan")], "IoU in %").axes[0]
    assert [bar.get_width() for bar in axis.patches] == [1, 2, 5]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["b", "a", "b"]


def test_sheets_have_rows(tmp_path):
    panels = [("", Image.new("RGB", (30, 30), colour)) for colour in ("red", "green", "blue")]
    save_sheet(panels, (40, 40), 2, tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    pixels = np.asarray(sheet)
    assert tuple(pixels[20, 20]) == (255, 0, 0)
    assert tuple(pixels[20, 48 + 20]) == (0, 128, 0)
    assert tuple(pixels[sheet.height // 2 + 20, 20]) == (0, 0, 255)


def test_bad_input_is_refused_in_one_line(image_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "results.json").write_text("[]")
    assert "--out x.jpg: name a file that ends in .png" in fails(capsys, analyze, "data", "--out", "x.jpg")
    assert f"for images pass --data-path {tmp_path}" in fails(
        capsys, analyze, "data", tmp_path, "--out", tmp_path / "x.png"
    )
    assert "--data-path is missing" in fails(capsys, analyze, "data", "--out", tmp_path / "x.png", *CPU)
    monkeypatch.setattr(evaluate, "require_package", lambda *_: None)
    results = fails(capsys, analyze, "evaluate", tmp_path / "results.json", *CPU)
    assert "results.json: name the experiment of the results with --config" in results
    (tmp_path / "args.json").write_text("{}")
    folder = fails(capsys, analyze, "evaluate", tmp_path, *CPU)
    assert f"name a checkpoint in it, such as {tmp_path}/checkpoint_best.pth" in folder
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else sys)
    missing = fails(capsys, analyze, "evaluate", "x.pth", *CPU)
    assert "analyze.py evaluate needs the package matplotlib, which is not installed" in missing


@pytest.mark.slow
def test_data_of_other_classes_are_refused(classifier, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for side in ("train", "val"):
        for name in ("a", "b", "c"):
            (tmp_path / side / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / side / name / "0.png")
    assert "its classes are not those of the data" in fails(
        capsys, analyze, "evaluate", classifier, "--data-path", tmp_path, *CPU
    )
    content = torch.load(classifier, weights_only=True)
    content["args"]["data_set"] = "SHAPES"
    torch.save(content, tmp_path / "shapes.pth")
    error = fails(capsys, analyze, "evaluate", tmp_path / "shapes.pth", "--data-path", tmp_path, *CPU)
    assert "is for shapes, which have no folder; omit it" in error
