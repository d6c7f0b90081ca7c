"""Training and testing of detection as its users run them: the published commands, configs, resuming, bad input."""

import json
import re
import warnings
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.transforms.v2.functional import to_pil_image

from core.images import make_colours
from dense.experiments import load_experiment
from detection import data as detection_data
from detection import metrics
from detection import pictures as detection_pictures
from detection import test as test_script
from detection import train as train_script
from detection.configs.recipes import shapes_setting
from detection.network import TwinsMaskRCNN, build_detector
from detection.pictures import draw_detections
from tests.helpers import (
    BACKBONES,
    DENSE_RUN_FILES,
    ROOT,
    Run,
    assert_same_run,
    fails,
    read_log,
    run_bash_in,
    run_processes,
)
from tests.test_engine import on_processes
from tests.test_models import DATA

FOLDER = ROOT / "detection"
MASK = "configs/mask_rcnn_alt_gvt_s_fpn_1x_coco_pvt_setting.py"
RETINA = "configs/retinanet_alt_gvt_s_fpn_1x_coco_pvt_setting.py"
PUBLISHED = json.loads((DATA / "published_ap.json").read_text())
TINY = ["--device", "cpu", "--num_workers", "0"]
SHAPES = shapes_setting("alt_gvt_tiny", "retinanet", scale=(64, 64))
SMALL = ["backbone=alt_gvt_tiny", "pretrained=", "channels=16", "roi_samples=16", "scale=(128, 96)", "batch_size=1"]
SMALL += ["global_batch=2", "epochs=2", "milestones=(1,)", "warmup_iterations=3", "lr=1e-3", "drop_path=0.3"]


run_bash = partial(run_bash_in, FOLDER)


@pytest.fixture(scope="session")
def trained(coco_folder, tmp_path_factory):
    """Two epochs of Mask R-CNN on COCO's layout in two processes; return the folder."""
    folder = tmp_path_factory.mktemp("detection") / "run"
    options = [*TINY, "--data-root", coco_folder, "--work-dir", folder, "--cfg-options", *SMALL]
    result = run_processes(2, ["detection/train.py", FOLDER / MASK, *options])
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_a_training_leaves_what_is_promised(coco_folder, tmp_path):
    """The training is started by the published command."""
    folder = tmp_path / "run"
    options = [*TINY, "--data-root", coco_folder, "--work-dir", folder, "--print-freq", 1, "--cfg-options", *SMALL]
    result = run_bash("dist_train.sh", MASK, 2, *options)
    assert result.returncode == 0, result.stderr
    output = result.stdout
    assert {file.name for file in folder.iterdir()} == DENSE_RUN_FILES
    assert "batch: 1 images x 2 processes x 1 accumulated = global batch 2; lr 0.001; 3 steps per epoch" in output
    lines = read_log(folder)
    losses = ("objectness", "rpn_box_reg", "classifier", "box_reg", "mask")
    for line in lines:
        assert line["train_loss"] == pytest.approx(sum(line[f"train_loss_{name}"] for name in losses))
        assert {f"test_{kind}_{name}" for kind in ("bbox", "segm") for name in ("AP", "AP50", "APs")} < set(line)
    warmth = [0.001 + 0.999 * i / 3 for i in range(3)]
    assert [line["train_lr"] for line in lines] == pytest.approx([1e-3 * np.mean(warmth), 1e-4])


@pytest.mark.slow
def test_figures_equal_pycocotools_on_the_written_results(trained, coco_folder, tmp_path):
    folder = trained
    options = [*TINY, "--data-root", coco_folder, "--out", tmp_path / "new/results.json", "--cfg-options", *SMALL]
    outputs, results = [], []
    for processes in (1, 2, 3):
        if processes == 1:
            result = run_bash("dist_test.sh", MASK, folder / "checkpoint.pth", processes, "--eval", "mAP", *options)
        else:
            command = ["detection/test.py", FOLDER / MASK, folder / "checkpoint.pth", "--eval", "mAP", *options]
            result = run_processes(processes, command)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout[result.stdout.index("bbox:") :])
        results.append(json.loads((tmp_path / "new/results.json").read_text()))
    assert outputs[0] == outputs[1] == outputs[2]
    assert results[0] == results[1] == results[2]
    assert len(results[0]) > 20
    assert all(set(row) == {"image_id", "category_id", "bbox", "score", "segmentation"} for row in results[0])
    assert {row["category_id"] for row in results[0]} <= {1, 18, 90}
    truth = COCO(str(coco_folder / "annotations/instances_val2017.json"))
    for kind in ("bbox", "segm"):
        rows = [{key: row[key] for key in row if key != "bbox" or kind == "bbox"} for row in results[0]]
        evaluation = COCOeval(truth, truth.loadRes(rows), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert f"{kind}_AP {100 * evaluation.stats[0]:.2f}  {kind}_AP50 {100 * evaluation.stats[1]:.2f}" in outputs[0]
        assert read_log(folder)[-1][f"test_{kind}_AP"] == pytest.approx(evaluation.stats[0], abs=1e-6)
    assert outputs[0].count("Average Precision") == 12


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(coco_folder, tmp_path, start):
    """Two processes, with everything that is drawn at random, killed in each epoch."""
    script = "detection/train.py"
    command = [FOLDER / MASK, *TINY, "--save-every", "1", "--print-freq", "1", "--data-root", coco_folder]
    command += ["--cfg-options", *SMALL, "many_scales=True", "epochs=2"]
    straight = Run(2, command, tmp_path / "straight", script=script)
    assert straight.end() == 0, straight.output
    command += ["--auto-resume"]
    for pattern in (r"epoch 0 \[[12]/3\]", r"epoch 1 \[[12]/3\]"):
        run = start(2, command, script=script)
        run.wait_for(lambda run, pattern=pattern: re.search(pattern, run.output), pattern)
        run.kill()
        assert run.process.exitcode < 0
    run = start(2, command, script=script)
    assert run.end() == 0, run.output
    assert "resumed" in run.output
    assert_same_run(tmp_path / "run", tmp_path / "straight", ("checkpoint.pth", "checkpoint_best.pth"))


def evaluate_on_two(rank: int) -> tuple:
    """Evaluate true objects as found ones; return what this process gathered, evaluated and was told."""
    detection_data.SHAPES_VAL = 5
    dataset = detection_data.build_dataset(SHAPES, "val")

    class Truth(torch.nn.Module):
        def forward(self, images):
            targets = [dataset[i][1] for image in images for i in range(5) if torch.equal(dataset[i][0], image)]
            kept = [{name: target[name] for name in ("boxes", "labels", "masks")} for target in targets]
            return [{**target, "scores": torch.ones(len(target["labels"]))} for target in kept]

    evaluated = []
    metrics.evaluate_kind = lambda *args, wrapped=metrics.evaluate_kind: evaluated.append(1) or wrapped(*args)
    loader = ([[image], [target]] for image, target in (dataset[i] for i in range(rank, 5, 2)))
    results = metrics.find_objects(Truth(), loader, torch.device("cpu"), dataset.category_ids)
    figures = metrics.summarise(dataset.coco, dataset.ids, results, ("bbox", "segm"))
    return (None if results is None else len({row["image_id"] for row in results})), len(evaluated), figures


@pytest.mark.slow
def test_the_main_process_alone_computes_the_figures(tmp_path):
    main, other = on_processes(2, evaluate_on_two, tmp_path)
    assert main[:2] == (5, 2)  # all images, both kinds
    assert other[:2] == (None, 0)
    assert main[2] == other[2]
    assert main[2]["bbox_AP"] == main[2]["segm_AP"] == pytest.approx(1)


@pytest.mark.slow
def test_another_global_batch_continues_the_run(coco_folder, tmp_path, capsys):
    command = [FOLDER / MASK, *TINY, "--data-root", coco_folder, "--work-dir", tmp_path, "--print-freq", "1"]
    changes = ["--cfg-options", *SMALL, "epochs=1"]
    train_script.main([str(arg) for arg in (*command, *changes)])
    capsys.readouterr()
    changes += ["epochs=2", "global_batch=1"]
    train_script.main([str(arg) for arg in (*command, "--auto-resume", *changes)])
    output = capsys.readouterr().out
    message = "the global batch changed from 2 to 1; epoch 1 continues after step 0"
    assert message in output
    assert "epoch 1 [4/4]" in output
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    torch.save(checkpoint | {"epoch": 1, "position": 3, "history": checkpoint["history"][:1]}, tmp_path / "middle.pth")
    for batch, place in ((2, "after step 1 of 3"), (4, "after step 0 of 2")):
        changes[-1] = f"global_batch={batch}"
        resumed = [*command[:-4], "--work-dir", tmp_path / str(batch), "--resume", tmp_path / "middle.pth"]
        train_script.main([str(arg) for arg in (*resumed, *changes)])
        assert f"epoch 1 continues {place}, and was at step 3" in capsys.readouterr().out


@pytest.mark.slow
def test_mixed_precision_reaches_the_evaluation(coco_folder, tmp_path, monkeypatch):
    seen = set()
    forward = TwinsMaskRCNN.forward
    monkeypatch.setattr(
        TwinsMaskRCNN,
        "forward",
        lambda self, *args: seen.add((self.training, torch.is_autocast_enabled("cpu"))) or forward(self, *args),
    )
    for amp in ("off", "bf16"):
        seen.clear()
        command = [FOLDER / MASK, *TINY, "--data-root", coco_folder, "--work-dir", tmp_path / amp, "--amp", amp]
        train_script.main([str(arg) for arg in (*command, "--cfg-options", *SMALL, "epochs=1")])
        assert seen == {(True, amp == "bf16"), (False, amp == "bf16")}


@pytest.mark.parametrize("config", [MASK, RETINA])
def test_images_without_objects_have_finite_losses_and_gradients(config):
    experiment = load_experiment(FOLDER / config, SMALL)
    torch.manual_seed(0)
    model = build_detector(experiment, 3, pretrained=False).train()
    images = [torch.rand(3, 64, 96), torch.rand(3, 80, 64)]
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 80, 64, dtype=torch.uint8),
    }
    one = {"boxes": torch.tensor([[5.0, 5, 40, 60]]), "labels": torch.tensor([2])}
    one["masks"] = torch.ones(1, 64, 96, dtype=torch.uint8)
    for targets in ([one, empty], [empty, empty]):
        model.zero_grad()
        losses = model(images, targets)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing  # DistributedDataParallel waits for each
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("config", [MASK, RETINA])
def test_compiled_and_half_precision_detectors(config):
    """The backbone alone is compiled, and images of several sizes are no trouble."""
    torch.manual_seed(0)
    model = build_detector(load_experiment(FOLDER / config, SMALL), 3, pretrained=False).eval()
    images = [torch.rand(3, 64, 96), torch.rand(3, 80, 64)]
    with torch.inference_mode():
        expected = [model([image])[0] for image in images]
        model.compile(backend="eager", fullgraph=True)
        for image, wanted in zip(images, expected, strict=True):
            (found,) = model([image])
            assert set(found) == set(wanted)
            for name, values in found.items():
                torch.testing.assert_close(values, wanted[name])
        model.bfloat16()([image.bfloat16() for image in images])


# -------------------------------------------------------------------------------------------------------- experiments


def test_schedules_are_chosen_by_one_field():
    for name, expected in (("1x", (12, (8, 11))), ("2x", (24, (16, 22))), ("3x", (36, (27, 33)))):
        for config in (MASK, "configs/retinanet_pcpvt_s_fpn_3x_ms_coco.py"):
            experiment = load_experiment(FOLDER / config, [f"schedule={name}"]).resolve()
            assert (experiment.epochs, experiment.milestones) == expected
    experiment = load_experiment(FOLDER / MASK, ["epochs=7", "milestones=5,"])
    assert (experiment.epochs, experiment.milestones) == (7, (5,))


SETTINGS = (
    "retinanet_{}_fpn_1x_coco_pvt_setting",
    "retinanet_{}_fpn_3x_ms_coco",
    "mask_rcnn_{}_fpn_1x_coco_pvt_setting",
    "mask_rcnn_{}_fpn_3x_coco_swin_setting",
)


@pytest.mark.parametrize(("name", "figures"), PUBLISHED["experiments"].items())
def test_docstrings_state_the_published_figures(name, figures):
    docstring = " ".join((FOLDER / f"configs/{name}.py").read_text().split('"""')[1].split())
    stated = {
        kind: [
            float(number) for number in re.findall(r"\d+\.\d", docstring[docstring.index(f"{kind} AP") :])[: len(row)]
        ]
        for kind, row in figures.items()
    }
    assert stated == figures
    assert len(re.findall(r"\d+\.\d\b", docstring)) == sum(map(len, figures.values()))
    tables = "tables 3 and 8" if name.startswith("retinanet") else "tables 4 and 8"
    assert (f"{tables} of the paper (arXiv 2104.13840)" in docstring) == bool(figures)
    assert figures or re.search("neither the config nor its AP is published|the paper has no AP for it", docstring)


def test_every_published_experiment_is_in_the_table_of_figures():
    assert set(PUBLISHED["experiments"]) == {setting.format(name) for setting in SETTINGS for name in BACKBONES}
    table = (ROOT / "README.md").read_text()
    for setting in SETTINGS:
        rows = [PUBLISHED["experiments"][setting.format(name)] for name in BACKBONES]
        cells = [" / ".join(f"{values[0]:.1f}" for values in row.values()) or "\N{EN DASH}" for row in rows]
        assert f"| {' | '.join(cells)} |" in table, setting


def test_initial_weights_and_proposals_are_those_of_the_experiment():
    for changes, std, counts in (([], 0.01, (2000, 1000)), (["head_std=0.06", "proposals=100"], 0.06, (200, 100))):
        head = build_detector(load_experiment(FOLDER / RETINA, [*SMALL, *changes]), 3, pretrained=False).head
        for tower in (head.classification_head.conv, head.regression_head.conv):
            assert [layer[0].weight.std().item() for layer in tower] == pytest.approx([std] * 4, rel=0.1)
        rpn = build_detector(load_experiment(FOLDER / MASK, [*SMALL, *changes]), 3, pretrained=False).rpn
        for training in (True, False):
            rpn.train(training)
            assert (rpn.pre_nms_top_n(), rpn.post_nms_top_n()) == (counts[not training], counts[1])


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["epoch=3"], "--cfg-options epoch: there is no such key; configs/recipes.py lists them; did you mean epochs"),
        (["detector=yolo"], "detector='yolo' is unknown; choose retinanet or mask_rcnn"),
        (["epochs=0"], "epochs=0 is not above 0"),
        (["weight_decay=-1"], "weight_decay=-1.0 is not at least 0"),
        (["drop_path=2"], "drop_path=2.0 is not at least 0 and below 1"),
        (["scale=8,8"], "scale=(8, 8): 8 is not at least 32 pixels"),
        (["milestones=-3,"], "milestones=(-3,): -3 is not above 0"),
        (["data_root=/nowhere"], "/nowhere: there is no such folder; set the folder of the data set with --data-root"),
        (["backbone=pcpvt"], "backbone 'pcpvt' is unknown"),
    ],
)
def test_bad_options_of_a_training(options, message, coco_folder, tmp_path, capsys):
    changes = [*SMALL, f"data_root={coco_folder}", *options]
    command = [FOLDER / MASK, *TINY, "--work-dir", tmp_path / "run", "--cfg-options", *changes]
    assert message in fails(capsys, train_script, *command)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_weights_that_do_not_fit_are_refused(trained, coco_folder, tmp_path, capsys):
    folder = trained
    options = [*TINY, "--data-root", coco_folder, "--cfg-options", *SMALL]
    line = fails(capsys, test_script, FOLDER / MASK, folder / "checkpoint.pth", *options, "dataset=shapes")
    assert f"--data-root {coco_folder}: the shapes data set is generated and has no folder" in line
    shapes = [*TINY, "--cfg-options", *SMALL, "dataset=shapes"]
    line = fails(capsys, test_script, FOLDER / MASK, folder / "checkpoint.pth", *shapes)
    assert "cls_score.weight (4, 1024) in the file, (11, 1024) in the model" in line
    line = fails(capsys, test_script, FOLDER / RETINA, folder / "checkpoint.pth", *options)
    assert "these weights do not fit the model" in line
    line = fails(capsys, test_script, FOLDER / RETINA, folder / "checkpoint.pth", "--eval", "segm", *options)
    assert "--eval segm: retinanet finds no masks; remove segm" in line


# ----------------------------------------------------------------------------------------------------------- pictures


def test_pictures_show_boxes_masks_and_names():
    found = {
        "boxes": torch.tensor([[40.0, 30, 160, 110]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.9]),
        "masks": torch.zeros(1, 120, 240, dtype=torch.bool),
    }
    found["masks"][0, 80:100, 60:90] = True
    image = torch.full((3, 120, 240), 90, dtype=torch.uint8)
    pixels = np.asarray(draw_detections(image, found, ["a", "b", "c"])).astype(int)
    assert pixels.shape == (240, 480, 3)  # enlarged twice
    outline = np.zeros((240, 480), bool)
    outline[60:221, 80:321] = True
    outline[63:218, 83:318] = False
    colour = np.array(make_colours(3)[1])
    assert (pixels[outline] == colour).all()
    mask = np.zeros((240, 480), bool)
    mask[160:200, 120:180] = True
    assert np.abs(pixels[mask] - (90 + colour) / 2).max() <= 1
    label = np.zeros((240, 480), bool)
    label[60:84, 80:140] = True  # name and score, in white on black
    assert {0, 255} <= set(pixels[label & ~outline].ravel())
    assert (pixels[~(outline | mask | label)] == 90).all()
    del found["scores"], found["masks"]
    truth = np.asarray(draw_detections(image, found, ["a", "b", "c"])).astype(int)
    assert (truth[outline] == colour).all()
    assert (truth[mask] == 90).all()


def test_pictures_show_overlapping_objects():
    found = {
        "boxes": torch.tensor([[10.0, 10, 60, 60], [10, 10, 60, 60]]),
        "labels": torch.tensor([0, 1]),
        "scores": torch.tensor([0.9, 0.6]),
        "masks": torch.ones(2, 96, 96, dtype=torch.bool),
    }
    pixels = np.asarray(draw_detections(torch.zeros(3, 96, 96, dtype=torch.uint8), found, ["a", "b"]))
    first, second = np.array(make_colours(2))
    assert tuple(pixels[50, 60]) == tuple(first)  # the box with the higher score lies on top
    assert np.abs(pixels[-1, -1] - (first / 2 + second / 4)).max() <= 1  # and so does its mask


def test_a_label_does_not_cover_that_of_a_higher_score():
    """Two boxes at the same corner, in either order, and one below them, whose label has room."""
    found = {"boxes": torch.tensor([[10.0, 10, 200, 60], [10, 12, 210, 90], [10, 100, 90, 200]])}
    found |= {"labels": torch.tensor([0, 1, 0]), "scores": torch.tensor([0.6, 0.9, 0.5])}
    image = torch.zeros(3, 300, 480, dtype=torch.uint8)
    with mock.patch("detection.pictures.draw_bounding_boxes", wraps=detection_pictures.draw_bounding_boxes) as draw:
        draw_detections(image, found, ["a long name", "b"])
    assert draw.call_args.kwargs["labels"] == ["a long name 0.50", None, "b 0.90"]


def test_a_picture_without_objects_is_the_image():
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    image = torch.full((3, 96, 96), 90, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = np.asarray(draw_detections(image, none | {"masks": torch.zeros(0, 96, 96)}, ["a"]))
    assert pixels.shape == (480, 480, 3)
    assert (pixels == 90).all()


def test_only_objects_above_the_threshold_are_shown(tmp_path, monkeypatch):
    drawn, captions = [], []

    def draw(image, found, _):
        drawn.append(found)
        return to_pil_image(image)

    monkeypatch.setattr(test_script, "draw_detections", draw)
    monkeypatch.setattr(
        test_script, "draw_captions", lambda panels: captions.append([title for title, _ in panels]) or panels[1][1]
    )
    show = test_script.build_painter(detection_data.build_dataset(SHAPES, "val"), str(tmp_path), 0.4)
    scores = torch.tensor([0.3, 0.5, 0.4])
    for found in (scores, scores / 2):
        show(0, {"boxes": torch.zeros(3, 4), "scores": found, "labels": torch.zeros(3, dtype=torch.int64)})
    assert drawn[0]["scores"].tolist() == pytest.approx([0.5, 0.4])
    assert set(drawn[1]) == {"boxes", "labels"}  # of the annotations; this detector finds no masks
    assert captions == [["found", "annotated"], ["no objects with a score of at least 0.4", "annotated"]]
    parser = test_script.get_parser()
    assert parser.parse_args(["c", "w", "--show-score-thr", "0.7"]).show_score_thr == 0.7


def test_a_run_on_shapes_shows_what_it_finds(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(detection_data, "SHAPES_TRAIN", 16)
    monkeypatch.setattr(detection_data, "SHAPES_VAL", 6)
    config = FOLDER / "configs/retinanet_alt_gvt_tiny_shapes.py"
    changes = ["--cfg-options", "epochs=1", "scale=(96, 96)"]
    train_script.main([str(arg) for arg in (config, *TINY, "--work-dir", tmp_path / "run", *changes)])
    output = capsys.readouterr().out
    assert output.count("bbox_AP50 ") == 1
    assert "Average Precision" not in output  # the tables are those of test.py
    options = ["--show-dir", tmp_path / "shown", "--show-score-thr", "0", *TINY]
    test_script.main([str(arg) for arg in (config, tmp_path / "run/checkpoint.pth", *options, *changes)])
    assert {path.name for path in (tmp_path / "shown").iterdir()} == {f"{i:05}.png" for i in range(6)}
    assert "bbox_AP " in capsys.readouterr().out
